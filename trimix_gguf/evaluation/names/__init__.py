"""What methods and settings are called: no model is needed."""
