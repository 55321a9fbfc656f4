"""Small models whose weights are so large that their distributions are far from uniform."""

import torch
from transformers import PreTrainedModel

from kdhpc.config.model import Shape
from kdhpc.models.dense import Dense
from kdhpc.models.huggingface import new_model

SHAPE = Shape(layers=2, hidden=64, heads=2, kv_heads=1, ffn=48, init_std=0.2)


def small_model(
    vocab_size: int, length: int, seed: int = 0, shape: Shape = SHAPE
) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = new_model(shape, vocab_size=vocab_size, length=length, eos=0, seed=seed)
    return model.eval().requires_grad_(False)


def llama_of(model: PreTrainedModel) -> Dense:
    """Return the weights of a model as a Llama of kdhpc."""
    weights = model.state_dict()
    return Dense(
        model.config.to_dict(), weights.__getitem__, dtype=model.dtype, device=model.device
    )
