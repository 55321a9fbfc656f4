"""Sequences drawn exactly from a language model."""
