"""Small models with weights large enough that their distributions are far from uniform."""

import torch
from transformers import PreTrainedModel

from kdhpc.config import Shape
from kdhpc.models import new_model

SHAPE = Shape(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, init_std=0.3)


def small_model(vocab_size: int, length: int, seed: int = 0) -> PreTrainedModel:
    torch.set_num_threads(1)
    model = new_model(SHAPE, vocab_size=vocab_size, length=length, eos=0, seed=seed)
    return model.eval().requires_grad_(False)
