"""From a prompt to weights."""
