"""Draw sequences exactly from a language model."""
