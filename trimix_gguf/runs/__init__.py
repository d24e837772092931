"""`trimix run`: a file of requests to a file of answers."""
