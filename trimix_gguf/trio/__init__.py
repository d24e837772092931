"""Three models in step on one prompt."""
