"""Methods compared on labelled tasks; ARCHITECTURE.md draws the rooms."""
