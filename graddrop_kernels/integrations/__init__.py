"""Adapters to other training loops. Each module imports its own package only."""
