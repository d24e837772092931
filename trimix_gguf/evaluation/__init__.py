"""Tasks, metrics, and the runner that compares methods on them."""
