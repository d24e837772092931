"""`trimix serve`: the batch engine behind HTTP, with OpenAI's API."""
