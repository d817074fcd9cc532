"""Encoders, their tokenizers, inputs and outputs."""
