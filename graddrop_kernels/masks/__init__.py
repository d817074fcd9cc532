"""Masks as plain numbers and bits: which elements are kept. Knows no policy, no group, no device."""
