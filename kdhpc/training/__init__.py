"""Train models with DeepSpeed, resumably and independently of the number of ranks."""
