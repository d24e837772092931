"""All that needs the models: asks them, and writes what they answer."""
