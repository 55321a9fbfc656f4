"""Config of the language-model experiment."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from kdhpc.config.bounds import (
    AtLeastTwo,
    Count,
    Fraction,
    Positive,
    Whole,
    list_problems,
    name_problems,
    repeated,
)
from kdhpc.config.downstream import FROM_TRUTH, Downstream, downstream_problems
from kdhpc.config.model import (
    Architecture,
    Design,
    Dtype,
    Model,
    Shape,
    Sizes,
    Training,
    model_problems,
)
from kdhpc.config.run import RunConfig
from kdhpc.errors import InputError
from kdhpc.selection import Selection
from kdhpc.types import Corruption


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A second judge of precision, where the truth is a corpus."""

    model: str = "train"
    """`train` (a model with the truth's tokenizer, trained in the run on documents that nothing
    else sees), or a finished model in the form of `truth.model`. If its tokenizer is not the
    truth's, it scores the texts by its own, and both judges are compared by character."""
    revision: str = "main"
    """Branch, tag or commit to fetch if `model` is a hub id."""
    shape: Shape | None = None
    """Architecture, if it is trained; `truth.shape` if not given and that is trained too."""
    architecture: Architecture | None = None
    """The same for any family, as `students.NAME.architecture`; `truth.architecture` likewise."""
    training: Training | None = None
    """Training settings, if it is trained; `truth.training` if not given."""
    dtype: Dtype = "float32"
    """Dtype in which a finished model is stored, and in which its body scores."""
    fingerprint: str = ""
    """Identity of the model or corpus, as `truth.fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One of the models that p* is a mixture of, which the run trains on a corpus of its own."""

    corpus: str
    """Its text, as `truth.corpus`."""
    text_column: str = "text"
    """Name of the column of the corpus that holds the text."""
    weight: Positive = 1.0
    """Its share of the sequences; the weights of all components are divided by their sum."""
    fingerprint: str = ""
    """Identity of the corpus, as `truth.fingerprint`."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """The ground-truth model p*."""

    model: str = "train"
    """Source of p*: `train` (a small model trained in the run), a Hugging Face folder or hub id, a
    `.gguf` file, or `package:NAME/FILE` for a file that an installed Python package ships."""
    revision: str = "main"
    """Branch, tag or commit to fetch if `model` is a hub id."""
    source: Literal["model", "corpus"] = "model"
    """Where D and truth's evaluation set come from. `model` samples them from p*. `corpus` cuts
    them from documents of `corpus`; `model` is then a judge, which stands for p* where precision
    is scored, and learns from other documents if it is trained in the run."""
    judge_share: Fraction = 0.4
    """Share of the documents that a judge is trained on, half of it for each if both judges are
    trained; only with `source: corpus`."""
    held_out_share: Fraction = 0.2
    """Share of the documents of truth's evaluation set; only with `source: corpus`."""
    corpus: str = "python-docs"
    """Text that `model: train` trains on, or of `source: corpus`: `python-docs` (the documentation
    inside the installed Python), `python-source` (the code of its standard library), `c-headers`
    (numpy's), `licences` (of the packages that kdhpc needs), `unicode-names`, `addition` (sums with
    their carries), `docstrings` (of the standard library, with their first sentences), a `.txt`,
    `.jsonl` or `.parquet` file, or a hub id of a data set."""
    text_column: str = "text"
    """Name of the column of the corpus that holds the text."""
    tokenizer: str = "model"
    """`bytes` (required by `model: train`), `model` (the tokenizer that comes with the model), or a
    folder whose tokenizer.json must be identical to the model's."""
    shape: Shape | None = None
    """Architecture of p*, if it is a Llama; `model: train` needs this or `architecture`."""
    architecture: Architecture | None = None
    """The same for any family, as `students.NAME.architecture`."""
    training: Training | None = None
    """Training settings of p*; required by `model: train`."""
    dtype: Dtype = "float32"
    """Dtype in which p* is stored and sampled."""
    vocabulary: Count | None = None
    """Number of ids that a given p* is cut to and renormalised over: those that are likeliest on
    average over its own samples, and always those of the prompt, the end and the begin token. None
    keeps all. A `vocabulary_file` fills it in when a run is submitted."""
    vocabulary_file: str | None = None
    """File of the ids that a given p* is cut to, one integer a line, instead of the likeliest."""
    vocabulary_fingerprint: str = ""
    """Digest of the ids in `vocabulary_file`, as `fingerprint`."""
    num_ids: Count | None = None
    """Number of ids of a given p*, for estimates of memory and disk only. It is filled in when a
    run is submitted from a folder; without it, --dry-run reckons with 65,536."""
    fingerprint: str = ""
    """Identity of the model or corpus (sha256 or commit). It is filled in when a run is submitted;
    if it is given, a model or corpus with another identity is refused."""
    corpus_fingerprint: str = ""
    """Identity of the corpus beside a given judge, as `fingerprint`."""
    second_judge: Judge | None = None
    """Another judge, which scores all that the first one scores, to see whether what is concluded
    depends on the judge; only with `source: corpus`. `truth.second_judge.model=train` adds one. A
    finished run can gain a finished model; one that is trained takes documents of the first."""
    components: dict[str, Component] = field(default_factory=dict)
    """Models that p* is an exact mixture of, by name, each trained as `shape` and `training` say on
    rows that start with `prompt`; `corpus` is not used then. Every sequence is drawn from one of
    them, and scored under all."""
    component_sequences: Count | None = None
    """Number of rows that each component is trained on, chosen by a digest; None for all."""
    rotate_weights: Whole = 0
    """Number of places by which the weights are moved on among the components. Runs that differ in
    it have the same components, so that what a weight does can be told from what a mode is."""

    @property
    def weights(self) -> dict[str, float]:
        """The weights of the components, whose sum is 1, by name."""
        given = [component.weight for component in self.components.values()]
        places = range(len(given))
        moved = [given[(place - self.rotate_weights) % len(given)] for place in places]
        return {n: w / sum(given) for n, w in zip(self.components, moved, strict=True)}

    @property
    def design(self) -> Design | None:
        """Architecture of p* in either form; None if neither is given."""
        return self.shape or self.architecture

    @property
    def trained(self) -> Model | None:
        """Architecture and training of a p* that the run trains; None if it does not."""
        if self.model != "train" or not self.design or self.training is None:
            return None
        return Model(shape=self.shape, architecture=self.architecture, training=self.training)

    @property
    def trained_second_judge(self) -> Model | None:
        """Architecture and training of a second judge that the run trains; None if it does not."""
        judge = self.second_judge
        if judge is None or judge.model != "train":
            return None
        own = self if self.model == "train" else judge
        built = judge if judge.shape or judge.architecture else own
        training = judge.training or own.training
        if training is None:
            return None
        return Model(shape=built.shape, architecture=built.architecture, training=training)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How sequences are drawn from models."""

    train_sequences: Count
    """Number of sequences in D and in every D'_tau."""
    eval_sequences: Count
    """Number of sequences in every evaluation set."""
    shard_sequences: Count
    """Number of sequences per shard; a multiple of both numbers of rows. A killed task loses at
    most the shard it is working on, so choose shards of 2 to 10 minutes."""
    batch_rows: Count = 64
    """Number of rows that are decoded together. It determines memory, and it is part of the recipe
    because another batch shape rounds differently."""
    trained_batch_rows: Count | None = None
    """The same for teacher and students, which are smaller than the truth and are sampled faster
    with more rows; None for `batch_rows`."""
    draw: Literal["inverse_cdf", "gumbel"] = "inverse_cdf"
    """How tokens are drawn; both methods are exact. `inverse_cdf` uses one uniform number per token
    and is the fastest. `gumbel` uses one per vocabulary entry, which keeps ids comparable across
    kernels."""
    engine: Literal["torch", "native"] = "torch"
    """`native` uses the CPU extension that `make native` builds. If it cannot be used, the log says
    why and plain torch takes over. It is part of the recipe because it rounds differently."""
    truncations: tuple[str, ...] = ()
    """More ways to sample the teacher, besides the taus: `top_k=50` or `top_p=0.9`, each at
    temperature 1. Each of them gets students of its own."""

    def rows_of(self, *, is_truth: bool) -> int:
        """Return the number of rows of the truth, or of a trained model, decoded together."""
        return self.batch_rows if is_truth else self.trained_batch_rows or self.batch_rows


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How sequences are scored under models."""

    shard_sequences: Count
    """Number of sequences per shard."""
    batch_rows: Count = 64
    """Number of rows that are scored together; it determines memory."""
    head_tokens: Count = 4096
    """Number of positions whose logits over the whole vocabulary are in memory at once."""
    dtype: Dtype = "float32"
    """Dtype of the model's body; logits and log-softmax are always float32."""
    engine: Literal["torch", "native"] = "torch"
    """`native` computes the logits of bfloat16 models on CPUs with the extension that `make native`
    builds. If it cannot be used, the log says why and plain torch takes over."""
    corruptions: tuple[Corruption, ...] = ()
    """Ways to damage truth's samples, one token of each, before every model scores them: two tokens
    exchanged, one taken away, one repeated."""
    expected: bool = False
    """Whether students and the truth also score each other's samples averaged over the next token
    (Rao-Blackwell), for divergences of smaller variance. Two models are then in memory."""
    per_token: bool = False
    """Whether to keep the log-probability of every token besides the sums (4 bytes per token)."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeed:
    """Speed of one rank with one model, for estimates of time."""

    work: Literal["sampling", "scoring", "training"]
    """What was measured."""
    flops_per_token: Positive
    """Operations of the model for each token of it."""
    tokens_per_s: Positive
    """Tokens per second of one rank."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(RunConfig):
    """Config of the language-model experiment."""

    seeds: Count = 1
    """Number of teachers, each with its own students; seed s of a student is that of its
    teacher."""
    first_seed: Whole = 0
    """Seed of the first teacher. Seeds of one experiment may be spread over several runs: truth, D
    and everything of a seed are the same in each."""
    taus: tuple[Positive, ...]
    """Temperatures at which the teacher is sampled; each of them gets students of its own."""
    betas: tuple[Positive, ...] = ()
    """Exponents that sharpen the weights of a truth with components. Each of these mixtures stands
    in for a teacher that has learnt everything but the weights, and gets students of its own."""
    decode_temperatures: tuple[Positive, ...] = ()
    """Temperatures other than 1 at which finished students are sampled and scored too, as a
    control for `taus`: direct students and those of tau 1 at each of them, the other distilled
    students at those above 1. Recall is scored at each of them for every student, and at each tau
    for the teachers."""
    prompt: str = "The"
    """Text that every sequence starts with; its tokens are never trained on or scored. It may hold
    special tokens, such as `<|im_start|>`."""
    prompts: str | None = None
    """Prompts that sequences start with instead of `prompt`, in turn: a `.jsonl` file with `text`,
    or `messages` for the model's chat template, in each line, and perhaps `answer`, the last line
    of a right sequence, or `reference`, what somebody wrote there; `python-signatures`, first lines
    of functions of Python's standard library, up to 40 characters; `addition`, sums with their
    answers; or `docstrings`, with their first sentences as references."""
    held_out_prompts: Fraction = 0.2
    """Share of the prompts that only evaluation sets start with. If it is 0, training and
    evaluation sets have all of them."""
    prompts_fingerprint: str = ""
    """Digest of the prompts. It is filled in when a run is submitted; if it is given, other prompts
    are refused."""
    prompts_texts: str = ""
    """Digest of what the model's chat template makes of messages. It is filled in when a run is
    submitted from a folder or hub id; another template is then refused."""
    eval_prompts: Whole = 0
    """Number of the prompts of evaluation sets; row i starts with prompt i modulo this number. It
    is filled in when a run is submitted."""
    begin: Literal["tokenizer", "always", "never"] = "tokenizer"
    """Whether the tokenizer's begin token comes first in every sequence, as part of the prompt:
    `tokenizer` if the tokenizer puts it before a text by itself."""
    length: AtLeastTwo
    """Number of tokens of a sequence, the prompt included; the prompt must be shorter."""
    eos: Literal["learn", "mask"] = "learn"
    """`learn` trains on the end-of-sequence token and scores it; `mask` does neither."""
    truth: Truth
    """The ground-truth model p*."""
    sampling: Sampling
    """Sizes of the corpora and evaluation sets, and how they are drawn."""
    teacher: Model
    """The teacher p'."""
    students: dict[str, Model]
    """The students p'', by the name of their size."""
    scoring: Scoring
    """How samples are scored."""
    downstream: Downstream = field(default_factory=Downstream)
    """Tasks that finished models are evaluated on."""
    claims: str | None = None
    """File of claims that are fixed before the run is scored, for `analysis/claims.py`. Its sha256
    is recorded in the results; it changes none of them."""
    claims_fingerprint: str = ""
    """The sha256 of that file. It is filled in when a run is submitted; if it is given, another
    file is refused."""
    sizes: dict[str, Sizes] = field(default_factory=dict)
    """Sizes of the models that have an `architecture`, by their keys, for estimates of time, memory
    and disk only. They are filled in when a run is submitted."""
    tensorboard: bool = False
    """Whether to write TensorBoard events next to each training's log; this needs
    kdhpc[tensorboard]."""
    throughput: dict[str, Positive] = field(default_factory=dict)
    """Expected speed by stage name, in tokens per second per rank, for estimates of time. Measured
    speeds replace it as soon as there are any."""
    throughput_from: str | None = None
    """File of speeds that `python -m kdhpc.gpu_check` has measured, which replace `throughput` for
    models of about the sizes that it has measured."""
    speeds: dict[str, MeasuredSpeed] = field(default_factory=dict)
    """The speeds of that file by model and work. They are filled in when a run is submitted."""


SECOND_JUDGE_KEY = "truth.second_judge"
MAX_COMPONENTS = 256
"""Largest number of components of a truth, whose indices are bytes."""


def only_prompt(config: LanguageConfig) -> str:
    """Return the text that every sequence starts with; empty if there are several prompts."""
    return config.prompt if config.prompts is None else ""


def num_ids(truth: Truth) -> int:
    """Return the number of ids of all models of a run, as far as it is known before the run."""
    bytes_only = 257 if truth.tokenizer == "bytes" else None
    return truth.vocabulary or truth.num_ids or bytes_only or 2**16


def models(config: LanguageConfig) -> dict[str, Model]:
    """Return every model that the run trains, by its key in the config."""
    trained = {"teacher": config.teacher}
    trained |= {f"students.{size}": model for size, model in config.students.items()}
    truth = config.truth
    if judge := truth.trained_second_judge:
        trained = {SECOND_JUDGE_KEY: judge} | trained
    if truth.trained is not None:
        trained = {"truth": truth.trained} | trained
    return trained


def language_problems(config: LanguageConfig) -> Iterator[str]:
    """Yield what is wrong with a language experiment whose values are within their bounds."""
    yield from list_problems("tau", config.taus, "[1.0,0.8]")
    yield from _component_problems(config)
    if config.decode_temperatures:
        yield from list_problems("decode_temperature", config.decode_temperatures, "[0.9,0.8]")
    if "1" in {f"{temperature:g}" for temperature in config.decode_temperatures}:
        yield "decode_temperatures: 1 is always scored; expected temperatures other than 1"
    yield from _sampling_problems(config.sampling)
    yield from _label_problems(config)
    yield from _scoring_problems(config.scoring)
    yield from _corruption_problems(config.scoring)
    yield from _truth_problems(config.truth)
    yield from _source_problems(config)
    yield from _prompt_problems(config)
    yield from downstream_problems(
        config.downstream,
        length=config.length,
        is_cut=(config.truth.vocabulary or config.truth.vocabulary_file) is not None,
        tokenizer=config.truth.tokenizer,
    )
    if not config.students:
        yield "students={}: expected at least one size"
    yield from name_problems("students", config.students)
    for key, model in models(config).items():
        on_documents = key in ("truth", SECOND_JUDGE_KEY)
        num_sequences = None if on_documents else config.sampling.train_sequences
        yield from model_problems(key, model, device=config.device, num_sequences=num_sequences)


def _prompt_problems(config: LanguageConfig) -> Iterator[str]:
    prompt, length = config.prompt, config.length
    if config.prompts is not None:
        if config.truth.source == "corpus":
            yield (
                f"prompts={config.prompts}: rows of a corpus start with `prompt` alone; expected "
                "prompts=null, or truth.source=model"
            )
        if made := [name for name in config.downstream.tasks if name in FROM_TRUTH]:
            yield (
                f"downstream.tasks: {made[0]} is made of truth's texts, which start with prompts "
                "that no model learns; expected other tasks, or prompts=null"
            )
        if config.held_out_prompts >= 1.0:
            yield (
                f"held_out_prompts={config.held_out_prompts:g}: leaves no prompts to train on; "
                "expected a share below 1"
            )
        return
    if not prompt:
        yield "prompt='': expected at least one token to start from"
    if config.truth.tokenizer == "bytes" and len(prompt.encode()) >= length:
        yield f"prompt={prompt!r}: expected fewer than length={length} tokens"


def _label_problems(config: LanguageConfig) -> Iterator[str]:
    for size, model in config.students.items():
        if model.labels == "soft" and config.sampling.truncations:
            yield (
                f"students.{size}.labels=soft: the distribution of a truncated teacher is not "
                "learnt; expected labels=hard, or sampling.truncations=[]"
            )
        if model.labels == "soft" and config.betas:
            yield (
                f"students.{size}.labels=soft: the distribution of a mixture is not learnt; "
                "expected labels=hard, or betas=[]"
            )


def _sampling_problems(sampling: Sampling) -> Iterator[str]:
    for name in ("batch_rows", "trained_batch_rows"):
        rows = getattr(sampling, name)
        if rows and sampling.shard_sequences % rows:
            yield (
                f"sampling.shard_sequences={sampling.shard_sequences}: expected a multiple of "
                f"sampling.{name}={rows}, so that shards do not change the batches"
            )
    setting = f"sampling.truncations={list(sampling.truncations)}"
    names = []
    for text in sampling.truncations:
        try:
            names.append(Selection.parse(text).name)
        except InputError as error:
            yield f"{setting}: {error}"
    for name in repeated(names):
        yield f"{setting}: duplicate {name}"


def _scoring_problems(scoring: Scoring) -> Iterator[str]:
    if scoring.shard_sequences % scoring.batch_rows:
        yield (
            f"scoring.shard_sequences={scoring.shard_sequences}: expected a multiple of "
            f"scoring.batch_rows={scoring.batch_rows}, so that shards do not change the batches"
        )


def _corruption_problems(scoring: Scoring) -> Iterator[str]:
    for name in repeated(scoring.corruptions):
        yield f"scoring.corruptions={list(scoring.corruptions)}: duplicate {name}"


def _source_problems(config: LanguageConfig) -> Iterator[str]:
    truth = config.truth
    if truth.source == "model":
        if truth.second_judge is not None:
            yield (
                "truth.second_judge: p* is a model, which needs no judge; expected truth.source="
                "corpus, or null"
            )
        return
    yield from _judge_problems(truth)
    if truth.judge_share + truth.held_out_share >= 1.0:
        yield (
            f"truth.judge_share={truth.judge_share:g}, truth.held_out_share="
            f"{truth.held_out_share:g}: leave no documents for D; expected a sum below 1"
        )
    if config.scoring.expected:
        yield (
            "scoring.expected=true: needs the next token of p*, which a corpus does not have; "
            "expected truth.source=model, or false"
        )


def _judge_problems(truth: Truth) -> Iterator[str]:
    judge = truth.second_judge
    if judge is None:
        return
    if judge.model == "train":
        if truth.trained_second_judge is None:
            yield (
                f"{SECOND_JUDGE_KEY}.model=train: expected {SECOND_JUDGE_KEY}.shape and "
                f"{SECOND_JUDGE_KEY}.training to be given too, as truth.model is not trained"
            )
    elif (judge.model, judge.revision) == (truth.model, truth.revision):
        yield (
            f"{SECOND_JUDGE_KEY}.model={judge.model}: is the first judge, truth.model; expected "
            "another model"
        )


def _component_problems(config: LanguageConfig) -> Iterator[str]:
    truth = config.truth
    if config.betas:
        yield from list_problems("beta", config.betas, "[2.0,4.0]")
    if "1" in {f"{beta:g}" for beta in config.betas}:
        yield "betas: 1 leaves the weights as they are; expected other exponents"
    if not truth.components:
        others = {
            "betas": list(config.betas),
            "truth.component_sequences": truth.component_sequences,
            "truth.rotate_weights": truth.rotate_weights,
        }
        for name, value in others.items():
            if value:
                yield f"{name}={value}: needs components of p*; expected truth.components"
        return
    yield from name_problems("truth.components", truth.components)
    number, sequences = len(truth.components), truth.component_sequences
    if not 2 <= number <= MAX_COMPONENTS:
        yield f"truth.components: has {number}; expected 2 to {MAX_COMPONENTS}"
    if truth.rotate_weights >= number:
        yield (
            f"truth.rotate_weights={truth.rotate_weights}: expected less than the number of "
            f"components, {number}"
        )
    if sequences and truth.training and sequences < truth.training.batch_sequences:
        yield (
            f"truth.component_sequences={sequences}: expected at least "
            f"truth.training.batch_sequences={truth.training.batch_sequences}"
        )
    for name, wanted, is_not in (
        (f"truth.model={truth.model}", "truth.model=train", truth.model != "train"),
        (f"truth.source={truth.source}", "truth.source=model", truth.source != "model"),
        (f"prompts={config.prompts}", "prompts=null", config.prompts is not None),
        ("scoring.expected=true", "scoring.expected=false", config.scoring.expected),
        ("downstream.tasks", "downstream.tasks=[]", bool(config.downstream.tasks)),
    ):
        if is_not:
            yield f"{name}: not possible with truth.components; expected {wanted}"


def _truth_problems(truth: Truth) -> Iterator[str]:
    if truth.model == "train":
        for field_name in ("vocabulary", "vocabulary_file"):
            if (value := getattr(truth, field_name)) is not None:
                yield (
                    f"truth.{field_name}={value}: truth.model=train trains on bytes, which are not "
                    "cut; expected a finished truth.model, or null"
                )
        if truth.trained is None:
            yield (
                "truth.model=train: expected truth.shape or truth.architecture, and "
                "truth.training, to be given too"
            )
        if truth.tokenizer != "bytes":
            yield (
                f"truth.tokenizer={truth.tokenizer}: truth.model=train trains on bytes; "
                "expected truth.tokenizer=bytes"
            )
    elif truth.tokenizer == "bytes":
        yield (
            f"truth.tokenizer=bytes: differs from the tokenizer of {truth.model}, which all "
            "students share; expected truth.tokenizer=model"
        )
