"""Masks on the gradients of any optimizer: attach_mask()."""
