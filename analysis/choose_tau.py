#!/usr/bin/env python
"""Choose the tau of a teacher for a purpose, from a whole sweep and from its teacher alone.

    python analysis/choose_tau.py RUN --recall-loss 0.05
    python analysis/choose_tau.py RUN --precision -2.0
    python analysis/choose_tau.py RUN --weight 1.0
    python analysis/choose_tau.py RUN --metric NAME

--recall-loss   the most precise students that lose at most this recall against tau 1
--precision     the students of the highest recall that have at least this precision
--weight        the highest precision + WEIGHT * recall
--metric        the highest mean of any stored score of the students' samples, by its scorer's name

Numbers are in nats per token. *Measured* is what the students of the sweep say. *Predicted* is what
one would choose without a sweep: from the teachers' own precision and recall at each tau, and from
one pilot student at the lowest tau, whose gain in precision scales the teacher's. The regret is
what the predicted choice loses against the measured one, over the seeds without the pilot. Nothing
is written.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import files
import judges
from prediction import PLAIN, factor
from rich.console import Console
from rich.table import Table
from study import Student, Study

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.pipeline import LANGUAGE
from kdhpc.science.intervals import SeedMean, Statistic, over_seeds


@dataclass(frozen=True, kw_only=True)
class Point:
    """Precision and recall of a tau in nats per token, and the stored score that was asked for."""

    precision: float
    recall: float
    metric: float = math.nan


Curve = Mapping[str, Point]
"""Points by the label of their tau."""
Worth = Callable[[Point, Curve], float]
"""What a point of a curve is worth; minus infinity if it is not allowed."""


def worth_of(options: argparse.Namespace) -> Worth:
    """Return what the options ask to be as high as possible."""
    if options.recall_loss is not None:
        loss = options.recall_loss
        return lambda at, curve: (
            at.precision if curve[PLAIN].recall - at.recall <= loss else -math.inf
        )
    if options.precision is not None:
        least = options.precision
        return lambda at, curve: at.recall if at.precision >= least else -math.inf
    if options.weight is not None:
        weight = options.weight
        return lambda at, curve: at.precision + weight * at.recall
    return lambda at, curve: at.metric


def choose(curve: Curve, worth: Worth) -> str | None:
    """Return the tau of the highest worth; None if no tau is allowed."""
    values = {tau: worth(point, curve) for tau, point in curve.items()}
    best = max(values, key=lambda tau: values[tau])
    return best if values[best] > -math.inf else None


def measured(study: Study, size: str, seeds: list[int], scorer: str | None) -> dict[str, Point]:
    """Return the mean over seeds of the students at each tau."""
    curve = {}
    for tau in study.taus(size):
        students = [study.of(size, tau)[seed] for seed in seeds]
        curve[tau] = Point(
            precision=_mean([study.precision(student) for student in students]),
            recall=_mean([study.recall(student) for student in students]),
            metric=_mean([study.score(s.name, scorer) for s in students]) if scorer else math.nan,
        )
    return curve


def predicted(study: Study, size: str, pilot: int) -> dict[str, Point] | None:
    """Predict the students at each tau from the pilot's teacher, one student and the one of tau 1.

    None if the teachers were not scored at each tau, which needs decode_temperatures.
    """
    taus, teacher = study.taus(size), f"teacher-s{pilot}"
    if any(not study.has_teacher(teacher, float(tau)) for tau in taus):
        return None
    curve = {tau: study.teacher(teacher, float(tau)) for tau in taus}
    plain = study.of(size, PLAIN)[pilot]
    start = Point(precision=study.precision(plain).value, recall=study.recall(plain).value)
    scale = factor(study, size, pilot) or 1.0
    return {
        tau: Point(
            precision=start.precision + scale * (precision.value - curve[PLAIN][0].value),
            recall=start.recall + recall.value - curve[PLAIN][1].value,
        )
        for tau, (precision, recall) in curve.items()
    }


def chosen(study: Study, size: str, options: argparse.Namespace) -> list[str]:
    """Return what is chosen for students of a size, in sentences.

    Args:
        study: the run.
        size: size of the students.
        options: `recall_loss`, `precision`, `weight` and `metric`, of which one is not None.
    """
    if PLAIN not in study.taus(size):
        return [f"{size}: no students of tau 1; nothing is chosen"]
    worth = worth_of(options)
    seeds = shared_seeds(study, size)
    if not seeds:
        return [f"{size}: no seed has its students of all taus; nothing is chosen"]
    curve = measured(study, size, seeds, options.metric)
    best = choose(curve, worth)
    by_seed = Counter(choose(measured(study, size, [s], options.metric), worth) for s in seeds)
    forecast = None if options.metric else predicted(study, size, seeds[0])
    if best is None:
        first = f"{size}: no tau of this sweep is allowed"
    else:
        first = f"{size}: tau {best}" + _changes(study, size, best)
    counts = ", ".join(f"{tau or 'none'} in {count}" for tau, count in by_seed.items())
    lines = [first, f"seed by seed: tau {counts} of {len(seeds)}"]
    if forecast is not None:
        guess = choose(forecast, worth)
        lines.append(f"predicted from teacher and pilot of seed {seeds[0]}: tau {guess or 'none'}")
        if len(seeds) > 1 and guess is not None:
            others = measured(study, size, seeds[1:], options.metric)
            target = choose(others, worth)
            regret = math.nan if target is None else worth(others[target], others)
            regret -= worth(others[guess], others)
            lines[-1] += f"; regret over the other seeds {_regret(regret)}"
    elif not options.metric:
        lines.append("predicted: needs teachers that are scored at each tau (decode_temperatures)")
    return lines


def _regret(regret: float) -> str:
    if math.isinf(regret):
        return "not defined: there, the predicted tau is not allowed"
    return "not defined: there, no tau is allowed" if math.isnan(regret) else f"{regret:.3f}"


def _changes(study: Study, size: str, tau: str) -> str:
    """Say what a tau changes against tau 1."""
    changes = (
        study.contrast(size, tau, PLAIN, measure) for measure in (study.precision, study.recall)
    )
    precision, recall = (_interval(change) for change in changes)
    return f"; against tau 1 precision {precision} and recall {recall}"


def _interval(change: SeedMean | None) -> str:
    if change is None:
        return "unknown"
    about = " (one training: sampling error only)" if change.num_seeds == 1 else ""
    return f"{change.estimate:+.3f} [{change.low:.3f}, {change.high:.3f}]{about}"


def shared_seeds(study: Study, size: str) -> list[int]:
    """Return the seeds that have students of a size at all of its taus."""
    return sorted(set.intersection(*({*study.of(size, tau)} for tau in study.taus(size))))


def _print(study: Study, size: str, scorer: str | None) -> None:
    """Print the table of a size, if a seed has its students of all taus."""
    if PLAIN not in study.taus(size) or not (seeds := shared_seeds(study, size)):
        return
    curve = measured(study, size, seeds, scorer)
    forecast = None if scorer else predicted(study, size, seeds[0])
    table = Table(title=f"{size}: mean in nats per token", title_justify="left", box=None)
    table.add_column("tau")
    for name in ("precision", "recall", "predicted precision", "predicted recall"):
        table.add_column(name, justify="right")
    for tau, point in curve.items():
        guess = forecast[tau] if forecast else Point(precision=math.nan, recall=math.nan)
        values = (point.precision, point.recall, guess.precision, guess.recall)
        table.add_row(tau, *("" if math.isnan(value) else f"{value:.3f}" for value in values))
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError("expected a finite number")
    return number


def _mean(statistics: list[Statistic]) -> float:
    return over_seeds(statistics).estimate


def main(arguments: list[str]) -> int:
    """Read results.h5 and print what is chosen for students of each size."""
    parser = files.parser(__doc__, writes=False)
    purpose = parser.add_mutually_exclusive_group(required=True)
    for name in ("--recall-loss", "--precision", "--weight"):
        metavar = "NATS" if name != "--weight" else "WEIGHT"
        purpose.add_argument(name, type=_finite, metavar=metavar)
    purpose.add_argument("--metric", metavar="NAME")
    options = parser.parse_args(arguments)
    analysis = files.read(options, LANGUAGE)
    study = Study(analysis.results)
    if not any(PLAIN in study.taus(size) for size in study.sizes):
        raise InputError(
            f"{analysis.path}: no students of tau 1 with both of their scores; expected a sweep "
            "with tau 1"
        )
    if options.metric:
        _check_metric(study, study.students, options.metric)
    for note in judges.notes(study):
        print(note)
    for size in study.sizes:
        _print(study, size, options.metric)
        for line in chosen(study, size, options):
            print(line)
    return 0


def _check_metric(study: Study, students: list[Student], scorer: str) -> None:
    known = {of for sampler, of in study.scores if sampler in {s.name for s in students}}
    missing = [s.name for s in students if (s.name, scorer) not in study.scores]
    if missing:
        raise InputError(
            f"--metric {scorer}: {missing[0]} has no such score; expected one of "
            f"{', '.join(sorted(known))}"
        )


if __name__ == "__main__":
    command(main)
