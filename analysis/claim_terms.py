"""Terms of claims (kdhpc/experiment/claims.py says what they are) as statistics of each seed."""

from collections.abc import Callable, Mapping

import mode_terms
import numpy as np
from numpy.typing import NDArray
from study import Measure, Student, Study, at_equal_precision
from verdicts import ENTROPY_SHARE

from kdhpc.experiment.claims import BEST_OF, BY_MODE, HELD_OUT, OF_TEACHERS, TEACHER, Term
from kdhpc.science.intervals import SeedMean, Statistic, over_seeds, through
from kdhpc.science.modes import Slope

EXPONENTS = np.arange(2001) * 0.001
"""Exponents of the power laws that are tried, 0 to 2; with 0 nothing changes with size."""
Floats = NDArray[np.float64]
BySeed = Mapping[int, Statistic]


def tested(study: Study, term: Term, size: str) -> SeedMean | Slope | None:
    """Return what a claim tests of a term: its mean over seeds, or its slope over modes."""
    if term.measure in BY_MODE:
        return mode_terms.slope_of(study, term.measure, term.of, term.against, term.size or size)
    return mean_of(study, term, size)


def mean_of(study: Study, term: Term, size: str) -> SeedMean | None:
    """Return the mean of a term over the seeds that have its students.

    None if there is none, or if it has no value in one of them.

    Args:
        study: the run.
        term: the term.
        size: size of the students, if the term names none.
    """
    return whole_mean(_values(study, term, size))


def whole_mean(values: Mapping[int, Statistic | None]) -> SeedMean | None:
    """Return the mean of statistics by seed; None if there is none, or one is not known."""
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
        values = kept(study, term.of, term.against, size, at_equal_precision)
    else:
        values = {**students_of(study, term.measure, term.of, term.against, size)}
    if term.minus is None:
        return values
    others = _values(study, term.minus, size)
    return {seed: _less(value, others[seed]) for seed, value in values.items() if seed in others}


def kept(
    study: Study,
    of: str,
    against: str,
    size: str,
    interpolated: Callable[[Study, Student, Student], Statistic | None],
) -> dict[int, Statistic | None]:
    """Return the recall that the student `against` keeps at the precision of `of`, by seed.

    Args:
        study: the run.
        of: label of the distilled student.
        against: label of the student whose temperature is changed.
        size: size of both.
        interpolated: `at_equal_precision`, or the same with a smooth curve.
    """
    students, bases = study.of(size, of), study.of(size, against)
    return {s: interpolated(study, bases[s], students[s]) for s in students if s in bases}


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
    if best := BEST_OF.fullmatch(measure):
        kind, k = best[1], int(best[2])
        if not study.has_best(kind) or study.answers_per_prompt < k:
            return {}
        of_student = {measure: lambda s: study.best_of(s.name, k, kind)}
    measured = of_student[measure]
    ours, theirs = study.of(size, of), study.of(size, against)
    return {seed: measured(ours[seed]) - measured(theirs[seed]) for seed in ours if seed in theirs}


def teachers(study: Study, measure: str, of: str, against: str) -> BySeed:
    """Return the change of the teachers' precision or recall from one tau to another, by seed."""
    column = OF_TEACHERS.index(measure)
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
    smaller = study.smaller_sizes(size) if size in study.sizes else []
    of_sizes = [
        students_of(study, measure, term.of, term.against, name) for name in (*smaller, size)
    ]
    limits = teachers(study, measure, term.of, term.against)
    parameters = np.array([study.parameters(name) for name in (*smaller, size)], dtype=np.float64)
    seeds = set.intersection({*limits}, *({*of_size} for of_size in of_sizes))
    if len(smaller) < 2:
        return {}

    return {
        seed: through(
            lambda values: law_errors(parameters, values),
            [*(of_size[seed] for of_size in of_sizes), limits[seed]],
        )
        for seed in sorted(seeds)
    }


def law_errors(parameters: Floats, values: Floats) -> float:
    """Return the error of a law towards 0 less that of a law towards the teacher's change.

    Args:
        parameters: [M] numbers of parameters, the held-out size last.
        values: [M + 1] changes at these sizes, and the teacher's.
    """
    *changes, limit = values
    known, target = np.array(changes[:-1]), changes[-1]
    towards = [
        end + extrapolate(parameters[:-1], known - end, parameters[-1]) for end in (0.0, limit)
    ]
    return float(abs(towards[0] - target) - abs(towards[1] - target))


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
