"""A run's folder: written line by line, resumed after a kill, and read back."""
