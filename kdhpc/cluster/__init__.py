"""The batch system: everything that knows Slurm, for any tuple of stages.

Read `advance.py` first: its one function moves a run on, and everything else calls it.
"""
