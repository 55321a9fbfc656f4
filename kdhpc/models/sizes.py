"""Parameters, arithmetic and memory of a model, computed from its sizes for plans and estimates."""

from dataclasses import dataclass

from kdhpc.config.model import Shape, Sizes, Training

NUM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def sizes_of_shape(shape: Shape) -> Sizes:
    """Return the sizes of a Llama with tied embeddings."""
    hidden, key_values = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    of_layer = 2 * hidden * (hidden + key_values) + 3 * hidden * shape.ffn + 2 * hidden
    return Sizes(
        layers=shape.layers,
        hidden=hidden,
        attention=hidden,
        key_values=key_values,
        ffn=shape.ffn,
        parameters=shape.layers * of_layer + hidden,
        parameters_per_id=hidden,
    )


def num_parameters(sizes: Sizes, vocab_size: int) -> int:
    return sizes.parameters + vocab_size * sizes.parameters_per_id


def key_value_bytes(sizes: Sizes, dtype: str) -> float:
    """Return the bytes of the keys and values of one position in all layers."""
    return 2.0 * NUM_BYTES[dtype] * sizes.layers * sizes.key_values


def forward_flops(sizes: Sizes, vocab_size: int, length: int) -> float:
    """Return the multiplications and additions of a forward pass per token of a row of `length`.

    There are two for each weight, the embedding not counted and the head once, and those of causal
    attention. All experts of a mixture of experts are counted.
    """
    attention = sizes.layers * sizes.attention * length
    return 2.0 * (sizes.parameters + vocab_size * sizes.hidden + attention)


def training_flops(sizes: Sizes, vocab_size: int, length: int) -> float:
    """Return the operations of a forward and a backward pass per token of a row of `length`.

    The backward pass takes twice as many as the forward pass. What activation checkpointing
    recomputes is counted once.
    """
    return 3.0 * forward_flops(sizes, vocab_size, length)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory of each rank in bytes, by what it is used for."""

    weights: float
    gradients: float
    optimizer: float
    """Float32 weights and AdamW's two moments."""
    activations: float
    """Tensors that the layers keep for the backward pass."""
    head: float
    """Logits of `head_tokens` positions, and the gradients that are computed from them."""
    buckets: float
    """Buffers in which gradients are reduced over ranks."""
    update: float
    """Copy of this rank's gradients during the update, in one piece. Activations are freed by
    then."""

    @property
    def total(self) -> float:
        """The maximum, which is reached in the loss of the second micro-batch or in the update."""
        states = self.weights + self.gradients + self.optimizer + self.buckets
        return states + max(self.activations + self.head, self.update)


BUCKET = 5 * 10**7
"""Number of elements that DeepSpeed reduces or gathers at once."""


def training_memory(
    sizes: Sizes, settings: Training, *, vocab_size: int, length: int
) -> TrainingMemory:
    """Return the memory of one rank in training; ZeRO spreads parts of it over the ranks.

    Activations are counted tensor by tensor for transformers' Llama (`docs/training.md`).
    """
    size = NUM_BYTES[settings.dtype]
    parameters, ranks = num_parameters(sizes, vocab_size), settings.world_size
    tokens, hidden = settings.micro_batch * length, sizes.hidden
    norms = 2 * hidden * (2 * size + 4)  # the input in float32, the scaled input, the output
    attention = size * (hidden + 2 * sizes.attention + 2 * sizes.key_values)
    layer = norms + attention + size * 4 * sizes.ffn
    chunk = min(settings.head_tokens, tokens)
    head_sums = 0 if chunk == tokens else 4 * vocab_size * hidden

    def shared_from(stage: int) -> int:
        """Return how many ranks share what ZeRO spreads from this stage on."""
        return ranks if settings.zero_stage >= stage else 1

    # Sums of 16-bit gradients are float32. In stage 1 they are whole on each rank and reduced in
    # place; in stages 2 and 3 a bucket is converted before it is reduced.
    is_short, stage = size < 4, settings.zero_stage
    sums_whole = is_short and stage == 1
    bucket = 2.0 * size + (4.0 if is_short else 0.0)
    return TrainingMemory(
        weights=size * parameters / shared_from(3),
        gradients=4.0 * parameters / shared_from(2),
        optimizer=(8.0 if settings.zero_stage == 0 else 12.0) * parameters / shared_from(1),
        activations=tokens
        * (
            layer + sizes.layers * size * hidden
            if settings.activation_checkpointing
            else sizes.layers * layer
        ),
        head=8.0 * chunk * vocab_size + head_sums + size * (vocab_size + tokens) * hidden,
        update=0.0 if stage == 0 or sums_whole else 4.0 * parameters / shared_from(1),
        buckets=0.0 if stage == 0 or sums_whole else bucket * min(BUCKET, parameters),
    )


@dataclass(frozen=True, kw_only=True)
class SamplingMemory:
    """Memory of sampling: weights, keys and values, logits and what a step computes from them."""

    sizes: Sizes
    vocab_size: int
    length: int
    """Number of tokens of a sequence."""
    dtype: str
    on_gpu: bool

    def of(self, rows: int) -> float:
        """Return the bytes that a batch of `rows` rows takes.

        On CPUs the head is also stored in float32. On GPUs the buffers for logits exist twice, for
        eager steps and for CUDA graphs.
        """
        weights = NUM_BYTES[self.dtype] * num_parameters(self.sizes, self.vocab_size)
        head = 0 if self.on_gpu else 4 * self.vocab_size * self.sizes.hidden
        return weights + head + rows * self._of_row()

    def most_rows(self, num_bytes: float) -> int:
        """Return the number of rows that fit into `num_bytes`; 0 if not even the weights fit."""
        return max(0, int((num_bytes - self.of(0)) // self._of_row()))

    def _of_row(self) -> float:
        keys = key_value_bytes(self.sizes, self.dtype) * self.length
        # Logits and probabilities in float32, both once more for tau.
        logits = (32.0 if self.on_gpu else 16.0) * self.vocab_size
        return keys + logits + 64.0 * self.sizes.ffn
