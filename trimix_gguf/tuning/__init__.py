"""From raw text to what is known of a trio: how well each mix answers."""
