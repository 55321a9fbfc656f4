"""Predict what students at a tau gain and lose from their teachers, and one pilot student.

The prediction of a seed's change from tau 1 is a times its teacher's change of precision, and its
teacher's change of recall. The factor a is that of one pilot: of the first seed, the smallest size
and the lowest tau. Errors are over all other seeds.
"""

from dataclasses import dataclass

from claim_terms import students_of, teachers
from study import Study

from kdhpc.science.intervals import SeedMean, Statistic, over_seeds

PLAIN = "1"
"""Label of the tau that changes are counted from."""


@dataclass(frozen=True, kw_only=True)
class Error:
    """Change of the students from tau 1, and what was predicted of it, over seeds but the pilot's.

    All numbers are in nats per token.
    """

    size: str
    tau: str
    precision: SeedMean
    """Change of precision."""
    precision_error: SeedMean
    """The same less the prediction."""
    recall: SeedMean
    recall_error: SeedMean
    largest: tuple[float, float]
    """Largest error of a single seed without its sign, in precision and in recall."""


def factor(study: Study, size: str, pilot: int) -> float | None:
    """Return a, the precision that the pilot gains, divided by that of its teacher.

    None if there is no such pilot, or its teacher gains nothing or was not scored at its tau.

    Args:
        study: the run.
        size: size of the pilot.
        pilot: seed of the pilot.
    """
    taus = study.taus(size)
    if PLAIN not in taus or taus[-1] == PLAIN:
        return None
    student = students_of(study, "precision", taus[-1], PLAIN, size)
    teacher = teachers(study, "precision", taus[-1], PLAIN)
    if pilot not in student or pilot not in teacher or not teacher[pilot].value:
        return None
    return student[pilot].value / teacher[pilot].value


def pilot_seed(study: Study) -> int:
    """Return the seed of the pilot, the first one."""
    return min(student.seed for student in study.students)


def errors(study: Study, sizes: list[str]) -> list[Error]:
    """Return the errors at every tau of some sizes, whose pilot is the first of them.

    Args:
        study: the run.
        sizes: sizes of students, the smallest first.
    """
    pilot = pilot_seed(study)
    scale = factor(study, sizes[0], pilot)
    if scale is None:
        return []
    found = []
    for size in sizes:
        for tau in study.taus(size):
            if tau == PLAIN:
                continue
            changes: dict[str, list[Statistic]] = {}
            off: dict[str, list[Statistic]] = {}
            for measure, times in (("precision", scale), ("recall", 1.0)):
                students = students_of(study, measure, tau, PLAIN, size)
                of_teachers = teachers(study, measure, tau, PLAIN)
                seeds = [s for s in students if s in of_teachers and s != pilot]
                changes[measure] = [students[seed] for seed in seeds]
                off[measure] = [students[s] - times * of_teachers[s] for s in seeds]
            if not off["precision"] or not off["recall"]:
                continue
            found.append(
                Error(
                    size=size,
                    tau=tau,
                    precision=over_seeds(changes["precision"]),
                    precision_error=over_seeds(off["precision"]),
                    recall=over_seeds(changes["recall"]),
                    recall_error=over_seeds(off["recall"]),
                    largest=(_largest(off["precision"]), _largest(off["recall"])),
                )
            )
    return found


def _largest(of_seeds: list[Statistic]) -> float:
    return max(abs(statistic.value) for statistic in of_seeds)
