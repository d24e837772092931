"""From a prompt to text: one at a time, as a chat, or many at once."""
