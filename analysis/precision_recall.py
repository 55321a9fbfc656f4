#!/usr/bin/env python
"""Draw precision against recall, print and save the table of a finished run.

    python analysis/precision_recall.py RUN [--out FOLDER]

Writes precision_recall.csv, .png and .pdf beside results.h5, or into FOLDER. Intervals are 95 %: by
bootstrap over sequences for one seed, by Student's t over the means of several.
"""

import math
import sys
from dataclasses import asdict, dataclass
from typing import Any

import files
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from kdhpc.cluster.display import command
from kdhpc.pipeline import LANGUAGE
from kdhpc.science import metrics
from kdhpc.storage.results import Results


@dataclass(frozen=True)
class Row:
    """One student; columns of the CSV. Nats per token."""

    tau: str
    student_size: str
    seed: str
    precision: float
    precision_low: float
    precision_high: float
    recall: float
    recall_low: float
    recall_high: float


def rows(results: Results) -> list[Row]:
    """A row a student, then one over all seeds where there are several."""
    found = [
        _row(results, name, facts)
        for name, facts in results.models.items()
        if facts["kind"] == "student"
    ]
    found.sort(key=_order)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.student_size, row.tau), []).append(row)
    for (size, tau), alike in groups.items():
        if len(alike) > 1:
            values: dict[str, float] = {}
            for name in ("precision", "recall"):
                over = [getattr(row, name) for row in alike]
                low, high = metrics.over_seeds(over)
                values |= {name: float(np.mean(over)), f"{name}_low": low, f"{name}_high": high}
            found.append(Row(tau=tau, student_size=size, seed="all", **values))
    return found


def _row(results: Results, name: str, facts: Any) -> Row:
    values = {}
    for metric, pair in (("precision", (name, "truth")), ("recall", ("truth", name))):
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
    return row.student_size, row.seed, row.tau != "direct", -number, row.tau


def table(found: list[Row], python: str) -> Table:
    """The rows for people, and the Python that made them (the demo reads its documentation)."""
    title = f"nats per token, 95 % intervals (Python {python})"
    shown = Table(title=title, title_justify="left", box=None)
    for name in ("student", "size", "seed"):
        shown.add_column(name)
    for name in ("precision", "recall"):
        shown.add_column(name, justify="right")
        shown.add_column("interval", justify="right")
    for row in found:
        label = f"tau {row.tau}" if row.tau[0].isdigit() else row.tau
        shown.add_row(
            label,
            row.student_size,
            row.seed,
            f"{row.precision:.3f}",
            f"[{row.precision_low:.3f}, {row.precision_high:.3f}]",
            f"{row.recall:.3f}",
            f"[{row.recall_low:.3f}, {row.recall_high:.3f}]",
        )
    return shown


def draw(found: list[Row]) -> Figure:
    """Precision against recall: tau along the curve, the direct baseline beside it."""
    pooled = [row for row in found if row.seed == "all"] or found
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
                    # Taus to the left of the curve, so that they do not meet the direct students.
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
    """Read results.h5, print, save, draw."""
    options = files.parser(__doc__).parse_args(arguments)
    results, path, out = files.read(options, LANGUAGE)
    found = rows(results)
    Console(width=None if sys.stdout.isatty() else 100).print(
        table(found, results.provenance.get("python", "?"))
    )
    saved = files.save_csv([asdict(row) for row in found], out / "precision_recall.csv")
    for written in (path, saved, *files.save_figure(draw(found), out, "precision_recall")):
        print(written)
    return 0


if __name__ == "__main__":
    command(main)
