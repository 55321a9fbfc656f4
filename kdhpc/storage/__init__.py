"""The run folder and its files: written once, sealed and verified. No module here knows a stage."""
