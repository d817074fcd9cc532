"""Encoders, their tokenizers, and what goes into and comes out of them."""
