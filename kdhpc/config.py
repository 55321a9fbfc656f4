"""Everything that can be chosen: frozen dataclasses, one docstring a field, checks in one place.

YAML in `configs/` holds choices only; `kdhpc.compose` merges it into these classes.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from kdhpc.errors import InputError

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama model, without its vocabulary (always the truth's) and context (`length`)."""

    layers: int
    """Number of transformer layers."""
    hidden: int
    """Width of the residual stream."""
    heads: int
    """Query heads; the head size is hidden / heads."""
    kv_heads: int
    """Key and value heads; divides `heads`."""
    ffn: int
    """Width of the gated feed-forward layer."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained: AdamW with warm-up, constant rate and linear decay, on DeepSpeed."""

    learning_rate: float = 5e-4
    """Peak rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-6
    """Added to AdamW's denominator."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    gradient_clip: float = 1.0
    """Largest global gradient norm; 0 leaves gradients alone."""
    batch_sequences: int = 64
    """Global batch in sequences, whatever the number of ranks."""
    micro_batch_sequences: int = 64
    """Sequences that a rank holds at once, at most; sets memory. A rank's share of the batch is cut
    into the largest equal parts that fit, and their gradients are accumulated."""
    epochs: float = 5.0
    """Length of the learning-rate schedule in passes over the data."""
    stop_after_epochs: float | None = None
    """Where in that schedule training stops and the model is taken; at its end if not given."""
    warmup_fraction: float = 0.01
    """Part of the schedule with a linearly rising rate."""
    decay_fraction: float = 0.2
    """Last part of the schedule, in which the rate falls linearly to zero."""
    dtype: Dtype = "float32"
    """Of weights and activations; float16 needs a GPU and uses a static loss scale."""
    loss_scale: float = 1024.0
    """Static loss scale, used with float16 only."""
    zero_stage: int = 1
    """DeepSpeed ZeRO stage: 0 shards nothing (float32 only), 1 optimizer states, 2 also gradients,
    3 also weights."""
    nodes: int = 1
    """Nodes that train together."""
    ranks_per_node: int = 1
    """Processes a node, one a GPU (or CPU rank)."""
    head_tokens: int = 4096
    """Positions whose logits over the whole vocabulary are in memory at once."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again backwards: less memory, a third more
    arithmetic."""
    compile: bool = False
    """Run norms and feed-forward layers through torch.compile: a tenth faster on CPUs, where it
    needs a C++ compiler."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints, from which a killed training goes on; 0 means none."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the older ones serve if the newest is damaged."""
    keep_epochs: tuple[float, ...] = ()
    """Passes over the data after which a checkpoint is made and kept for good."""
    validate_every_steps: int = 0
    """Steps between losses on truth's evaluation set; 0 means none."""
    validation_sequences: int = 512
    """Sequences of that set that are used, from its start."""
    max_gradient_norm: float = 1000.0
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
class Model:
    """A model trained in the run: its architecture and recipe."""

    shape: Shape
    """Its architecture."""
    training: Training
    """Its recipe."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How sequences are drawn."""

    train_sequences: int
    """Sequences in D and in every D'_tau."""
    eval_sequences: int
    """Sequences in every evaluation set."""
    shard_sequences: int
    """Sequences a shard, a multiple of `batch_rows`: the unit of loss (aim at 2-10 minutes)."""
    batch_rows: int = 64
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

    shard_sequences: int
    """Sequences a shard."""
    batch_rows: int = 64
    """Rows scored together; sets memory."""
    head_tokens: int = 4096
    """Positions whose logits over the whole vocabulary are in memory at once."""
    dtype: Dtype = "float32"
    """Of the model's body; logits and log-softmax are always float32."""
    engine: Literal["torch", "native"] = "torch"
    """`native` takes bfloat16 logits on CPUs by the extension that `make native` builds."""
    per_token: bool = False
    """Keep the log-probability of every token too (4 bytes each)."""


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What one task of a stage asks of Slurm; what is not given comes from `slurm` itself."""

    partition: str | None = None
    """Partition."""
    time_min: int | None = None
    """Time limit in minutes."""
    mem_gb: float | None = None
    """Memory a node."""
    cpus_per_task: int | None = None
    """Cores a process."""
    gpus_per_node: int | None = None
    """GPUs a node."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Your cluster. Nothing here changes results, so all of it may change between two launches."""

    account: str | None = None
    """Account to charge."""
    partition: str | None = None
    """Partition; Slurm's default if not given."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Node features."""
    exclude: str | None = None
    """Nodes to avoid."""
    time_min: int = 60
    """Time limit of a task in minutes."""
    mem_gb: float = 4.0
    """Memory a node."""
    cpus_per_task: int = 1
    """Cores a process; at least `threads`."""
    gpus_per_node: int = 0
    """GPUs a node for stages that use a device."""
    gpu_mem_gb: float | None = None
    """Memory of one GPU; --dry-run then says which `sampling.batch_rows` fits."""
    stages: dict[str, StageResources] = field(default_factory=dict)
    """By stage name, what differs from the above."""
    gate: StageResources = field(default_factory=lambda: StageResources(time_min=10, mem_gb=1.0))
    """The small job after each array that submits what has become ready."""
    max_parallel: int = 64
    """Tasks of one array that run at once."""
    max_array: int | None = None
    """Tasks of one array; the cluster's MaxArraySize if not given."""
    max_mem_gb: float | None = None
    """Memory that a shard that ran out of it may be given at most; no limit if not given."""
    max_submit: int | None = None
    """Jobs of this run in the queue, array tasks counted singly; no limit if not given."""
    task_min: float = 10.0
    """Work packed into one task, in minutes, by measured or estimated speed."""
    canary: int = 2
    """Tasks of a large stage that are tried first; if they fail alike, the rest is not started."""
    max_attempts: int = 3
    """Failed attempts of a shard before it waits for `rerun.py`."""
    signal_s: int = 60
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
    local_workers: int = 0
    """Tasks at once on this machine; 0 means one a core."""
    threads: int = 1
    """Threads a process, under every executor. Part of the result: sums round differently."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run; `auto` takes a GPU if the task sees one."""
    slurm: Slurm = field(default_factory=Slurm)
    """Your cluster."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """The language-model experiment."""

    seeds: int = 1
    """Teachers, each with its own students; a student of seed s uses the teacher of seed s."""
    taus: tuple[float, ...]
    """Temperatures at which the teacher is sampled."""
    prompt: str = "The"
    """Start of every sequence; never scored."""
    length: int
    """Tokens of a sequence, the prompt included."""
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
    throughput: dict[str, float] = field(default_factory=dict)
    """By stage name, tokens a second a rank, for estimates; measured speeds replace them."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting of the mixture simulation; the defaults are the paper's."""

    truth: Literal["grid", "fitted_grid", "random"] = "grid"
    """p*: `grid` (eight modes in the plane, exactly), `fitted_grid` (an EM fit to points of that
    grid, as in the released code), or `random` (`modes` of them in `dimension` dimensions)."""
    modes: int = 8
    """Modes of p*; the grid has 8."""
    dimension: int = 2
    """Of the points; the grid has 2."""
    fit_points: int = 50000
    """Points that `truth: fitted_grid` is fitted to."""
    train_points: int = 100
    """Points in D."""
    distill_points: int = 1000
    """Points in every D'."""
    teacher_components: int = 4
    """K', components of the teacher."""
    student_components: int = 1
    """K'', components of the students, the direct one too."""
    teacher_covariance: Literal["diagonal", "full"] = "diagonal"
    """Shape of the teacher's components."""
    student_covariance: Literal["diagonal", "full"] = "diagonal"
    """Shape of the students' components."""
    em_starts: int = 10
    """Runs of EM a fit, of which the likeliest is taken; one is quicker and finds worse fits."""


@dataclass(frozen=True, kw_only=True)
class MixtureConfig(RunConfig):
    """The mixture-of-Gaussians simulation."""

    settings: dict[str, Setting]
    """What is simulated, by name."""
    seeds: int
    """Repetitions of every setting, each with its own D, teacher and students."""
    shard_seeds: int = 20
    """Repetitions a shard. Seeds added in multiples of it repeat none."""
    betas: tuple[float, ...]
    """Sharpenings of the teacher's weights; the direct student is always there too."""
    eval_points: int = 20000
    """Fresh points for every expectation that has no closed form."""


TOKENS_PER_S = 20000.0
"""Estimate where `throughput` names no stage: a toy model on one core."""


def tokens_per_s(config: LanguageConfig, stage: str) -> float:
    """Estimated speed of one rank in a stage."""
    return config.throughput.get(stage, TOKENS_PER_S)


C = TypeVar("C", bound=RunConfig)


def checked(config: C) -> C:
    """The same config if every value is possible.

    Raises:
        InputError: naming the key, its value, what is expected.
    """
    check_run(config)
    if isinstance(config, LanguageConfig):
        problems = _problems(config)
    elif isinstance(config, MixtureConfig):
        problems = _mixture_problems(config)
    else:
        problems = iter(())
    for problem in problems:
        raise InputError(problem)
    return config


MAX_NAME_BYTES = 200
"""Of a run's folder: 255 for a file name, less what is added in the queue."""
POSITIVE = (
    "time_min", "mem_gb", "max_mem_gb", "gpu_mem_gb", "cpus_per_task", "max_parallel", "max_array",
    "max_submit", "task_min", "max_attempts",
)  # fmt: skip
NOT_NEGATIVE = ("gpus_per_node", "canary", "signal_s")


def check_run(config: RunConfig) -> None:
    """Check what every run has.

    Raises:
        InputError: naming the key, its value, what is expected.
    """
    name = config.name
    if not name or name in {".", ".."} or "/" in name or "\0" in name or name.startswith("-"):
        raise InputError(
            f"name={name!r}: expected the name of one folder inside {config.runs_dir}, without '/'"
        )
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        raise InputError(f"name={name!r}: expected at most {MAX_NAME_BYTES} bytes")
    for key in ("threads",):
        if getattr(config, key) < 1:
            raise InputError(f"{key}={getattr(config, key)}: expected at least 1")
    if config.local_workers < 0:
        raise InputError(f"local_workers={config.local_workers}: expected 0 (one a core) or more")
    slurm = config.slurm
    parts = {"slurm": slurm, "slurm.gate": slurm.gate}
    parts |= {f"slurm.stages.{stage}": found for stage, found in slurm.stages.items()}
    for part, found in parts.items():
        for key in POSITIVE:
            value = getattr(found, key, None)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{part}.{key}={value}: expected a number of more than 0")
        for key in NOT_NEGATIVE:
            value = getattr(found, key, None)
            if value is not None and value < 0:
                raise InputError(f"{part}.{key}={value}: expected 0 or more")
        for key in ("account", "partition", "qos", "constraint", "exclude"):
            value = getattr(found, key, None)
            if value is not None and not re.fullmatch(r"[^\s\"'\\]+", value):
                # It stands in a line of the batch script.
                raise InputError(f"{part}.{key}={value!r}: expected no spaces, quotes, backslashes")
    if slurm.max_submit == 1:
        raise InputError("slurm.max_submit=1: expected at least 2, one task and its gate")


def _at_least(config: RunConfig, low: float, *keys: str) -> Iterator[str]:
    for key in keys:
        value: object = config
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        if not (isinstance(value, int | float) and value >= low and math.isfinite(value)):
            yield f"{key}={value}: expected a number of at least {low:g}"


def _knob_problems(key: str, values: tuple[float, ...], example: str) -> Iterator[str]:
    """What is wrong with a list of temperatures or sharpenings."""
    if not values:
        yield f"{key}s=[]: expected at least one {key}, such as {key}s={example}"
    for value in values:
        if not (math.isfinite(value) and value > 0):
            yield f"{key}s={list(values)}: expected every {key} to be a number above 0, got {value}"
    if len({f"{value:g}" for value in values}) < len(values):
        yield f"{key}s={list(values)}: a {key} stands there twice"


def _name_problems(key: str, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with names that become parts of file names."""
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():
            yield f"{key}.{name}: expected a name of letters, digits, - and _"


def _mixture_problems(config: MixtureConfig) -> Iterator[str]:
    yield from _at_least(config, 1, "seeds", "shard_seeds")
    yield from _at_least(config, 2, "eval_points")
    yield from _knob_problems("beta", config.betas, "[1,100]")
    if not config.settings:
        yield "settings={}: expected at least one, such as settings.paper.train_points=100"
    yield from _name_problems("settings", config.settings)
    for name, setting in config.settings.items():
        key = f"settings.{name}"
        counts = ("modes", "dimension", "teacher_components", "student_components", "em_starts")
        yield from _at_least(config, 1, *(f"{key}.{count}" for count in counts))
        if setting.truth != "random":
            for part, there in {"modes": 8, "dimension": 2}.items():
                if getattr(setting, part) != there:
                    yield (
                        f"{key}.{part}={getattr(setting, part)}: truth={setting.truth} has "
                        f"{there}; expected that, or truth=random"
                    )
        components = max(setting.teacher_components, setting.student_components)
        yield from _at_least(config, max(2, components), f"{key}.train_points")
        yield from _at_least(config, max(2, setting.student_components), f"{key}.distill_points")
        if setting.fit_points < 1 or setting.fit_points % setting.modes:
            yield (
                f"{key}.fit_points={setting.fit_points}: expected a multiple of the "
                f"{setting.modes} modes, so that each has as many"
            )


def _problems(config: LanguageConfig) -> Iterator[str]:
    yield from _at_least(
        config, 1, "seeds", "length", "sampling.batch_rows", "sampling.shard_sequences",
        "sampling.train_sequences", "sampling.eval_sequences", "scoring.batch_rows",
        "scoring.shard_sequences", "scoring.head_tokens",
    )  # fmt: skip
    yield from _knob_problems("tau", config.taus, "[1.0,0.8]")
    if config.length < 2:
        yield f"length={config.length}: expected at least 2 tokens, one of prompt and one drawn"
    if not config.prompt:
        yield "prompt='': expected at least one token to start from"
    rows, per_shard = config.sampling.batch_rows, config.sampling.shard_sequences
    if per_shard % rows:
        yield (
            f"sampling.shard_sequences={per_shard}: expected a multiple of "
            f"sampling.batch_rows={rows}, so that shards do not change the batches"
        )
    if not config.students:
        yield "students={}: expected at least one size"
    if len(set(config.sampling.truncations)) < len(config.sampling.truncations):
        yield f"sampling.truncations={list(config.sampling.truncations)}: one stands there twice"
    for stage, speed in config.throughput.items():
        if not 0 < speed < math.inf:
            yield f"throughput.{stage}={speed}: expected a number of more than 0"
    for text in config.sampling.truncations:
        name, _, value = text.partition("=")
        if name not in {"top_k", "top_p"} or not _is_number(value, whole=name == "top_k"):
            yield f"sampling.truncations: expected top_k=50 or top_p=0.9, got {text!r}"
    if config.truth.model == "train":
        if config.truth.shape is None or config.truth.training is None:
            yield "truth.model=train: expected truth.shape and truth.training too"
        if config.truth.tokenizer not in {"bytes"}:
            yield (
                f"truth.tokenizer={config.truth.tokenizer}: truth.model=train trains on bytes; "
                "expected truth.tokenizer=bytes"
            )
        if config.truth.tokenizer == "bytes" and len(config.prompt.encode()) >= config.length:
            yield f"prompt={config.prompt!r}: expected fewer than length={config.length} tokens"
    elif config.truth.tokenizer == "bytes":
        yield (
            f"truth.tokenizer=bytes: differs from the tokenizer of {config.truth.model}, which the "
            "students share; expected truth.tokenizer=model"
        )
    yield from _name_problems("students", config.students)
    for key, model in models(config).items():
        yield from _model_problems(key, model, config)


def _is_number(text: str, *, whole: bool) -> bool:
    convert: Callable[[str], float] = int if whole else float
    try:
        number = convert(text)
    except ValueError:
        return False
    return number >= 1 if whole else 0 < number <= 1


def models(config: LanguageConfig) -> dict[str, Model]:
    """Every model that the run trains, by its key in the config."""
    found = {"teacher": config.teacher}
    found |= {f"students.{size}": model for size, model in config.students.items()}
    truth = config.truth
    if truth.model == "train" and truth.shape is not None and truth.training is not None:
        found = {"truth": Model(shape=truth.shape, training=truth.training)} | found
    return found


def _model_problems(key: str, model: Model, config: LanguageConfig) -> Iterator[str]:
    shape, training = model.shape, model.training
    for name in ("layers", "hidden", "heads", "kv_heads", "ffn"):
        if getattr(shape, name) < 1:
            yield f"{key}.shape.{name}={getattr(shape, name)}: expected at least 1"
            return
    if shape.hidden % shape.heads or (shape.hidden // shape.heads) % 2:
        yield (
            f"{key}.shape: hidden={shape.hidden} over heads={shape.heads} must give an "
            "even head size"
        )
    if shape.heads % shape.kv_heads:
        yield f"{key}.shape: kv_heads={shape.kv_heads} must divide heads={shape.heads}"
    for name, value in {"rope_theta": shape.rope_theta, "init_std": shape.init_std}.items():
        if not 0 < value < math.inf:
            yield f"{key}.shape.{name}={value}: expected a number of more than 0"
    for name in ("learning_rate", "epochs", "eps", "loss_scale", "max_gradient_norm"):
        if not 0 < getattr(training, name) < math.inf:
            yield f"{key}.training.{name}={getattr(training, name)}: expected more than 0"
    for name in (
        "weight_decay", "gradient_clip", "checkpoint_every_steps", "validate_every_steps",
    ):  # fmt: skip
        if not 0 <= getattr(training, name) < math.inf:
            yield f"{key}.training.{name}={getattr(training, name)}: expected 0 or more"
    for name in ("warmup_fraction", "decay_fraction"):
        if not 0 <= getattr(training, name) <= 1:
            yield f"{key}.training.{name}={getattr(training, name)}: expected 0 to 1"
    if not all(0 <= beta < 1 for beta in training.betas):
        yield f"{key}.training.betas={list(training.betas)}: expected 0 to less than 1"
    stop = training.stop_after_epochs
    if stop is not None and not 0 < stop <= training.epochs:
        yield f"{key}.training.stop_after_epochs={stop}: expected at most epochs={training.epochs}"
    if not 0 <= training.zero_stage <= 3:
        yield f"{key}.training.zero_stage={training.zero_stage}: expected 0, 1, 2 or 3"
    if training.zero_stage == 0 and training.dtype != "float32":
        yield (
            f"{key}.training.zero_stage=0: expected 1, 2 or 3 with dtype={training.dtype} "
            "(DeepSpeed's stage 0 silently takes another optimizer there)"
        )
    if training.zero_stage == 3 and training.compile:
        yield f"{key}.training.compile=true: expected zero_stage 0, 1 or 2, got 3"
    if training.dtype == "float16" and config.device == "cpu":
        yield f"{key}.training.dtype=float16: needs a GPU; expected bfloat16 or float32 on a CPU"
    for name in (
        "nodes", "ranks_per_node", "batch_sequences", "micro_batch_sequences", "head_tokens",
        "keep_checkpoints", "validation_sequences",
    ):  # fmt: skip
        if getattr(training, name) < 1:
            yield f"{key}.training.{name}={getattr(training, name)}: expected at least 1"
            return
    if training.batch_sequences % training.world_size:
        yield (
            f"{key}.training.batch_sequences={training.batch_sequences}: expected a multiple of "
            f"its {training.world_size} ranks (nodes={training.nodes} times "
            f"ranks_per_node={training.ranks_per_node})"
        )
    for epoch in training.keep_epochs:
        if not 0 < epoch <= training.epochs:
            yield (
                f"{key}.training.keep_epochs={list(training.keep_epochs)}: expected numbers above "
                f"0 and at most epochs={training.epochs}"
            )
    if key != "truth" and training.batch_sequences > config.sampling.train_sequences:
        yield (
            f"{key}.training.batch_sequences={training.batch_sequences}: expected at most "
            f"sampling.train_sequences={config.sampling.train_sequences}"
        )


language_problems = _problems
mixture_problems = _mixture_problems
