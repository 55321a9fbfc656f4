"""kdhpc: why does knowledge distillation work in generative models, on one machine or a Slurm cluster."""

__version__ = "0.1.0"
