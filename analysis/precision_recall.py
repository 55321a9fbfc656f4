#!/usr/bin/env python
"""Print and save the table of a finished run, and draw precision against recall.

    python analysis/precision_recall.py RUN [--out FOLDER]

RUN is a run's name or folder, or a file of results, such as that of `rerun.py RUN --partial`.

Writes precision_recall.csv, .png and .pdf next to the results, or to FOLDER; the names of those of
partial results begin with partial-. Intervals are 95 %: for one seed by bootstrap over sequences,
for several by Student's t over the seeds' means. Students that lack a score, as in a partial merge,
are left out and counted.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import files
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.pipeline import LANGUAGE
from kdhpc.science import metrics
from kdhpc.storage.results import Results


@dataclass(frozen=True)
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


def students(results: Results) -> tuple[list[str], list[str]]:
    """Return the names of the trained students that have both scores, and of those that do not."""
    names = [name for name, facts in results.models.items() if facts["kind"] == "student"]
    scored = [name for name in names if results.scores.keys() >= set(_pairs(name).values())]
    return scored, [name for name in names if name not in scored]


def _pairs(name: str) -> dict[str, tuple[str, str]]:
    """Return the sampler and the scorer of each metric of a student."""
    return {"precision": (name, "truth"), "recall": ("truth", name)}


def rows(results: Results, names: Sequence[str]) -> list[Row]:
    """Return one row for each of these students, then the mean of each group of several seeds."""
    all_rows = [_row(results, name, results.models[name]) for name in names]
    all_rows.sort(key=lambda row: (row.student_size, row.seed, _order(row)))
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(all_rows, key=_order):
        groups.setdefault((row.student_size, row.tau), []).append(row)
    for (size, tau), group in groups.items():
        if len(group) > 1:
            values: dict[str, float] = {}
            for name in ("precision", "recall"):
                by_seed = [getattr(row, name) for row in group]
                low, high = metrics.over_seeds(by_seed)
                values |= {name: float(np.mean(by_seed)), f"{name}_low": low, f"{name}_high": high}
            all_rows.append(Row(tau=tau, student_size=size, seed="all", **values))
    return all_rows


def _row(results: Results, name: str, facts: Any) -> Row:
    values = {}
    for metric, pair in _pairs(name).items():
        scores = results.scores[pair]
        arrays = (scores.log_prob_sum, scores.num_tokens)
        low, high = metrics.bootstrap(arrays)
        values[metric] = float(metrics.per_token(*arrays))
        values |= {f"{metric}_low": low, f"{metric}_high": high}
    arm = str(facts["arm"])
    tau = f"{facts['tau']:g}" if arm.startswith("tau") else arm
    return Row(tau=tau, student_size=facts["size"], seed=str(facts["seed"]), **values)


def _order(row: Row) -> tuple[Any, ...]:
    number = float(row.tau) if row.tau.replace(".", "").isdigit() else math.inf
    return row.student_size, row.tau != "direct", -number, row.tau


def table(all_rows: list[Row], python: str) -> Table:
    """Make a table for people.

    The title names the version of Python, because the demo trains on its documentation.
    """
    title = f"nats per token, 95 % intervals (Python {python})"
    printed = Table(title=title, title_justify="left", box=None)
    for name in ("student", "size", "seed"):
        printed.add_column(name)
    for name in ("precision", "recall"):
        printed.add_column(name, justify="right")
        printed.add_column("interval", justify="right")
    for row in all_rows:
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


def draw(all_rows: list[Row]) -> Figure:
    """Draw precision against recall: a curve along tau, and the direct students as points.

    A mean over seeds is drawn instead of its students.
    """
    means = {(row.student_size, row.tau) for row in all_rows if row.seed == "all"}
    pooled = [r for r in all_rows if r.seed == "all" or (r.student_size, r.tau) not in means]
    pooled.sort(key=_order)
    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for index, size in enumerate(sorted({row.student_size for row in pooled})):
        color = f"C{index}"
        for kind, marker in (("tau", "o"), ("direct", "s"), ("top", "^")):
            mine = [row for row in pooled if row.student_size == size and _kind(row) == kind]
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
    results = analysis.results
    scored, unscored = students(results)
    if not scored:
        raise InputError(
            f"{analysis.path}: no student has both of its scores ({len(unscored)} are trained); "
            "expected at least one; let launch/sweep.py go on, then merge again"
        )
    all_rows = rows(results, scored)
    Console(width=None if sys.stdout.isatty() else 100).print(
        analysis.titled(table(all_rows, results.provenance.get("python", "?")))
    )
    if unscored:
        print(
            f"{len(unscored)} of {len(scored) + len(unscored)} trained students are left out, "
            f"because a score is missing: {', '.join(unscored)}"
        )
    print(analysis.path)
    print(analysis.save_csv([asdict(row) for row in all_rows], "precision_recall"))
    for written in analysis.save_figure(draw(all_rows), "precision_recall"):
        print(written)
    return 0


if __name__ == "__main__":
    command(main)
