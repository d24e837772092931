"""What a run shows: no model is needed."""
