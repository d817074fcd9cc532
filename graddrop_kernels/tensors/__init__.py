"""Positions of elements in memory and among processes."""
