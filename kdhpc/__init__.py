"""kdhpc: why does knowledge distillation work in generative models?"""

__version__ = "0.2.0"
