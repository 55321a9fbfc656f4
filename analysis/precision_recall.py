#!/usr/bin/env python
"""Print and save the table of a finished run, and draw precision against recall.

    python analysis/precision_recall.py RUN [--out FOLDER]

RUN is a run's name or folder, or a file of results, such as that of `rerun.py RUN --partial`.

Writes precision_recall.csv, .png and .pdf next to the results, or to FOLDER; the names of those of
partial results begin with partial-. The table has a row for each student and seed, then the mean of
each over seeds. Intervals are 95 %: of a mean over seeds and sequences, given p* and D; of a single
student for sampling error only (docs/statistics.md). Students that lack a score, as in a partial
merge, are left out and counted. Where the truth is a corpus, sentences below the table say who
judges precision, and how a second judge agrees.
"""

import sys
from dataclasses import asdict, dataclass

import files
import judges
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from study import Study, label_order

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.pipeline import LANGUAGE
from kdhpc.science.intervals import SeedMean, over_seeds

ALL_SEEDS = "all"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the CSV: one student, or the mean over seeds. Numbers are in nats per token."""

    tau: str
    student_size: str
    seed: str
    precision: float
    precision_low: float
    precision_high: float
    recall: float
    recall_low: float
    recall_high: float


def rows(study: Study) -> list[Row]:
    """Return one row for each student, then the mean of each group of several seeds."""
    all_rows = [
        _row(
            s.label, s.size, str(s.seed), over_seeds([study.precision(s)]),
            over_seeds([study.recall(s)]),
        )
        for s in study.students
    ]  # fmt: skip
    for size in study.sizes:
        for label in study.labels(size):
            if len(study.of(size, label)) > 1:
                precision = study.mean(size, label, study.precision)
                recall = study.mean(size, label, study.recall)
                all_rows.append(_row(label, size, ALL_SEEDS, precision, recall))
    return all_rows


def _row(label: str, size: str, seed: str, precision: SeedMean, recall: SeedMean) -> Row:
    return Row(
        tau=label,
        student_size=size,
        seed=seed,
        precision=precision.estimate,
        precision_low=precision.low,
        precision_high=precision.high,
        recall=recall.estimate,
        recall_low=recall.low,
        recall_high=recall.high,
    )


def pooled(all_rows: list[Row]) -> list[Row]:
    """Return the means over seeds, and the students that have no other seed."""
    means = {(row.student_size, row.tau) for row in all_rows if row.seed == ALL_SEEDS}
    shown = [r for r in all_rows if r.seed == ALL_SEEDS or (r.student_size, r.tau) not in means]
    return sorted(shown, key=lambda row: (row.student_size, label_order(row.tau), row.seed))


def table(study: Study, all_rows: list[Row]) -> Table:
    """Make a table of means for people.

    The title names the version of Python, because the demo trains on its documentation.
    """
    shown = pooled(all_rows)
    num_seeds = max(len(study.of(row.student_size, row.tau)) for row in shown)
    seeds = f"given p* and D, {num_seeds} seeds, 95 % intervals" if num_seeds > 1 else ONE_TRAINING
    python = study.results.provenance.get("python", "?")
    title = f"nats per token, {seeds} (Python {python})"
    printed = Table(title=title, title_justify="left", box=None)
    for name in ("student", "size", "seed"):
        printed.add_column(name)
    for name in ("precision", "recall"):
        printed.add_column(name, justify="right")
        printed.add_column("interval" if num_seeds > 1 else "sampling error", justify="right")
    for row in shown:
        label = f"tau {row.tau}" if row.tau[0].isdigit() else row.tau
        printed.add_row(
            label,
            row.student_size,
            row.seed,
            f"{row.precision:.3f}",
            f"[{row.precision_low:.3f}, {row.precision_high:.3f}]",
            f"{row.recall:.3f}",
            f"[{row.recall_low:.3f}, {row.recall_high:.3f}]",
        )
    return printed


ONE_TRAINING = "one training: sampling error only"


def draw(all_rows: list[Row]) -> Figure:
    """Draw precision against recall: a curve along tau, and the direct students as points.

    A mean over seeds is drawn instead of its students.
    """
    shown = pooled(all_rows)
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for index, size in enumerate(sorted({row.student_size for row in shown})):
        color = f"C{index}"
        for kind, marker in (("tau", "o"), ("direct", "s"), ("top", "^")):
            mine = [row for row in shown if row.student_size == size and _kind(row) == kind]
            if not mine:
                continue
            x, y = [row.recall for row in mine], [row.precision for row in mine]
            axes.errorbar(
                x,
                y,
                xerr=np.transpose([_bars(row, "recall") for row in mine]),
                yerr=np.transpose([_bars(row, "precision") for row in mine]),
                fmt=marker + ("-" if kind == "tau" else ""),
                color=color if kind != "direct" else "0.3",
                capsize=2,
                linewidth=1,
                label=f"{size}: "
                + {"tau": "distilled", "direct": "direct", "top": "truncated"}[kind],
            )
            for row in mine:
                label = f"τ={row.tau}" if kind == "tau" else row.tau
                axes.annotate(
                    label,
                    (row.recall, row.precision),
                    # Taus are labelled left of the curve, away from the direct students.
                    xytext=(-6, -11) if kind == "tau" else (6, 5),
                    textcoords="offset points",
                    ha="right" if kind == "tau" else "left",
                    fontsize=8,
                )
    axes.set_xlabel("recall: log p'' over truth's samples (nats per token)")
    axes.set_ylabel("precision: log p* over student samples (nats per token)")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.2)
    return figure


def _kind(row: Row) -> str:
    return "direct" if row.tau == "direct" else ("tau" if row.tau[0].isdigit() else "top")


def _bars(row: Row, name: str) -> tuple[float, float]:
    value = getattr(row, name)
    return value - getattr(row, f"{name}_low"), getattr(row, f"{name}_high") - value


def main(arguments: list[str]) -> int:
    """Read results.h5, print and save the table, and draw the figure."""
    options = files.parser(__doc__).parse_args(arguments)
    analysis = files.read(options, LANGUAGE)
    study = Study(analysis.results)
    if not study.students:
        raise InputError(
            f"{analysis.path}: no student has both of its scores ({len(study.unscored)} are "
            "trained), each with a finite mean over two or more sequences; expected at least one; "
            "let launch/sweep.py go on, then merge again"
        )
    all_rows = rows(study)
    Console(width=None if sys.stdout.isatty() else 100).print(
        analysis.titled(table(study, all_rows))
    )
    for note in judges.notes(study):
        print(note)
    print(analysis.path)
    print(analysis.save_csv([asdict(row) for row in all_rows], "precision_recall"))
    for written in analysis.save_figure(draw(all_rows), "precision_recall"):
        print(written)
    return 0


if __name__ == "__main__":
    command(main)
