"""One file a stage: what it reads and writes, its plan, its run."""
