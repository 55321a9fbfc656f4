"""The run folder and its files: published once, sealed, verified. Knows no stage."""
