"""Config of the models that a run trains: architecture and training settings."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from kdhpc.config.bounds import Count, DecayRate, Fraction, NotNegative, Positive, Whole, ZeroStage

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Architecture of a Llama model.

    The vocabulary is always that of the truth, and the context is the config's `length`.
    """

    layers: Count
    """Number of transformer layers."""
    hidden: Count
    """Width of the residual stream."""
    heads: Count
    """Number of query heads. The head size is hidden / heads, which must be whole and even."""
    kv_heads: Count
    """Number of key and value heads; must divide `heads`."""
    ffn: Count
    """Width of the gated feed-forward layer."""
    rope_theta: Positive = 10000.0
    """Base of the rotary position embedding."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights."""


Architecture: TypeAlias = dict[str, Any]
"""Fields of a transformers config, `model_type` among them: an architecture of any family."""
Design: TypeAlias = Shape | Architecture
"""Architecture of a model with new weights, in its short form or its long one."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of an architecture decides parameters, arithmetic and memory."""

    layers: Count
    """Number of transformer layers."""
    hidden: Count
    """Width of the residual stream."""
    attention: Count
    """Width of all query heads together."""
    key_values: Count
    """Width of all key heads together, and of all value heads."""
    ffn: Count
    """Width of the feed-forward layer."""
    parameters: Count
    """Number of parameters, without those that grow with the vocabulary."""
    parameters_per_id: Count
    """Number of parameters that each id of the vocabulary adds."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained with DeepSpeed.

    The optimizer is AdamW; its rate warms up linearly, stays constant and decays linearly to zero.
    """

    learning_rate: Positive = 5e-4
    """Peak learning rate of AdamW."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Positive = 1e-6
    """Constant added to AdamW's denominator."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay of AdamW."""
    gradient_clip: NotNegative = 1.0
    """Global gradient norm above which gradients are scaled down to it; 0 disables clipping."""
    batch_sequences: Count = 64
    """Number of sequences in the global batch, whatever the number of ranks, which must divide
    it."""
    micro_batch_sequences: Count = 64
    """Largest number of sequences that a rank holds at once; it determines memory. Each rank cuts
    its share of the batch into the largest equal parts that fit and accumulates their gradients."""
    epochs: Positive = 5.0
    """Length of the learning-rate schedule, in passes over the data."""
    stop_after_epochs: Positive | None = None
    """Passes over the data after which training stops and the model is taken, without shortening
    the schedule; `epochs` if not given."""
    warmup_fraction: Fraction = 0.01
    """First part of the schedule, in which the learning rate rises linearly."""
    decay_fraction: Fraction = 0.2
    """Last part of the schedule, in which the learning rate falls linearly to zero."""
    dtype: Dtype = "float32"
    """Dtype of weights and activations. float16 needs a GPU and uses a static loss scale."""
    loss_scale: Positive = 1024.0
    """Static loss scale; used with float16 only."""
    zero_stage: ZeroStage = 1
    """DeepSpeed ZeRO stage: 0 spreads nothing over ranks (float32 only), 1 spreads the optimizer's
    states, 2 also gradients, 3 also weights."""
    nodes: Count = 1
    """Number of nodes that train one model together."""
    ranks_per_node: Count = 1
    """Number of processes per node, one for each GPU or CPU rank."""
    head_tokens: Count = 4096
    """Number of positions whose logits over the whole vocabulary are in memory at once."""
    activation_checkpointing: bool = False
    """Whether to keep only the input of each layer and to recompute the rest in the backward pass:
    this takes less memory and a third more arithmetic."""
    compile: bool = False
    """Whether to run layers and the loss through torch.compile: on GPUs whole layers, on CPUs their
    norms and feed-forward parts, which is a tenth faster and needs a C++ compiler."""
    checkpoint_every_steps: Whole = 0
    """Steps between checkpoints, from which a killed training resumes; 0 makes none."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints that are kept; the older ones are used if the newest is
    damaged."""
    keep_epochs: tuple[Positive, ...] = ()
    """Passes over the data after which a checkpoint is made and never pruned."""
    validate_every_steps: Whole = 0
    """Steps between measurements of the loss on truth's evaluation set; 0 makes none."""
    validation_sequences: Count = 512
    """Number of sequences of that set that are used, from its start."""
    max_gradient_norm: Positive = 1000.0
    """Gradient norm before clipping above which the training counts as diverged and stops."""

    @property
    def world_size(self) -> int:
        """Number of ranks that train together."""
        return self.nodes * self.ranks_per_node

    @property
    def micro_batch(self) -> int:
        """Number of sequences that a rank holds at once; it divides the rank's share evenly."""
        share = self.batch_sequences // self.world_size
        largest = min(share, self.micro_batch_sequences)
        return next(size for size in range(largest, 0, -1) if share % size == 0)

    @property
    def accumulation(self) -> int:
        """Number of micro-batches of each rank in one optimizer step."""
        return self.batch_sequences // (self.world_size * self.micro_batch)


LAYOUT = (
    "nodes", "ranks_per_node", "micro_batch_sequences", "zero_stage", "head_tokens",
    "activation_checkpointing", "compile",
)  # fmt: skip
"""Fields of `Training` that change how sums are rounded and nothing else. A stopped training may
resume with other values of them."""
WATCHING = (
    "checkpoint_every_steps", "keep_checkpoints", "keep_epochs", "validate_every_steps",
    "validation_sequences", "max_gradient_norm",
)  # fmt: skip
"""Fields of `Training` that do not change the weights at all."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A teacher or student: trained by the run, from new weights or from a finished model's."""

    model: str | None = None
    """Finished model to start from, in the form of `truth.model`; its tokenizer must have the ids
    of the truth's. The weights are new if it is not given."""
    revision: str = "main"
    """Branch, tag or commit to fetch if `model` is a hub id."""
    fingerprint: str = ""
    """Identity of `model`, as `truth.fingerprint`."""
    shape: Shape | None = None
    """Architecture of a model with new weights, if it is a Llama."""
    architecture: Architecture | None = None
    """The same for any family that transformers has: the fields of its config, and `model_type`.
    The others have transformers' defaults, or follow from the run."""
    training: Training | None = None
    """How the model is trained. A teacher with a `model` and without this is taken as it is."""
    fine_tuning: Training | None = None
    """How distilled students of this size are trained on D'_tau if they start from the weights of
    the direct student, which has learnt D. None trains them as `training` says, from where the
    direct student started too."""
    labels: Literal["hard", "soft"] = "hard"
    """What distilled students of this size learn from D'_tau: its tokens, or `soft`, the teacher's
    whole distribution at tau after each of them. Direct students learn the tokens of D."""
    train_sequences: Count | None = None
    """Number of sequences that the model is trained on, the first ones of its data; all of
    `sampling.train_sequences` if not given."""
    dtype: Dtype = "float32"
    """Dtype in which a teacher that is taken as it is is stored and sampled."""

    @property
    def sampled_dtype(self) -> Dtype:
        """Dtype in which the finished model is stored and sampled."""
        return self.training.dtype if self.training else self.dtype

    @property
    def design(self) -> Design | None:
        """Architecture of a model with new weights, in either form; None if neither is given."""
        return self.shape or self.architecture


def model_problems(
    key: str, model: Model, *, device: Device, num_sequences: int | None
) -> Iterator[str]:
    """Yield what is wrong with a model whose values are within their bounds.

    Args:
        key: dotted path of the model in the config.
        model: the model.
        device: device that the model is trained on.
        num_sequences: number of sequences that there are to train on; None if it is not known.
    """
    yield from _design_problems(key, model)
    if model.labels == "soft" and not key.startswith("students."):
        yield f"{key}.labels=soft: expected hard; only students have a teacher"
    training = model.training
    if training is None:
        if model.model is None:
            yield f"{key}.training: expected settings, because its weights are new"
        elif key != "teacher":
            yield f"{key}.training: expected settings; only a teacher is taken as it is"
        return
    for name in ("model", "architecture") if training.compile else ():
        if getattr(model, name):
            yield f"{key}.training.compile=true: expected false, because it has {key}.{name}"
    yield from _training_problems(f"{key}.training", training, model, device, num_sequences)
    if (fine_tuning := model.fine_tuning) is not None:
        if not key.startswith("students."):
            yield f"{key}.fine_tuning: expected null; only distilled students are fine-tuned"
        if fine_tuning.compile:
            yield (
                f"{key}.fine_tuning.compile=true: expected false, because it starts from the "
                "direct student"
            )
        yield from _training_problems(
            f"{key}.fine_tuning", fine_tuning, model, device, num_sequences
        )
    if num_sequences is not None and (model.train_sequences or 0) > num_sequences:
        yield (
            f"{key}.train_sequences={model.train_sequences}: expected at most "
            f"sampling.train_sequences={num_sequences}"
        )


def _training_problems(
    key: str, training: Training, model: Model, device: Device, num_sequences: int | None
) -> Iterator[str]:
    """Yield what is wrong with one training of a model."""
    yield from _schedule_problems(key, training)
    yield from _layout_problems(key, training, device)
    used, name = model.train_sequences or num_sequences, "sampling.train_sequences"
    if num_sequences is None or used is None:
        return
    if model.train_sequences:
        name = f"{key.rpartition('.')[0]}.train_sequences"
    if training.batch_sequences > used:
        yield (f"{key}.batch_sequences={training.batch_sequences}: expected at most {name}={used}")


def _design_problems(key: str, model: Model) -> Iterator[str]:
    """Yield what is wrong with the architecture, as far as it shows without transformers."""
    if model.model is None and not model.design:
        yield (
            f"{key}.shape: expected an architecture, as {key}.shape or {key}.architecture, or "
            f"{key}.model to start from"
        )
    if model.shape is not None:
        yield from _shape_problems(f"{key}.shape", model.shape)
        if model.architecture is not None:
            yield f"{key}.architecture: expected null, or {key}.shape=null; a model has one of them"
    if model.architecture is not None and not isinstance(
        model_type := model.architecture.get("model_type"), str
    ):
        yield (
            f"{key}.architecture.model_type={model_type}: expected a type of transformers, such as "
            "qwen3"
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
    """Yield what is wrong with the epochs after which training stops or a checkpoint is kept."""
    epochs, stop, keep = training.epochs, training.stop_after_epochs, training.keep_epochs
    if stop is not None and stop > epochs:
        yield f"{key}.stop_after_epochs={stop}: expected at most epochs={epochs}"
    if any(epoch > epochs for epoch in keep):
        yield f"{key}.keep_epochs={list(keep)}: expected every item to be at most epochs={epochs}"


def _layout_problems(key: str, training: Training, device: Device) -> Iterator[str]:
    """Yield what is wrong with how a training is spread over ranks and held in memory."""
    if training.zero_stage == 0 and training.dtype != "float32":
        yield (
            f"{key}.zero_stage=0: expected 1, 2 or 3 with dtype={training.dtype} "
            "(with 16-bit dtypes DeepSpeed's stage 0 silently takes another optimizer)"
        )
    if training.zero_stage == 3 and training.compile:
        yield f"{key}.compile=true: expected zero_stage 0, 1 or 2, got 3"
    if training.dtype == "float16" and device == "cpu":
        yield f"{key}.dtype=float16: needs a GPU; expected bfloat16 or float32 on a CPU"
    if training.batch_sequences % training.world_size:
        yield (
            f"{key}.batch_sequences={training.batch_sequences}: expected a multiple of "
            f"its {training.world_size} ranks (nodes={training.nodes} times "
            f"ranks_per_node={training.ranks_per_node}), so that all get the same share"
        )
