"""Shows what an optimizer will do, as text and pictures."""
