"""Trios as things: their files, where they are kept, how they are fetched and carried."""
