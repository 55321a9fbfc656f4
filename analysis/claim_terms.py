"""What a claim is about: a measure of one student against another, as statistics of each seed.

`MEASURES` are in nats per token:

    precision, recall, divergence (KL(p''||p*))  a change from the student `against` to `of`
    divergence-beyond-share  the part of precision that is less KL(p''||p*), less 0.2 of precision:
                  a change below 0 says that more than 0.8 of a gain in precision is lower entropy
                  (with `eos: mask`, and less of the end tokens, which precision leaves out)
    control-recall  recall of the student `against` at the temperature at which it has the precision
                  of the student `of`, less the recall of that
    held-out-precision, held-out-recall  two predictions of the change of the students of `size`
                  from those of all smaller sizes with the same training, each a power law in the
                  number of parameters: towards 0, or towards the change of their teachers. The
                  error of the first less the error of the second; above 0, the second is better
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from study import Measure, Study, at_equal_precision
from verdicts import ENTROPY_SHARE

from kdhpc.science.intervals import SeedMean, Statistic, over_seeds

TEACHER = "teacher"
"""Stands for a size: the change is then that of the teachers, sampled and scored at each tau."""
HELD_OUT = {"held-out-precision": "precision", "held-out-recall": "recall"}
MEASURES = (
    "precision", "recall", "divergence", "divergence-beyond-share", "control-recall", *HELD_OUT,
)  # fmt: skip
EXPONENTS = np.arange(41) * 0.05
"""Exponents of the power laws that are tried, 0 to 2; with 0 nothing changes with size."""
STEP = 1e-4
"""Step of numerical derivatives, in nats per token."""
Floats = NDArray[np.float64]
BySeed = Mapping[int, Statistic]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A change of a measure from one student to another."""

    measure: str
    of: str
    against: str
    size: str | None = None
    """Size of the students, or `teacher`; None for a claim about each size."""
    minus: "Term | None" = None
    """A term that is subtracted, seed by seed."""

    def __str__(self) -> str:
        own = f"{self.measure} of {self.of} against {self.against}"
        own += f" at {self.size}" if self.size else ""
        return f"{own}, less {self.minus}" if self.minus else own


def mean_of(study: Study, term: Term, size: str) -> SeedMean | None:
    """Return the mean of a term over seeds; None if it has no value in some seed.

    Args:
        study: the run.
        term: the term.
        size: size of the students, if the term names none.
    """
    values = _values(study, term, size)
    if not values or any(value is None for value in values.values()):
        return None
    return over_seeds([value for value in values.values() if value is not None])


def _values(study: Study, term: Term, size: str) -> dict[int, Statistic | None]:
    """Return a term for each seed that has both of its students; None where it has no value."""
    size = term.size or size
    values: dict[int, Statistic | None]
    if term.measure in HELD_OUT:
        values = {**_held_out(study, term, size)}
    elif size == TEACHER:
        values = {**teachers(study, term.measure, term.of, term.against)}
    elif term.measure == "control-recall":
        students, bases = study.of(size, term.of), study.of(size, term.against)
        values = {
            seed: at_equal_precision(study, bases[seed], students[seed])
            for seed in students
            if seed in bases
        }
    else:
        values = {**students_of(study, term.measure, term.of, term.against, size)}
    if term.minus is None:
        return values
    others = _values(study, term.minus, size)
    return {seed: _less(value, others[seed]) for seed, value in values.items() if seed in others}


def _less(value: Statistic | None, other: Statistic | None) -> Statistic | None:
    return None if value is None or other is None else value - other


def students_of(study: Study, measure: str, of: str, against: str, size: str) -> BySeed:
    """Return the change of a measure from one student of a size to another, by seed."""
    of_student: Mapping[str, Measure] = {
        "precision": study.precision,
        "recall": study.recall,
        "divergence": study.divergence,
        "divergence-beyond-share": lambda s: (
            -study.divergence(s) - (1.0 - ENTROPY_SHARE) * study.precision(s)
        ),
    }
    if measure.startswith("divergence") and not study.has_divergences:
        return {}
    measured = of_student[measure]
    ours, theirs = study.of(size, of), study.of(size, against)
    return {seed: measured(ours[seed]) - measured(theirs[seed]) for seed in ours if seed in theirs}


def teachers(study: Study, measure: str, of: str, against: str) -> BySeed:
    """Return the change of the teachers' precision or recall from one tau to another, by seed."""
    column = ("precision", "recall").index(measure)
    changes = {}
    for seed in sorted({student.seed for student in study.students}):
        name = f"{TEACHER}-s{seed}"
        if all(study.has_teacher(name, float(tau)) for tau in (of, against)):
            ours, theirs = (study.teacher(name, float(tau))[column] for tau in (of, against))
            changes[seed] = ours - theirs
    return changes


def _held_out(study: Study, term: Term, size: str) -> BySeed:
    """Return the error of `towards 0` less that of `towards the teacher`, by seed."""
    measure = HELD_OUT[term.measure]
    smaller = study.smaller_sizes(size)
    of_sizes = [
        students_of(study, measure, term.of, term.against, name) for name in (*smaller, size)
    ]
    limits = teachers(study, measure, term.of, term.against)
    parameters = np.array([study.parameters(name) for name in (*smaller, size)], dtype=np.float64)
    seeds = set.intersection({*limits}, *({*of_size} for of_size in of_sizes))
    if len(smaller) < 2:
        return {}

    def error(values: Floats) -> float:
        *changes, limit = values
        known, target = np.array(changes[:-1]), changes[-1]
        towards = [
            end + extrapolate(parameters[:-1], known - end, parameters[-1]) for end in (0.0, limit)
        ]
        return float(abs(towards[0] - target) - abs(towards[1] - target))

    return {
        seed: through(error, [*(of_size[seed] for of_size in of_sizes), limits[seed]])
        for seed in sorted(seeds)
    }


def extrapolate(parameters: Floats, values: Floats, at: float) -> float:
    """Fit values by a * parameters^-b with b from 0 to 2, by least squares; return that at `at`.

    Args:
        parameters: [M] numbers of parameters.
        values: [M] what is fitted.
        at: number of parameters to predict at.
    """
    powers = (parameters[:, None] / at) ** -EXPONENTS
    scales = (powers * values[:, None]).sum(axis=0) / (powers**2).sum(axis=0)
    errors = ((scales * powers - values[:, None]) ** 2).sum(axis=0)
    return float(scales[int(errors.argmin())])


def through(function: Callable[[Floats], float], of: Sequence[Statistic]) -> Statistic:
    """Return a function of statistics of one seed, linearised by central differences."""
    values = np.array([statistic.value for statistic in of])
    result = Statistic(value=function(values), influence={})
    for index, statistic in enumerate(of):
        step = np.zeros(len(of))
        step[index] = STEP
        slope = (function(values + step) - function(values - step)) / (2.0 * STEP)
        result = result + slope * replace(statistic, value=0.0)
    return result
