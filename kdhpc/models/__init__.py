"""Language models: loading, Llama in plain torch, tokenizers, devices, sizes."""
