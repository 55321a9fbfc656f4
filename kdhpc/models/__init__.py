"""Language models: loading, a Llama in plain torch, tokenizers, devices and sizes."""
