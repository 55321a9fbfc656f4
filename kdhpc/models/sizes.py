"""Parameters, arithmetic and memory of a model, from its shape alone: for plans and estimates."""

from dataclasses import dataclass

from kdhpc.config.model import Shape, Training

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def num_parameters(shape: Shape, vocab_size: int) -> int:
    """Parameters of a Llama model with tied embeddings."""
    return vocab_size * shape.hidden + shape.layers * _layer_parameters(shape) + shape.hidden


def _layer_parameters(shape: Shape) -> int:
    head_size = shape.hidden // shape.heads
    attention = shape.hidden * head_size * (2 * shape.heads + 2 * shape.kv_heads)
    return attention + 3 * shape.hidden * shape.ffn + 2 * shape.hidden


def key_value_bytes(shape: Shape, dtype: str) -> float:
    """Bytes of the keys and values of one position, in all layers."""
    head_size = shape.hidden // shape.heads
    return 2.0 * NUM_BYTES[dtype] * shape.layers * head_size * shape.kv_heads


def forward_flops(shape: Shape, vocab_size: int, length: int) -> float:
    """Multiplications and additions of a forward pass for one token of a row of `length`.

    Two a weight, the head counted once, and causal attention.
    """
    attention = shape.layers * shape.hidden * length
    return 2.0 * (num_parameters(shape, vocab_size) + attention)


def training_flops(shape: Shape, vocab_size: int, length: int) -> float:
    """Operations of forward and backward for one token: backward takes twice as many as forward.

    What activation checkpointing computes twice counts once.
    """
    return 3.0 * forward_flops(shape, vocab_size, length)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on each rank; fullest at the loss of the second micro-batch, or at the update."""

    weights: float
    gradients: float
    optimizer: float
    """Float32 weights and AdamW's two moments."""
    activations: float
    """What the layers keep for the backward pass."""
    head: float
    """Logits of `head_tokens` positions, and the gradients that are made from them."""
    buckets: float
    """In which gradients are reduced over ranks."""
    update: float
    """This rank's gradients in one piece, and in float32, while activations are gone."""

    @property
    def total(self) -> float:
        states = self.weights + self.gradients + self.optimizer + self.buckets
        return states + max(self.activations + self.head, self.update)


BUCKET = 5 * 10**7
"""Elements that DeepSpeed reduces or gathers at once."""


def training_memory(
    shape: Shape, recipe: Training, *, vocab_size: int, length: int
) -> TrainingMemory:
    """What one rank holds in training; ZeRO spreads it over the recipe's ranks.

    Activations are counted tensor by tensor for transformers' Llama (`docs/training.md`).
    """
    size = NUM_BYTES[recipe.dtype]
    parameters, ranks = num_parameters(shape, vocab_size), recipe.world_size
    tokens = recipe.micro_batch * length
    kv = shape.hidden // shape.heads * shape.kv_heads
    norms = 2 * shape.hidden * (2 * size + 4)  # input in float32, what is scaled, output
    attention = size * (3 * shape.hidden + 2 * kv)
    layer = norms + attention + size * 4 * shape.ffn
    chunk = min(recipe.head_tokens, tokens)
    head_sums = 0 if chunk == tokens else 4 * vocab_size * shape.hidden

    def over(stage: int) -> int:
        return ranks if recipe.zero_stage >= stage else 1

    return TrainingMemory(
        weights=size * parameters / over(3),
        gradients=size * parameters / over(2),
        optimizer=(8.0 if recipe.zero_stage == 0 else 12.0) * parameters / over(1),
        activations=tokens
        * (
            layer + shape.layers * size * shape.hidden
            if recipe.activation_checkpointing
            else shape.layers * layer
        ),
        head=8.0 * chunk * vocab_size + head_sums + size * (vocab_size + tokens) * shape.hidden,
        update=0.0
        if recipe.zero_stage == 0
        else (4.0 + (size if size < 4 else 0)) * parameters / over(1),
        buckets=0.0 if recipe.zero_stage == 0 else 2.0 * size * min(BUCKET, parameters),
    )


@dataclass(frozen=True, kw_only=True)
class SamplingMemory:
    """What sampling holds: weights, keys and values, and what a step makes of its logits."""

    shape: Shape
    vocab_size: int
    length: int
    """Tokens of a sequence."""
    dtype: str
    on_gpu: bool

    def of(self, rows: int) -> float:
        """Bytes with so many rows in a batch.

        On CPUs the head is there in float32 too. A GPU has the room for logits twice: of eager
        steps, and of graphs.
        """
        weights = NUM_BYTES[self.dtype] * num_parameters(self.shape, self.vocab_size)
        head = 0 if self.on_gpu else 4 * self.vocab_size * self.shape.hidden
        return weights + head + rows * self._of_row()

    def most_rows(self, num_bytes: float) -> int:
        """Rows that fit, 0 if the weights alone do not."""
        return max(0, int((num_bytes - self.of(0)) // self._of_row()))

    def _of_row(self) -> float:
        keys = key_value_bytes(self.shape, self.dtype) * self.length
        logits = (32.0 if self.on_gpu else 16.0) * self.vocab_size  # probabilities, both for tau
        return keys + logits + 64.0 * self.shape.ffn
