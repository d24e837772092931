"""`trimix serve`: the engine of batching.py behind HTTP, as OpenAI's clients speak it."""
