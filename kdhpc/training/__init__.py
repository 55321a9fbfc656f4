"""Models trained with DeepSpeed, resumable, the same for any number of ranks."""
