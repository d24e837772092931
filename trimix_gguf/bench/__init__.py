"""How fast a trio is on this machine, and where the time goes."""
