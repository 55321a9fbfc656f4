"""Models that are trained in a run: architecture and recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kdhpc.config.bounds import Count, DecayRate, Fraction, NotNegative, Positive, Whole, ZeroStage

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama model, without its vocabulary (always the truth's) and context (`length`)."""

    layers: Count
    """Number of transformer layers."""
    hidden: Count
    """Width of the residual stream."""
    heads: Count
    """Query heads; the head size is hidden / heads."""
    kv_heads: Count
    """Key and value heads; divides `heads`."""
    ffn: Count
    """Width of the gated feed-forward layer."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained: AdamW with warm-up, constant rate and linear decay, on DeepSpeed."""

    learning_rate: Positive = 5e-4
    """Peak rate of AdamW."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Positive = 1e-6
    """Added to AdamW's denominator."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    gradient_clip: NotNegative = 1.0
    """Largest global gradient norm; 0 leaves gradients alone."""
    batch_sequences: Count = 64
    """Global batch in sequences, whatever the number of ranks."""
    micro_batch_sequences: Count = 64
    """Sequences that a rank holds at once, at most; sets memory. A rank's share of the batch is cut
    into the largest equal parts that fit, and their gradients are accumulated."""
    epochs: Positive = 5.0
    """Length of the learning-rate schedule in passes over the data."""
    stop_after_epochs: Positive | None = None
    """Where in that schedule training stops and the model is taken; at its end if not given."""
    warmup_fraction: Fraction = 0.01
    """Part of the schedule with a linearly rising rate."""
    decay_fraction: Fraction = 0.2
    """Last part of the schedule, in which the rate falls linearly to zero."""
    dtype: Dtype = "float32"
    """Of weights and activations; float16 needs a GPU and uses a static loss scale."""
    loss_scale: Positive = 1024.0
    """Static loss scale, used with float16 only."""
    zero_stage: ZeroStage = 1
    """DeepSpeed ZeRO stage: 0 shards nothing (float32 only), 1 optimizer states, 2 also gradients,
    3 also weights."""
    nodes: Count = 1
    """Nodes that train together."""
    ranks_per_node: Count = 1
    """Processes a node, one a GPU (or CPU rank)."""
    head_tokens: Count = 4096
    """Positions whose logits over the whole vocabulary are in memory at once."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again backwards: less memory, a third more
    arithmetic."""
    compile: bool = False
    """Run norms and feed-forward layers through torch.compile: a tenth faster on CPUs, where it
    needs a C++ compiler."""
    checkpoint_every_steps: Whole = 0
    """Steps between checkpoints, from which a killed training goes on; 0 means none."""
    keep_checkpoints: Count = 2
    """Newest checkpoints that are kept; the older ones serve if the newest is damaged."""
    keep_epochs: tuple[Positive, ...] = ()
    """Passes over the data after which a checkpoint is made and kept for good."""
    validate_every_steps: Whole = 0
    """Steps between losses on truth's evaluation set; 0 means none."""
    validation_sequences: Count = 512
    """Sequences of that set that are used, from its start."""
    max_gradient_norm: Positive = 1000.0
    """A larger norm before clipping means that the training has exploded, and stops it."""

    @property
    def world_size(self) -> int:
        """Ranks that train together."""
        return self.nodes * self.ranks_per_node

    @property
    def micro_batch(self) -> int:
        """Sequences that a rank holds at once, so that all parts are equal."""
        share = self.batch_sequences // self.world_size
        most = min(share, self.micro_batch_sequences)
        return next(size for size in range(most, 0, -1) if share % size == 0)

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in one optimizer step."""
        return self.batch_sequences // (self.world_size * self.micro_batch)


LAYOUT = (
    "nodes", "ranks_per_node", "micro_batch_sequences", "zero_stage", "head_tokens",
    "activation_checkpointing", "compile",
)  # fmt: skip
"""Fields of `Training` that change how a sum is rounded and nothing else: a training that was
stopped goes on with others."""
WATCHING = (
    "checkpoint_every_steps", "keep_checkpoints", "keep_epochs", "validate_every_steps",
    "validation_sequences", "max_gradient_norm",
)  # fmt: skip
"""Fields of `Training` that change no weight at all."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model trained in the run: its architecture and recipe."""

    shape: Shape
    """Its architecture."""
    training: Training
    """Its recipe."""


def model_problems(
    key: str, model: Model, *, device: Device, num_sequences: int | None
) -> Iterator[str]:
    """What is wrong with a model whose values are within their bounds.

    Args:
        key: where it stands in the config.
        model: the model.
        device: what it is trained on.
        num_sequences: how many sequences it is trained on, if that is known.
    """
    training = model.training
    yield from _shape_problems(f"{key}.shape", model.shape)
    yield from _schedule_problems(f"{key}.training", training)
    yield from _layout_problems(f"{key}.training", training, device)
    if num_sequences is not None and training.batch_sequences > num_sequences:
        yield (
            f"{key}.training.batch_sequences={training.batch_sequences}: expected at most "
            f"sampling.train_sequences={num_sequences}"
        )


def _shape_problems(key: str, shape: Shape) -> Iterator[str]:
    if shape.hidden % shape.heads or (shape.hidden // shape.heads) % 2:
        yield (
            f"{key}.heads={shape.heads}: expected a head size, hidden={shape.hidden} over heads, "
            "that is whole and even"
        )
    if shape.heads % shape.kv_heads:
        yield f"{key}.kv_heads={shape.kv_heads}: expected a divisor of heads={shape.heads}"


def _schedule_problems(key: str, training: Training) -> Iterator[str]:
    """What is wrong with the points of the schedule at which something happens."""
    epochs, stop, keep = training.epochs, training.stop_after_epochs, training.keep_epochs
    if stop is not None and stop > epochs:
        yield f"{key}.stop_after_epochs={stop}: expected at most epochs={epochs}"
    if any(epoch > epochs for epoch in keep):
        yield f"{key}.keep_epochs={list(keep)}: expected every item to be at most epochs={epochs}"


def _layout_problems(key: str, training: Training, device: Device) -> Iterator[str]:
    """What is wrong with how a training is spread over ranks and held in memory."""
    if training.zero_stage == 0 and training.dtype != "float32":
        yield (
            f"{key}.zero_stage=0: expected 1, 2 or 3 with dtype={training.dtype} "
            "(DeepSpeed's stage 0 silently takes another optimizer there)"
        )
    if training.zero_stage == 3 and training.compile:
        yield f"{key}.compile=true: expected zero_stage 0, 1 or 2, got 3"
    if training.dtype == "float16" and device == "cpu":
        yield f"{key}.dtype=float16: needs a GPU; expected bfloat16 or float32 on a CPU"
    if training.batch_sequences % training.world_size:
        yield (
            f"{key}.batch_sequences={training.batch_sequences}: expected a multiple of "
            f"its {training.world_size} ranks (nodes={training.nodes} times "
            f"ranks_per_node={training.ranks_per_node})"
        )
