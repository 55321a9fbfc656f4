"""The models and sample sets of the language experiment and their names, shared by all stages.

A model is called `truth`, `teacher-s0`, `student-s0-small-direct` or `student-s0-small-tau0.8`; a
second judge, which there may be where the truth is a corpus, is called `second-judge`. The
evaluation set of a teacher at a temperature is called `teacher-s0-tau0.8`, and that of a truth with
components whose weights are sharpened in its place `teacher-s0-beta2`. A model at a temperature
of evaluation other than 1 is called `student-s0-small-direct-T0.8`, as a sampler and as a scorer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Dtype, Model, Training
from kdhpc.selection import Selection
from kdhpc.types import Corruption

TRUTH, SAMPLE_TRUTH, TRAIN_ON_TRUTH = "truth", "sample-truth", "train-on-truth"
SAMPLE_TEACHER, TRAIN_STUDENTS, SAMPLE_STUDENTS = (
    "sample-teacher",
    "train-students",
    "sample-students",
)
SCORE, DOWNSTREAM, MERGE = "score", "downstream", "merge"
STAGES = (
    TRUTH, SAMPLE_TRUTH, TRAIN_ON_TRUTH, SAMPLE_TEACHER, TRAIN_STUDENTS, SAMPLE_STUDENTS, SCORE,
    DOWNSTREAM, MERGE,
)  # fmt: skip
"""Names of the stages in pipeline order."""
ArmName = tuple[str, str]
"""Names of a stage and of one of its arms."""
TRUTH_MODEL: ArmName = (TRUTH, "truth")
SECOND_JUDGE = "second-judge"
"""Name of the second judge, as a scorer and in the results."""
SECOND_JUDGE_MODEL: ArmName = (TRUTH, SECOND_JUDGE)
COMPONENT = "component-"
"""What the names of the arms of the truth's components begin with."""
TRUTH_TRAIN: ArmName = (SAMPLE_TRUTH, "train")
"""The training set D."""
TRUTH_EVAL: ArmName = (SAMPLE_TRUTH, "eval")
"""Truth's evaluation set."""
MODELS = "models"
"""Folder of a run with a link to each model's checkpoint folder, by the model's name."""


def selections(config: LanguageConfig) -> Iterator[Selection]:
    """Yield every selection with which teachers are sampled; each gets students of its own."""
    for tau in config.taus:
        yield Selection(tau=tau)
    for text in config.sampling.truncations:
        yield Selection.parse(text)
    for beta in config.betas:
        yield Selection(beta=beta)


def seeds(config: LanguageConfig) -> range:
    """Return the seeds of the teachers of a run."""
    return range(config.first_seed, config.first_seed + config.seeds)


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A teacher or student, which the run trains on samples; a teacher may be taken as it is."""

    kind: Literal["teacher", "student"]
    seed: int
    size: str
    """Name of the model's size: `teacher`, or a key of `students`."""
    selection: Selection | None = None
    """Selection with which its teacher was sampled; None if the model learns from D."""
    model: Model

    @property
    def arm(self) -> str:
        """Source of its training data: `direct`, or the name of a selection."""
        return self.selection.name if self.selection else "direct"

    @property
    def tau(self) -> float:
        """Temperature at which its training data was sampled; 1 if the model learns from D."""
        return self.selection.tau if self.selection else 1.0

    @property
    def name(self) -> str:
        if self.kind == "teacher":
            return teacher_name(self.seed)
        return f"student-s{self.seed}-{self.size}-{self.arm}"

    @property
    def key(self) -> str:
        """Key of its model in the config."""
        return "teacher" if self.kind == "teacher" else f"students.{self.size}"

    @property
    def start(self) -> ArmName | None:
        """The direct student whose weights it starts from, if it is fine-tuned."""
        if self.selection is None or self.model.fine_tuning is None:
            return None
        return TRAIN_ON_TRUTH, replace(self, selection=None).name

    @property
    def teacher(self) -> ArmName | None:
        """The teacher whose distributions it learns; None if it learns tokens."""
        if self.selection is None or self.model.labels == "hard":
            return None
        return TRAIN_ON_TRUTH, teacher_name(self.seed)

    @property
    def training(self) -> Training | None:
        """How it is trained; None if it is taken as it is."""
        return self.model.fine_tuning if self.start else self.model.training

    @property
    def sampled_dtype(self) -> Dtype:
        """Dtype in which it is stored and sampled."""
        return self.training.dtype if self.training else self.model.dtype

    @property
    def stage(self) -> str:
        """Stage that trains the model."""
        return TRAIN_STUDENTS if self.selection else TRAIN_ON_TRUTH

    @property
    def data(self) -> ArmName:
        """Samples that the model is trained on."""
        if self.selection is None:
            return TRUTH_TRAIN
        return SAMPLE_TEACHER, f"s{self.seed}-{self.selection.name}"


def teacher_name(seed: int) -> str:
    return f"teacher-s{seed}"


def at_temperature(name: str, temperature: float) -> str:
    """Return the name of a model at a temperature of evaluation."""
    return name if temperature == 1.0 else f"{name}-T{temperature:g}"


def trainees(config: LanguageConfig) -> Iterator[Trainee]:
    """Yield teachers, direct students and distilled students, in pipeline order."""
    for seed in seeds(config):
        yield Trainee(kind="teacher", seed=seed, size="teacher", model=config.teacher)
        for size, model in config.students.items():
            yield Trainee(kind="student", seed=seed, size=size, model=model)
    for seed in seeds(config):
        for selection in selections(config):
            for size, model in config.students.items():
                yield Trainee(
                    kind="student", seed=seed, size=size, selection=selection, model=model
                )


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Sequences of one model, drawn with one selection."""

    stage: str
    arm: str
    stream: str
    """Name of the random stream that the sequences are drawn from."""
    model: ArmName
    dtype: str
    selection: Selection
    evaluation: bool


def sample_sets(config: LanguageConfig) -> Iterator[SampleSet]:
    """Yield all sample sets, in pipeline order."""
    for stage, use in (TRUTH_TRAIN, TRUTH_EVAL):
        yield SampleSet(
            stage=stage,
            arm=use,
            stream=f"{_truth_stream(config)}/{use}",
            model=TRUTH_MODEL,
            dtype=config.truth.dtype,
            selection=Selection(),
            evaluation=use == "eval",
        )
    for seed in seeds(config):
        for selection in selections(config):
            for evaluation in (False, True):
                yield _teacher_samples(config, seed, selection, evaluation)
    for trainee in trainees(config):
        if trainee.kind == "student":
            model = f"student/s{trainee.seed}/{trainee.size}/{trainee.arm}"
            for temperature in (1.0, *_sampled_temperatures(config, trainee)):
                yield SampleSet(
                    stage=SAMPLE_STUDENTS,
                    arm=at_temperature(trainee.name, temperature),
                    stream=at_temperature(model, temperature) + "/eval",
                    model=(trainee.stage, trainee.name),
                    dtype=trainee.sampled_dtype,
                    selection=Selection(tau=temperature),
                    evaluation=True,
                )


def _truth_stream(config: LanguageConfig) -> str:
    """Return the name of the truth's random stream; other weights draw other sequences."""
    places = config.truth.rotate_weights
    return f"truth/rotated{places}" if places else "truth"


def _sampled_temperatures(config: LanguageConfig, student: Trainee) -> tuple[float, ...]:
    """Return the temperatures other than 1 at which a finished student is sampled."""
    learnt_all = student.selection is None or student.selection.keeps_all
    return tuple(t for t in config.decode_temperatures if learnt_all or t > 1.0)


def _scored_temperatures(config: LanguageConfig, trainee: Trainee) -> tuple[float, ...]:
    """Return the temperatures other than 1 at which a model scores truth's samples."""
    temperatures = set(config.decode_temperatures)
    if temperatures and trainee.kind == "teacher":
        temperatures |= {*config.taus}
    return tuple(sorted(temperatures - {1.0}, reverse=True))


def _teacher_samples(
    config: LanguageConfig, seed: int, selection: Selection, evaluation: bool
) -> SampleSet:
    name, use = teacher_name(seed), "eval" if evaluation else "train"
    is_mixture = selection.beta != 1.0
    return SampleSet(
        stage=SAMPLE_STUDENTS if evaluation else SAMPLE_TEACHER,
        arm=f"{name}-{selection.name}" if evaluation else f"s{seed}-{selection.name}",
        stream=f"teacher/s{seed}/{selection.name}/{use}",
        model=TRUTH_MODEL if is_mixture else (TRAIN_ON_TRUTH, name),
        dtype=config.truth.dtype if is_mixture else config.teacher.sampled_dtype,
        selection=selection,
        evaluation=evaluation,
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A sample set and the model that it is scored under."""

    sampler: str
    samples: ArmName
    scorer: str
    model: ArmName
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures of the scorer, which share one pass through it."""
    corruption: Corruption | None = None
    """What is done to the samples before they are scored."""
    own_model: ArmName | None = None
    """The model that drew the samples, if scores are averaged over its next token."""

    @property
    def is_plain(self) -> bool:
        """Whether samples are scored as they were drawn, at temperature 1, token by token.

        A second judge may have tokens of its own.
        """
        own_tokens = self.scorer == SECOND_JUDGE
        return self.temperatures == (1.0,) and not (self.corruption or self.own_model or own_tokens)

    @property
    def scorer_name(self) -> str:
        """Name of the scores in the results, at temperature 1."""
        return f"{self.scorer}-expected" if self.own_model else self.scorer

    @property
    def arm(self) -> str:
        name = f"{self.sampler}-under-{self.scorer_name}"
        if self.temperatures == (1.0,):
            return name
        return f"{name}-T{'-'.join(f'{temperature:g}' for temperature in self.temperatures)}"


def pairs(config: LanguageConfig) -> Iterator[Pair]:
    """Yield all pairs: samples of models under truth (precision), then of truth under models.

    The latter give recall. Temperatures other than 1 are pairs of their own, so that a finished run
    can be extended by them. So are scores averaged over the next token, truth's samples that are
    damaged before they are scored, and all evaluation sets under a second judge.
    """
    for sample_set in sample_sets(config):
        if sample_set.evaluation and sample_set.stage == SAMPLE_STUDENTS:
            samples = (sample_set.stage, sample_set.arm)
            yield Pair(sampler=sample_set.arm, samples=samples, scorer="truth", model=TRUTH_MODEL)
    for trainee in trainees(config):
        model = (trainee.stage, trainee.name)
        pair = Pair(sampler="truth", samples=TRUTH_EVAL, scorer=trainee.name, model=model)
        yield pair
        if temperatures := _scored_temperatures(config, trainee):
            yield replace(pair, temperatures=temperatures)
    if config.scoring.expected:
        yield from _expected_pairs(config)
    for kind in config.scoring.corruptions:
        scorers = [("truth", TRUTH_MODEL)]
        scorers += [(trainee.name, (trainee.stage, trainee.name)) for trainee in trainees(config)]
        for scorer, model in scorers:
            yield Pair(
                sampler=f"truth-{kind}", samples=TRUTH_EVAL, scorer=scorer, model=model,
                corruption=kind,
            )  # fmt: skip
    if config.truth.second_judge is not None:
        for sample_set in sample_sets(config):
            if sample_set.evaluation:
                is_truth = sample_set.stage == SAMPLE_TRUTH
                yield Pair(
                    sampler="truth" if is_truth else sample_set.arm,
                    samples=(sample_set.stage, sample_set.arm),
                    scorer=SECOND_JUDGE,
                    model=SECOND_JUDGE_MODEL,
                )


def _expected_pairs(config: LanguageConfig) -> Iterator[Pair]:
    """Yield students under the truth and the truth under them, averaged over the next token.

    Truth under itself gives the entropy of its next token.
    """
    yield Pair(
        sampler="truth", samples=TRUTH_EVAL, scorer="truth", model=TRUTH_MODEL,
        own_model=TRUTH_MODEL,
    )  # fmt: skip
    for trainee in trainees(config):
        if trainee.kind == "student":
            name, model = trainee.name, (trainee.stage, trainee.name)
            samples = (SAMPLE_STUDENTS, name)
            yield Pair(
                sampler=name, samples=samples, scorer="truth", model=TRUTH_MODEL, own_model=model
            )
            yield Pair(
                sampler="truth", samples=TRUTH_EVAL, scorer=name, model=model, own_model=TRUTH_MODEL
            )
