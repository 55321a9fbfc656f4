"""Everything that can be chosen: frozen dataclasses, one docstring a field, bounds in the types.

YAML in `configs/` holds choices only; `kdhpc.compose` merges it into these classes. A field's type
says what its value may be alone; what several values must be together stands in the functions
named `..._problems`, below the classes that they check.
"""

import math
import operator
import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Interval, Le, Lt

from kdhpc.errors import InputError
from kdhpc.selection import Selection

# Bounds: what a value may be, as part of its type, and the one function that checks it.


@dataclass(frozen=True)
class Pattern(BaseMetadata):
    """Marks a text that has to match as a whole."""

    expression: str
    """A regular expression."""
    meaning: str
    """What it lets through, to follow "expected"."""


Count = Annotated[int, Ge(1)]
"""At least one."""
AtLeastTwo = Annotated[int, Ge(2)]
"""At least two: one alone would leave nothing to run, predict or fit."""
Whole = Annotated[int, Ge(0)]
"""A number of things of which there may be none."""
Positive = Annotated[float, Gt(0)]
"""More than 0."""
NotNegative = Annotated[float, Ge(0)]
"""0 or more."""
Fraction = Annotated[float, Interval(ge=0, le=1)]
"""Part of a whole: none of it, all of it, or between."""
DecayRate = Annotated[float, Interval(ge=0, lt=1)]
"""What a moving average keeps of itself; with all of it, nothing new would ever count."""
ZeroStage = Annotated[int, Interval(ge=0, le=3)]
"""One of DeepSpeed's ZeRO stages."""
Word = Annotated[str, Pattern(r"[^\s\"'\\]+", "a word without spaces, quotes or backslashes")]
"""Text that stands as it is in a line of the batch script."""


def out_of_bounds(value: object, hint: object, key: str = "") -> Iterator[str]:
    """A line for every value that its type forbids: its key, the value, what is expected.

    Args:
        value: a config, or a part of one.
        hint: its type. Of a config, only the fields that this class knows are looked at.
        key: where the value stands in the config; nothing for a whole config.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for name in (known.name for known in fields(hint)):
            there = f"{key}.{name}" if key else name
            yield from out_of_bounds(getattr(value, name), hints[name], there)
    elif get_origin(hint) in {Union, types.UnionType}:
        for kind in get_args(hint) if value is not None else ():
            yield from out_of_bounds(value, kind, key)
    elif get_origin(hint) is dict and isinstance(value, dict):
        for name, item in value.items():
            yield from out_of_bounds(item, get_args(hint)[1], f"{key}.{name}")
    elif get_origin(hint) is tuple and isinstance(value, tuple):
        yield from _items_out_of_bounds(value, get_args(hint), key)
    elif expected := _unmet(value, hint):
        shown = repr(value) if isinstance(value, str) else value
        yield f"{key}={shown}: expected {expected}"


def _items_out_of_bounds(
    items: tuple[object, ...], hints: tuple[object, ...], key: str
) -> Iterator[str]:
    """The same for a tuple, whose items have no keys of their own."""
    if Ellipsis in hints:
        hints = hints[:1] * len(items)
    for item, hint in zip(items, hints, strict=True):
        if expected := _unmet(item, hint):
            yield f"{key}={list(items)}: expected every item to be {expected}, got {item}"


def _unmet(value: object, hint: object) -> str:
    """What the marks of a type demand, if the value does not meet all of it; else nothing."""
    if get_origin(hint) is not Annotated:
        return ""
    judged = [_judged(value, mark) for mark in _single(get_args(hint)[1:])]
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and all(met for met, _ in judged):
        return ""
    return " and ".join([*(words for _, words in judged), *([] if finite else ["finite"])])


def _single(marks: Iterable[object]) -> Iterator[object]:
    """Every mark by itself: an interval is two."""
    for mark in marks:
        if isinstance(mark, GroupedMetadata):
            yield from mark
        else:
            yield mark


def _judged(value: object, mark: object) -> tuple[bool, str]:
    """Whether a value meets a mark, and what the mark demands, in words."""
    if isinstance(mark, Pattern) and isinstance(value, str):
        return re.fullmatch(mark.expression, value) is not None, mark.meaning
    if isinstance(value, int | float):
        match mark:
            case Ge(low):
                return operator.ge(value, low), f"at least {low}"
            case Gt(low):
                return operator.gt(value, low), f"more than {low}"
            case Le(high):
                return operator.le(value, high), f"at most {high}"
            case Lt(high):
                return operator.lt(value, high), f"less than {high}"
    raise TypeError(f"{mark!r}: no check knows what this demands of {value!r}")


def list_problems(name: str, values: tuple[float, ...], example: str) -> Iterator[str]:
    """What is wrong with a list of temperatures or sharpenings as a whole."""
    if not values:
        yield f"{name}s=[]: expected at least one {name}, such as {name}s={example}"
    for value in repeated(f"{value:g}" for value in values):
        yield f"{name}s={list(values)}: duplicate {name} {value}"


def name_problems(key: str, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with names that become parts of file names."""
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():
            yield f"{key}.{name}: expected a name of letters, digits, - and _"


def repeated(names: Iterable[str]) -> list[str]:
    """Names that come more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def refuse(problems: Iterable[str]) -> None:
    """Refuse a config for the first of its problems, if it has any.

    Raises:
        InputError: which is that line.
    """
    for problem in problems:
        raise InputError(problem)


# Models: architecture and recipe.

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


# Runs: what every run has, and the cluster.


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What one task of a stage asks of Slurm; what is not given comes from `slurm` itself."""

    partition: Word | None = None
    """Partition."""
    time_min: Count | None = None
    """Time limit in minutes."""
    mem_gb: Positive | None = None
    """Memory a node."""
    cpus_per_task: Count | None = None
    """Cores a process."""
    gpus_per_node: Whole | None = None
    """GPUs a node."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Your cluster. Nothing here changes results, so all of it may change between two launches."""

    account: Word | None = None
    """Account to charge."""
    partition: Word | None = None
    """Partition; Slurm's default if not given."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Node features."""
    exclude: Word | None = None
    """Nodes to avoid."""
    time_min: Count = 60
    """Time limit of a task in minutes."""
    mem_gb: Positive = 4.0
    """Memory a node."""
    cpus_per_task: Count = 1
    """Cores a process; at least `threads`."""
    gpus_per_node: Whole = 0
    """GPUs a node for stages that use a device."""
    gpu_mem_gb: Positive | None = None
    """Memory of one GPU; --dry-run then says which `sampling.batch_rows` fits."""
    stages: dict[str, StageResources] = field(default_factory=dict)
    """By stage name, what differs from the above."""
    gate: StageResources = field(default_factory=lambda: StageResources(time_min=10, mem_gb=1.0))
    """The small job after each array that submits what has become ready."""
    max_parallel: Count = 64
    """Tasks of one array that run at once."""
    max_array: Count | None = None
    """Tasks of one array; the cluster's MaxArraySize if not given."""
    max_mem_gb: Positive | None = None
    """Memory that a shard that ran out of it may be given at most; no limit if not given."""
    max_submit: AtLeastTwo | None = None
    """Jobs of this run in the queue, array tasks counted singly: at least a task and its gate; no
    limit if not given."""
    task_min: Positive = 10.0
    """Work packed into one task, in minutes, by measured or estimated speed."""
    canary: Whole = 2
    """Tasks of a large stage that are tried first; if they fail alike, the rest is not started."""
    max_attempts: Count = 3
    """Failed attempts of a shard before it waits for `rerun.py`."""
    signal_s: Whole = 60
    """Seconds before the time limit at which a task is told to stop."""
    setup: tuple[str, ...] = ()
    """Shell lines before the work: modules, conda."""
    prefix: tuple[str, ...] = ()
    """Words before the command, such as [apptainer, exec, --nv, image.sif]."""
    scratch: str | None = None
    """Node-local folder for copies of models and just-in-time caches; if not given, models are read
    where they are and caches go to the system's temporary folder."""
    advance_from: Literal["gate", "login"] = "gate"
    """`login` where compute nodes may not submit: keep `sweep.py --watch` running there instead."""
    mail_user: str | None = None
    """Address for a mail when the run ends or stops."""
    on_end: str | None = None
    """Program called with (run folder, `complete` or `stopped`) when the run ends or stops."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has, whatever its pipeline."""

    pipeline: str = "language"
    """`language`, `mixture`, or `module:NAME` of a `Pipeline` elsewhere."""
    name: str = "run"
    """Folder of the run inside `runs_dir`."""
    seed: int = 0
    """Of all random numbers of the run."""
    runs_dir: str = "runs"
    """Where runs are kept; on a cluster, a file system that all nodes share."""
    cluster: str = "auto"
    """`local`, `slurm`, a name in configs/cluster/, or `auto`: Slurm where `sbatch` works."""
    executor: Literal["auto", "local", "slurm"] = "auto"
    """What runs the tasks; set by the cluster's YAML."""
    small: bool = False
    """Whether the run may start on this machine by itself where there is no Slurm."""
    local_workers: Whole = 0
    """Tasks at once on this machine; 0 means one a core."""
    threads: Count = 1
    """Threads a process, under every executor. Part of the result: sums round differently."""
    device: Device = "auto"
    """Where models run; `auto` takes a GPU if the task sees one."""
    slurm: Slurm = field(default_factory=Slurm)
    """Your cluster."""


MAX_NAME_BYTES = 200
"""Of a run's folder: 255 for a file name, less what is added in the queue."""


def run_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with what every run has."""
    yield from out_of_bounds(config, RunConfig)
    name = config.name
    if not name or name in {".", ".."} or "/" in name or "\0" in name or name.startswith("-"):
        yield (
            f"name={name!r}: expected the name of one folder inside {config.runs_dir}, without '/'"
        )
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        yield f"name={name!r}: expected at most {MAX_NAME_BYTES} bytes"


def check_run(config: RunConfig) -> None:
    """Check what every run has.

    Raises:
        InputError: naming the key, its value, what is expected.
    """
    refuse(run_problems(config))


# The language-model experiment.


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The ground-truth model p*."""

    model: str = "train"
    """`train` (a small model trained in the run), a Hugging Face folder or hub id, a `.gguf` file
    or `package:NAME/FILE` for a file that an installed Python package ships."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    corpus: str = "python-docs"
    """Text for `model: train`: `python-docs` (the documentation inside the installed Python), a
    `.txt`, `.jsonl` or `.parquet` file, or a hub id of a data set."""
    text_column: str = "text"
    """Column of the corpus that holds the text."""
    tokenizer: str = "model"
    """`bytes` (for `model: train`), `model` (the one that comes with it), or a folder with a
    tokenizer.json, which must then equal the model's."""
    shape: Shape | None = None
    """Architecture for `model: train`."""
    training: Training | None = None
    """Recipe for `model: train`."""
    dtype: Dtype = "float32"
    """In which p* is stored and sampled."""
    fingerprint: str = ""
    """Identity of the model or corpus (sha256 or commit); filled in when a run is submitted."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How sequences are drawn."""

    train_sequences: Count
    """Sequences in D and in every D'_tau."""
    eval_sequences: Count
    """Sequences in every evaluation set."""
    shard_sequences: Count
    """Sequences a shard, a multiple of `batch_rows`: the unit of loss (aim at 2-10 minutes)."""
    batch_rows: Count = 64
    """Rows decoded together. Part of the result: another batch shape rounds differently."""
    draw: Literal["inverse_cdf", "gumbel"] = "inverse_cdf"
    """Exact draws both: `inverse_cdf` uses one uniform a token and is fastest; `gumbel` uses one a
    vocabulary entry and keeps ids comparable across kernels."""
    engine: Literal["torch", "native"] = "torch"
    """`native` uses the extension for CPUs that `make native` builds; where it cannot be used,
    plain torch does the work and says so. Part of the result: it rounds differently."""
    truncations: tuple[str, ...] = ()
    """Further selective teachers beside the taus, at temperature 1: `top_k=50`, `top_p=0.9`."""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How samples are scored."""

    shard_sequences: Count
    """Sequences a shard."""
    batch_rows: Count = 64
    """Rows scored together; sets memory."""
    head_tokens: Count = 4096
    """Positions whose logits over the whole vocabulary are in memory at once."""
    dtype: Dtype = "float32"
    """Of the model's body; logits and log-softmax are always float32."""
    engine: Literal["torch", "native"] = "torch"
    """`native` takes bfloat16 logits on CPUs by the extension that `make native` builds."""
    per_token: bool = False
    """Keep the log-probability of every token too (4 bytes each)."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """The language-model experiment."""

    seeds: Count = 1
    """Teachers, each with its own students; a student of seed s uses the teacher of seed s."""
    taus: tuple[Positive, ...]
    """Temperatures at which the teacher is sampled."""
    prompt: str = "The"
    """Start of every sequence; never scored."""
    length: AtLeastTwo
    """Tokens of a sequence, the prompt included: at least one of the prompt and one drawn."""
    eos: Literal["learn", "mask"] = "learn"
    """Whether the end-of-sequence token is trained and scored, or neither."""
    truth: Truth
    """p*."""
    sampling: Sampling
    """Corpora and evaluation sets."""
    teacher: Model
    """p'."""
    students: dict[str, Model]
    """p'' by size name."""
    scoring: Scoring
    """Likelihoods."""
    tensorboard: bool = False
    """Write TensorBoard events beside each training's log; needs kdhpc[tensorboard]."""
    throughput: dict[str, Positive] = field(default_factory=dict)
    """By stage name, tokens a second a rank, for estimates; measured speeds replace them."""


TOKENS_PER_S = 20000.0
"""Estimate where `throughput` names no stage: a toy model on one core."""


def tokens_per_s(config: LanguageConfig, stage: str) -> float:
    """Estimated speed of one rank in a stage."""
    return config.throughput.get(stage, TOKENS_PER_S)


def models(config: LanguageConfig) -> dict[str, Model]:
    """Every model that the run trains, by its key in the config."""
    found = {"teacher": config.teacher}
    found |= {f"students.{size}": model for size, model in config.students.items()}
    truth = config.truth
    if truth.model == "train" and truth.shape is not None and truth.training is not None:
        found = {"truth": Model(shape=truth.shape, training=truth.training)} | found
    return found


def language_problems(config: LanguageConfig) -> Iterator[str]:
    """What is wrong with a language experiment whose values are within their bounds."""
    yield from list_problems("tau", config.taus, "[1.0,0.8]")
    yield from _sampling_problems(config.sampling)
    yield from _truth_problems(config.truth)
    yield from _prompt_problems(config)
    if not config.students:
        yield "students={}: expected at least one size"
    yield from name_problems("students", config.students)
    for key, model in models(config).items():
        num_sequences = None if key == "truth" else config.sampling.train_sequences
        yield from model_problems(key, model, device=config.device, num_sequences=num_sequences)


def _prompt_problems(config: LanguageConfig) -> Iterator[str]:
    prompt, length = config.prompt, config.length
    if not prompt:
        yield "prompt='': expected at least one token to start from"
    if config.truth.tokenizer == "bytes" and len(prompt.encode()) >= length:
        yield f"prompt={prompt!r}: expected fewer than length={length} tokens"


def _sampling_problems(sampling: Sampling) -> Iterator[str]:
    if sampling.shard_sequences % sampling.batch_rows:
        yield (
            f"sampling.shard_sequences={sampling.shard_sequences}: expected a multiple of "
            f"sampling.batch_rows={sampling.batch_rows}, so that shards do not change the batches"
        )
    given = f"sampling.truncations={list(sampling.truncations)}"
    for text in sampling.truncations:
        try:
            Selection.parse(text)
        except InputError as error:
            yield f"{given}: {error}"
    for text in repeated(sampling.truncations):
        yield f"{given}: duplicate {text}"


def _truth_problems(truth: Truth) -> Iterator[str]:
    if truth.model == "train":
        if truth.shape is None or truth.training is None:
            yield "truth.model=train: expected truth.shape and truth.training too"
        if truth.tokenizer != "bytes":
            yield (
                f"truth.tokenizer={truth.tokenizer}: truth.model=train trains on bytes; "
                "expected truth.tokenizer=bytes"
            )
    elif truth.tokenizer == "bytes":
        yield (
            f"truth.tokenizer=bytes: differs from the tokenizer of {truth.model}, which the "
            "students share; expected truth.tokenizer=model"
        )


# The mixture simulation.


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of the mixture simulation; the defaults are the paper's."""

    truth: Literal["grid", "fitted_grid", "random"] = "grid"
    """p*: `grid` (eight modes in the plane, exactly), `fitted_grid` (an EM fit to points of that
    grid, as in the released code), or `random` (`modes` of them in `dimension` dimensions)."""
    modes: Count = 8
    """Modes of p*; the grid has 8."""
    dimension: Count = 2
    """Of the points; the grid has 2."""
    fit_points: Count = 50000
    """Points that `truth: fitted_grid` is fitted to."""
    train_points: AtLeastTwo = 100
    """Points in D."""
    distill_points: AtLeastTwo = 1000
    """Points in every D'."""
    teacher_components: Count = 4
    """K', components of the teacher."""
    student_components: Count = 1
    """K'', components of the students, the direct one too."""
    teacher_covariance: Literal["diagonal", "full"] = "diagonal"
    """Shape of the teacher's components."""
    student_covariance: Literal["diagonal", "full"] = "diagonal"
    """Shape of the students' components."""
    em_starts: Count = 10
    """Runs of EM a fit, of which the likeliest is taken; one is quicker and finds worse fits."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(RunConfig):
    """The mixture-of-Gaussians simulation."""

    settings: dict[str, Setting]
    """What is simulated, by name."""
    seeds: Count
    """Repetitions of every setting, each with its own D, teacher and students."""
    shard_seeds: Count = 20
    """Repetitions a shard. Seeds added in multiples of it repeat none."""
    betas: tuple[Positive, ...]
    """Sharpenings of the teacher's weights; the direct student is always there too."""
    eval_points: AtLeastTwo = 20000
    """Fresh points for every expectation that has no closed form."""


def mixture_problems(config: MixtureConfig) -> Iterator[str]:
    """What is wrong with a mixture simulation whose values are within their bounds."""
    yield from list_problems("beta", config.betas, "[1,100]")
    if not config.settings:
        yield "settings={}: expected at least one, such as settings.paper.train_points=100"
    yield from name_problems("settings", config.settings)
    for name, setting in config.settings.items():
        yield from _setting_problems(f"settings.{name}", setting)


def _setting_problems(key: str, setting: Setting) -> Iterator[str]:
    if setting.truth != "random":
        for name, value, there in (
            ("modes", setting.modes, 8),
            ("dimension", setting.dimension, 2),
        ):
            if value != there:
                yield (
                    f"{key}.{name}={value}: truth={setting.truth} has {there}; expected that, or "
                    "truth=random"
                )
    student = setting.student_components
    most = max(setting.teacher_components, student)
    for name, points, components in (
        ("train_points", setting.train_points, most),
        ("distill_points", setting.distill_points, student),
    ):
        if points < components:
            yield f"{key}.{name}={points}: expected at least {components}, one for each component"
    if setting.fit_points % setting.modes:
        yield (
            f"{key}.fit_points={setting.fit_points}: expected a multiple of the "
            f"{setting.modes} modes, so that each has as many"
        )
