"""The batch system: all that knows Slurm, for any tuple of stages.

Read `advance.py` first: one function moves a run, and everybody calls it.
"""
