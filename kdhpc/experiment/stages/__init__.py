"""One file for each stage: what it reads and writes, its plan, its run."""
