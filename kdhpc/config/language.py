"""The language-model experiment."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from kdhpc.config.bounds import AtLeastTwo, Count, Positive, list_problems, name_problems, repeated
from kdhpc.config.model import Dtype, Model, Shape, Training, model_problems
from kdhpc.config.run import RunConfig
from kdhpc.errors import InputError
from kdhpc.selection import Selection


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
