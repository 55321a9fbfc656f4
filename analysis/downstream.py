#!/usr/bin/env python
"""Print the scores of a run's models in its tasks, and how they go with precision and recall.

    python analysis/downstream.py RUN [--out FOLDER]

RUN is a run's name or folder, or a file of results, of a run with `downstream.tasks`. Writes
downstream.csv and downstream_correlations.csv next to the results, or to FOLDER.

The first table has a row for each metric and model: truth, teachers, students, and initial
weights, whose score is chance. Intervals are 95 %: of means over seeds, over seeds and items; of
truth and initial weights, over items alone. Items that depend on each other count as one
(docs/downstream.md).

The second table has Spearman's rank correlation of a score with precision, and with recall, over
the students of a seed, given their size if there are several, and its mean over seeds. Its interval
is over seeds. `rises` and `falls` mean that it is above or below 0; otherwise, or with fewer than 3
seeds in which scores differ, it is undecided. A correlation is no cause: students with a low tau
are precise and sharp at once.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import files
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from study import Student, Study

from kdhpc.cluster.display import WIDTH, command
from kdhpc.config import downstream as tasks
from kdhpc.errors import InputError
from kdhpc.experiment.downstream import CLUSTER
from kdhpc.pipeline import LANGUAGE
from kdhpc.science.intervals import SeedMean, Statistic, over_seeds, ratio
from kdhpc.storage.hdf5 import Arrays
from kdhpc.storage.results import Results

LEAST_SEEDS, LEAST_STUDENTS = 3, 3
"""Fewer seeds, or students of a seed, decide nothing."""
INSTRUCTION_METRICS = ((tasks.INSTRUCTIONS, "acc"), (tasks.ANSWERS, "exact_match"))
OPEN_METRIC = (tasks.OPEN, "distinct")
Metric = tuple[str, str]
"""Names of a task and of one of its metrics."""
Direction = Literal["rises", "falls", "undecided"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A row of the first table."""

    task: str
    metric: str
    model: str
    num_models: int
    """Number of seeds, or 1."""
    num_items: int
    score: float
    low: float
    high: float
    """Both ends of the interval; NaN if all items depend on each other."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """A row of the second table."""

    task: str
    metric: str
    measure: str
    """`precision` or `recall`."""
    num_seeds: int
    """Number of seeds in which the correlation exists."""
    correlation: float
    low: float
    high: float
    direction: Direction


def metrics_of(results: Results) -> list[Metric]:
    """Return every task and metric, in order."""
    found = [(t, n) for (_, t), of in results.downstream.items() for n in of if n != CLUSTER]
    return sorted(dict.fromkeys(found))


def statistic(arrays: Arrays, metric: str, task: str) -> Statistic | None:
    """Return the mean of a metric over items, with groups of items as rows; None if it has none.

    All models have the same items of a task, so its rows are paired between models.
    """
    values, cluster = np.asarray(arrays[metric], np.float64), np.asarray(arrays[CLUSTER])
    known = np.isfinite(values)
    if not known.any():
        return None
    size = int(cluster.max()) + 1
    sums = np.bincount(cluster[known], values[known], minlength=size)
    counts = np.bincount(cluster[known], minlength=size)
    if size < 2:
        return Statistic(value=float(sums[0] / counts[0]), influence={task: np.zeros(2)})
    return ratio(sums, counts, rows=task)


def groups(study: Study) -> Iterator[tuple[str, list[str]]]:
    """Yield what is averaged over seeds: its name, and the names of the models in it."""
    models = study.results.models
    yield "truth", ["truth"]
    yield "teacher", [name for name, facts in models.items() if facts["kind"] == "teacher"]
    for size in study.sizes:
        for label in study.labels(size):
            shown = f"tau {label}" if label[0].isdigit() else label
            yield f"{size}, {shown}", [s.name for s in study.of(size, label).values()]
    for name, facts in models.items():
        if facts["kind"] == "initial":
            yield f"{facts['size']}, initial", [name]


def scores(study: Study) -> list[Score]:
    """Return a row for each metric and group of models that has it."""
    rows = []
    for task, metric in metrics_of(study.results):
        for group, names in groups(study):
            of_models = [
                (arrays, found)
                for name in names
                if (arrays := study.results.downstream.get((name, task))) is not None
                if (found := statistic(arrays, metric, task)) is not None
            ]
            if of_models:
                mean = over_seeds([found for _, found in of_models])
                first = of_models[0][0]
                has_error = int(first[CLUSTER].max()) > 0
                rows.append(
                    Score(
                        task=task,
                        metric=metric,
                        model=group,
                        num_models=len(of_models),
                        num_items=len(first[metric]),
                        score=mean.estimate,
                        low=mean.low if has_error else math.nan,
                        high=mean.high if has_error else math.nan,
                    )
                )
    return rows


def partial_spearman(one: Sequence[float], two: Sequence[float], given: Sequence[float]) -> float:
    """Return the rank correlation of two variables given a third, which may be constant.

    It is the partial correlation of ranks. NaN if there are fewer than three values, a variable is
    constant, or the third determines one of the two.
    """
    if len(one) < LEAST_STUDENTS:
        return math.nan
    ranks = np.stack([rankdata(values) for values in (one, two, given)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    if (control := ranks[2] @ ranks[2]) > 0.0:
        ranks[:2] -= np.outer(ranks[:2] @ ranks[2], ranks[2]) / control
    sizes = np.sqrt((ranks[:2] ** 2).sum(axis=1))
    if sizes.min() < 1e-9 * len(one):
        return math.nan
    return float(np.clip(ranks[0] @ ranks[1] / sizes.prod(), -1.0, 1.0))


def correlations(study: Study) -> list[Correlation]:
    """Return the rank correlations of every metric with precision and with recall."""
    return [
        correlation(study, metric, measure)
        for metric in metrics_of(study.results)
        for measure in ("precision", "recall")
    ]


def correlation(study: Study, metric: Metric, measure: str) -> Correlation:
    """Return the rank correlation of a metric with precision or recall, over seeds."""
    of: Callable[[Student], Statistic] = getattr(study, measure)
    per_seed: list[float] = []
    for seed in sorted({student.seed for student in study.students}):
        students = [
            (student, found)
            for student in study.students
            if student.seed == seed and (found := _score_of(study, student, metric)) is not None
        ]
        value = partial_spearman(
            [of(student).value for student, _ in students],
            [found for _, found in students],
            [study.parameters(student.size) for student, _ in students],
        )
        per_seed += [value] if math.isfinite(value) else []
    # The interval is over seeds alone, so no row moves the value.
    fixed = [Statistic(value=value, influence={"none": np.zeros(2)}) for value in per_seed]
    mean = over_seeds(fixed) if len(fixed) >= LEAST_SEEDS else None
    return Correlation(
        task=metric[0],
        metric=metric[1],
        measure=measure,
        num_seeds=len(per_seed),
        correlation=float(np.mean(per_seed)) if per_seed else math.nan,
        low=mean.low if mean else math.nan,
        high=mean.high if mean else math.nan,
        direction=_direction(mean),
    )


def _score_of(study: Study, student: Student, metric: Metric) -> float | None:
    arrays = study.results.downstream.get((student.name, metric[0]))
    if arrays is None or metric[1] not in arrays:
        return None
    found = statistic(arrays, metric[1], metric[0])
    return None if found is None else found.value


def _direction(mean: SeedMean | None) -> Direction:
    if mean is None or mean.low <= 0.0 <= mean.high:
        return "undecided"
    return "rises" if mean.low > 0.0 else "falls"


def verdict(correlated: Sequence[Correlation]) -> list[str]:
    """Say whether precise students follow instructions better, and write worse in the open.

    An answer needs all metrics that differ between students to agree.
    """
    with_precision = {
        (row.task, row.metric): row for row in correlated if row.measure == "precision"
    }
    lines = []
    for question, metrics, expected in (
        ("do high-precision students follow instructions better?", INSTRUCTION_METRICS, "rises"),
        ("do they write less variously where the end is open?", (OPEN_METRIC,), "falls"),
    ):
        rows = [with_precision[metric] for metric in metrics if metric in with_precision]
        directions = {row.direction for row in rows if row.num_seeds}
        answer = "undecided"
        if len(directions) == 1 and "undecided" not in directions:
            answer = "yes" if directions == {expected} else "no, the opposite"
        why = ", ".join(f"{row.task} {row.metric} {row.direction}" for row in rows)
        lines.append(f"{question} {answer} ({why or 'the run has no such task'})")
    return lines


def score_table(rows: Sequence[Score]) -> Table:
    """Make a table of scores for people."""
    printed = Table(title="scores in tasks, 95 % intervals", title_justify="left", box=None)
    for name in ("task", "metric", "model"):
        printed.add_column(name, overflow="fold")
    for name in ("models", "items", "score", "interval"):
        printed.add_column(name, justify="right")
    before = ("", "")
    for row in rows:
        metric = (row.task, row.metric)
        printed.add_row(
            *(metric if metric != before else ("", "")),
            row.model,
            str(row.num_models),
            str(row.num_items),
            f"{row.score:.3f}",
            _interval(row.low, row.high),
        )
        before = metric
    return printed


def correlation_table(rows: Sequence[Correlation], num_sizes: int) -> Table:
    """Make a table of rank correlations for people."""
    given = ", given their number of parameters" if num_sizes > 1 else ""
    title = f"rank correlation over the students of a seed{given}, 95 % intervals over seeds"
    printed = Table(title=title, title_justify="left", box=None)
    for name in ("task", "metric", "with"):
        printed.add_column(name, overflow="fold")
    for name in ("seeds", "correlation", "interval", "score"):
        printed.add_column(name, justify="right")
    for row in rows:
        shown = f"{row.correlation:+.2f}" if row.num_seeds else ""
        interval = _interval(row.low, row.high, digits=2)
        printed.add_row(
            row.task, row.metric, row.measure, str(row.num_seeds), shown, interval, row.direction
        )
    return printed


def _interval(low: float, high: float, digits: int = 3) -> str:
    return f"[{low:.{digits}f}, {high:.{digits}f}]" if math.isfinite(low) else ""


def main(arguments: list[str]) -> int:
    """Read results.h5, print both tables and the verdict, and save the tables."""
    options = files.parser(__doc__).parse_args(arguments)
    analysis = files.read(options, LANGUAGE)
    study = Study(analysis.results)
    if not analysis.results.downstream:
        raise InputError(
            f"{analysis.path}: no scores in tasks; expected a run with downstream.tasks; a "
            "finished run gains them with launch/sweep.py and downstream.tasks=[...]"
        )
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    rows = scores(study)
    correlated = correlations(study)
    console.print(analysis.titled(score_table(rows)))
    console.print(analysis.titled(correlation_table(correlated, len(study.sizes))))
    for line in verdict(correlated):
        console.print(line)
    print(analysis.save_csv([asdict(row) for row in rows], "downstream"))
    print(analysis.save_csv([asdict(row) for row in correlated], "downstream_correlations"))
    return 0


if __name__ == "__main__":
    command(main)
