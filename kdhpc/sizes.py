"""Parameters, arithmetic and memory of a model, from its shape alone: for plans and estimates."""

from dataclasses import dataclass

from kdhpc.config import Shape

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def num_parameters(shape: Shape, vocab_size: int) -> int:
    """Parameters of a Llama model with tied embeddings."""
    return vocab_size * shape.hidden + shape.layers * _layer_parameters(shape) + shape.hidden


def _layer_parameters(shape: Shape) -> int:
    head_size = shape.hidden // shape.heads
    attention = shape.hidden * head_size * (2 * shape.heads + 2 * shape.kv_heads)
    return attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden


def training_flops(shape: Shape, vocab_size: int, length: int) -> float:
    """Multiplications and additions of forward and backward for one token of a row of `length`.

    Six a weight, the head counted once, and causal attention; what activation checkpointing
    computes twice counts once.
    """
    attention = shape.layers * shape.hidden * length
    return 6.0 * (num_parameters(shape, vocab_size) + attention)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each rank at the end of the first backward pass, where memory is fullest."""

    weights: float
    gradients: float
    optimizer: float
    """Float32 weights and AdamW's two moments."""
    activations: float
    head: float
    """Logits of `head_tokens` positions and the gradient of the head."""

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.head
