"""Makes parameter groups of a model; defines what a group holds and what it masks."""
