"""Names and recipes of the models and sample sets of the experiment: what the stages agree on.

A model is called `truth`, `teacher-s0`, `student-s0-small-direct` or `student-s0-small-tau0.8`; a
teacher sampled through a selector is `teacher-s0-tau0.8`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kdhpc.config import LanguageConfig, Model

TRUTH, SAMPLE_TRUTH, TRAIN_ON_TRUTH = "truth", "sample-truth", "train-on-truth"
SAMPLE_TEACHER, TRAIN_STUDENTS, SAMPLE_STUDENTS = (
    "sample-teacher",
    "train-students",
    "sample-students",
)
SCORE, MERGE = "score", "merge"
TRUTH_EVAL = (SAMPLE_TRUTH, "eval")
"""Stage and arm of truth's evaluation set."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One way in which a teacher is sampled: a temperature, or a truncation at temperature 1."""

    name: str
    tau: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def fields(self) -> dict[str, Any]:
        return {"tau": self.tau, "top_k": self.top_k, "top_p": self.top_p}


PLAIN = Selection(name="tau1")


def selections(config: LanguageConfig) -> Iterator[Selection]:
    """Every way in which teachers are sampled, one a student."""
    for tau in config.taus:
        yield Selection(name=f"tau{tau:g}", tau=tau)
    for text in config.sampling.truncations:
        name, _, value = text.partition("=")
        if name == "top_k":
            yield Selection(name=f"topk{value}", top_k=int(value))
        else:
            yield Selection(name=f"topp{value}", top_p=float(value))


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A model that the run trains on samples."""

    name: str
    model: Model
    stage: str
    """Where it is trained."""
    data: tuple[str, str]
    """Stage and arm of the samples that it is trained on."""
    facts: dict[str, Any]
    """What the analysis groups by: kind, seed, size, tau."""


def teacher_name(seed: int) -> str:
    return f"teacher-s{seed}"


def trainees(config: LanguageConfig) -> Iterator[Trainee]:
    """Teachers, direct students and distilled students, in pipeline order."""
    for seed in range(config.seeds):
        yield Trainee(
            name=teacher_name(seed),
            model=config.teacher,
            stage=TRAIN_ON_TRUTH,
            data=(SAMPLE_TRUTH, "train"),
            facts={"kind": "teacher", "seed": seed, "size": "teacher", "arm": "direct", "tau": 1.0},
        )
        for size, model in config.students.items():
            yield Trainee(
                name=f"student-s{seed}-{size}-direct",
                model=model,
                stage=TRAIN_ON_TRUTH,
                data=(SAMPLE_TRUTH, "train"),
                facts={"kind": "student", "seed": seed, "size": size, "arm": "direct", "tau": 1.0},
            )
    for seed in range(config.seeds):
        for selection in selections(config):
            for size, model in config.students.items():
                yield Trainee(
                    name=f"student-s{seed}-{size}-{selection.name}",
                    model=model,
                    stage=TRAIN_STUDENTS,
                    data=(SAMPLE_TEACHER, f"s{seed}-{selection.name}"),
                    facts={
                        "kind": "student",
                        "seed": seed,
                        "size": size,
                        "arm": selection.name,
                        "tau": selection.tau,
                    },
                )


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Sequences of one model under one selection."""

    stage: str
    arm: str
    stream: str
    """Name of the random stream that they are drawn from."""
    model: tuple[str, str]
    """Stage and arm of the model."""
    dtype: str
    selection: Selection
    evaluation: bool


def sample_sets(config: LanguageConfig) -> Iterator[SampleSet]:
    """All sample sets, in pipeline order."""
    for use in ("train", "eval"):
        yield SampleSet(
            stage=SAMPLE_TRUTH,
            arm=use,
            stream=f"truth/{use}",
            model=(TRUTH, "truth"),
            dtype=config.truth.dtype,
            selection=PLAIN,
            evaluation=use == "eval",
        )
    teacher_dtype = config.teacher.training.dtype
    for seed in range(config.seeds):
        for selection in selections(config):
            for evaluation in (False, True):
                use = "eval" if evaluation else "train"
                yield SampleSet(
                    stage=SAMPLE_STUDENTS if evaluation else SAMPLE_TEACHER,
                    arm=f"{teacher_name(seed)}-{selection.name}"
                    if evaluation
                    else f"s{seed}-{selection.name}",
                    stream=f"teacher/s{seed}/{selection.name}/{use}",
                    model=(TRAIN_ON_TRUTH, teacher_name(seed)),
                    dtype=teacher_dtype,
                    selection=selection,
                    evaluation=evaluation,
                )
    for trainee in trainees(config):
        if trainee.facts["kind"] == "student":
            facts = trainee.facts
            yield SampleSet(
                stage=SAMPLE_STUDENTS,
                arm=trainee.name,
                stream=f"student/s{facts['seed']}/{facts['size']}/{facts['arm']}/eval",
                model=(trainee.stage, trainee.name),
                dtype=trainee.model.training.dtype,
                selection=PLAIN,
                evaluation=True,
            )
