"""Figures of the mixture simulation; `mixture.py` describes what each of them shows."""

import math
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from mixture_arms import (
    AS_PUBLISHED,
    DEFINED,
    PUBLISHED,
    PUBLISHED_BETA,
    Arms,
    Effect,
    Floats,
    Mean,
    is_paper,
    mean_of,
)

from kdhpc.science import distillation, gaussian

RECALL_TICKS = (-2.5, -5.0, -10.0, -20.0, -50.0)
PANEL_RADIUS = 2.6


def panels(arms: Arms) -> Figure:
    """Draw truth, teacher and students of one seed.

    The precision of its student at the largest beta is nearest to the median over seeds.
    """
    last = arms.table(arms.betas[-1])["precision_as_defined"]
    row = int(np.argmin(np.abs(last - np.median(last))))
    shown = sorted({arms.betas[0], arms.betas[len(arms.betas) // 2], arms.betas[-1]})
    columns = 1 + len(shown)
    figure, axes = plt.subplots(
        2,
        columns,
        figsize=(2.75 * columns, 6.4),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    truth = arms.mixture("teachers", "truth", row)
    for panel in axes.flat:
        for index in range(truth.num_components):
            _ellipse(panel, truth, index, facecolor="0.85", edgecolor="none", zorder=0)
    points = arms.table("teachers")["train_points"][row]
    axes[0, 0].plot(*points.T, ".", color="black", markersize=3)
    axes[0, 0].set_title(f"truth p* and D ({len(points)} points)", fontsize=9)
    _student_panel(axes[1, 0], arms, "direct", row)
    teacher = arms.mixture("teachers", "teacher", row)
    for column, beta in enumerate(shown, start=1):
        panel = axes[0, column]
        for index, weight in enumerate(gaussian.sharpen(teacher, beta).weights):
            _ellipse(
                panel, teacher, index, facecolor="none", edgecolor="black", alpha=max(weight, 0.25)
            )
            panel.text(
                *teacher.means[index],
                f"{weight:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )
        panel.set_title(f"teacher p', β = {beta:g} (weights)", fontsize=9)
        _student_panel(axes[1, column], arms, beta, row)
    for panel in axes.flat:
        panel.set(xlim=(-PANEL_RADIUS, PANEL_RADIUS), ylim=(-PANEL_RADIUS, PANEL_RADIUS))
        panel.set_aspect("equal")
    for panel in axes[1]:
        panel.set_xlabel("x₁")
    for panel in axes[:, 0]:
        panel.set_ylabel("x₂")
    figure.suptitle(
        f"{arms.setting}, seed {row}: ellipses at Mahalanobis distance 2; grey: modes of p*, "
        "dark: covered",
        fontsize=10,
    )
    return figure


def _student_panel(panel: Axes, arms: Arms, arm: str | float, row: int) -> None:
    table, truth = arms.table(arm), arms.mixture("teachers", "truth", row)
    student = arms.mixture(arm, "student", row)
    for index in np.flatnonzero(table["covered_modes"][row]):
        _ellipse(panel, truth, int(index), facecolor="0.55", edgecolor="none", zorder=1)
    for component in range(student.num_components):
        _ellipse(panel, student, component, facecolor="none", edgecolor="black", linewidth=1.8)
    name = arm if isinstance(arm, str) else f"β = {arm:g}"
    precision, recall = (table[f"{metric}_as_defined"][row] for metric in ("precision", "recall"))
    panel.set_title(
        f"student p'', {name}\nprecision {precision:.2f}, recall {recall:.2f} nats", fontsize=9
    )


def _ellipse(panel: Axes, mixture: gaussian.Mixture, index: int, **style: Any) -> None:
    """Draw a component as the ellipse inside which it covers modes."""
    variances, axes = np.linalg.eigh(mixture.covariances[index])
    width, height = 2.0 * distillation.MODE_RADIUS * np.sqrt(variances)
    angle = math.degrees(math.atan2(axes[1, 0], axes[0, 0]))
    center = (float(mixture.means[index, 0]), float(mixture.means[index, 1]))
    panel.add_patch(Ellipse(center, width, height, angle=angle, **style))


def _line(panel: Axes, x: Any, means: list[Mean], label: str, **style: Any) -> None:
    """Draw means with their intervals."""
    panel.errorbar(
        x,
        [m.mean for m in means],
        yerr=_bars(means),
        label=label,
        capsize=2.5,
        markersize=5,
        linewidth=1.2,
        **style,
    )


def _bars(means: list[Mean]) -> Floats:
    """Return the lengths [2, N] of the error bars below and above; 0 if there is one seed."""
    return np.array(np.nan_to_num([[m.mean - m.low, m.high - m.mean] for m in means])).T


def _beta_axis(panel: Axes, arms: Arms) -> float:
    """Make a logarithmic axis of beta with room for the direct student; return its position."""
    left = float(arms.betas[0]) / 2.0
    panel.set_xscale("log")
    panel.set_xticks([left, *arms.betas], ["direct", *(f"{beta:g}" for beta in arms.betas)])
    panel.set_xticks([], minor=True)
    panel.axvline(left * math.sqrt(2.0), color="0.7", linewidth=0.8)
    panel.set_xlabel("sharpening β of the teacher's weights")
    panel.grid(alpha=0.25)
    return left


def _log_of_negative(values: Any) -> Floats:
    return np.array(-np.log(np.maximum(np.negative(values), 1e-9)))


def _recall_axis(axis: Any, values: list[float]) -> None:
    """Make an axis that is logarithmic in -recall, because recall ranges from -2.6 to -42."""
    scale = mpl.scale.FuncScale(
        axis, (_log_of_negative, lambda y: np.negative(np.exp(np.negative(y))))
    )
    axis.axes.set(**{f"{axis.axis_name}scale": scale})
    low, high = min(values) * 1.25, max(values) / 1.25
    ticks = [tick for tick in RECALL_TICKS if low <= tick <= high] or [low, high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


def against_beta(arms: Arms) -> Figure:
    """Draw precision and recall against beta, as defined and as published."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    solid = {"color": "black", "linestyle": "-", "marker": "o"}
    dashed = {"color": "0.45", "linestyle": "--", "marker": "s"}
    for panel, metric in ((left, "precision"), (right, "recall")):
        start = _beta_axis(panel, arms)
        direct = arms.table("direct")
        _line(panel, arms.betas, arms.series(f"{metric}_as_defined"), DEFINED, **solid)
        published = AS_PUBLISHED if metric == "precision" else "as published (over D)"
        _line(panel, arms.betas, arms.series(f"{metric}_as_published"), published, **dashed)
        _line(panel, [start], [mean_of(direct[f"{metric}_as_defined"])], "", **solid)
        panel.set_title(metric)
    _line(
        left,
        arms.betas,
        arms.series("direct_precision_as_published"),
        "direct student, as published",
        color="0.45",
        linestyle=":",
        marker="^",
    )
    _line(right, [start], [mean_of(direct["recall_as_published"])], "", **dashed)
    if is_paper(arms):
        for student, (precision, recall) in PUBLISHED.items():
            _star(left, PUBLISHED_BETA, precision, student, f"{precision:.2f}")
            x = start if student == "direct" else PUBLISHED_BETA
            _star(right, x, recall, student, f"{recall:.2f}", right=student == "direct")
    left.set_ylabel("log-density of the student's points (nats per point)")
    right.set_ylabel("log-density under the student (nats per point)")
    recalls = [m for name in ("defined", "published") for m in arms.series(f"recall_as_{name}")]
    _recall_axis(right.yaxis, [*_ends(recalls), *(PUBLISHED[k][1] for k in PUBLISHED)])
    left.legend(frameon=False, fontsize=8, loc="lower left")
    right.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def _star(
    panel: Axes, x: float, y: float, student: str, text: str = "", *, right: bool = False
) -> None:
    """Mark a number that the paper's notebook printed; hollow for the direct student."""
    panel.plot(
        x,
        y,
        "*",
        color="black",
        markerfacecolor="white" if student == "direct" else "black",
        markersize=11,
        linestyle="none",
        label=f"the paper's {student} student",
    )
    panel.annotate(
        text,
        (x, y),
        xytext=(4, -12) if right else (-9, -3),
        textcoords="offset points",
        ha="left" if right else "right",
        fontsize=8,
    )


def _ends(means: list[Mean]) -> list[float]:
    return [v for m in means for v in (m.mean, m.low, m.high) if not math.isnan(v)]


def precision_recall(arms: Arms) -> Figure:
    """Draw the curve that beta traces, as defined and as published, and that of the control."""
    figure, panel = plt.subplots(figsize=(6.5, 5), layout="constrained")
    for name, label, color, fmt in (
        ("defined", DEFINED, "black", "o-"),
        ("published", AS_PUBLISHED, "0.5", "s--"),
    ):
        x, y = arms.series(f"recall_as_{name}"), arms.series(f"precision_as_{name}")
        _line(panel, [m.mean for m in x], y, label, xerr=_bars(x), color=color, fmt=fmt)
        labelled = math.inf
        for beta, recall, precision in zip(arms.betas, x, y, strict=True):
            if 0.83 < recall.mean / labelled < 1.2:
                continue  # the label would overlap the last one
            labelled = recall.mean
            panel.annotate(
                f"β={beta:g}",
                (recall.mean, precision.mean),
                xytext=(0, -16) if name == "defined" else (4, 8),
                ha="center" if name == "defined" else "left",
                textcoords="offset points",
                fontsize=8,
                color=color,
            )
    direct, last = arms.table("direct"), arms.table(arms.betas[-1])
    panel.plot(
        direct["recall_as_defined"].mean(),
        direct["precision_as_defined"].mean(),
        "D",
        color="black",
        markerfacecolor="white",
        label="direct student, as defined",
    )
    panel.plot(
        direct["recall_as_published"].mean(),
        last["direct_precision_as_published"].mean(),
        "D",
        color="0.5",
        markerfacecolor="white",
        label=f"direct student, as published at β = {arms.betas[-1]:g}",
    )
    ends = _ends([*arms.series("recall_as_defined"), *arms.series("recall_as_published")])
    if arms.decode_betas:
        narrowed = arms.narrowed("direct")
        x, y = (
            [mean_of(table[f"{metric}_as_defined"]) for table in narrowed.values()]
            for metric in ("recall", "precision")
        )
        low, *_, high = narrowed
        label = f"direct student, narrowed by b = {low:g} to {high:g}"
        style = {"color": "0.3", "fmt": "^:"}
        _line(panel, [m.mean for m in x], y, label, xerr=_bars(x), **style)
        ends += _ends(x)
    if is_paper(arms):
        for student, numbers in PUBLISHED.items():
            _star(panel, numbers[1], numbers[0], student)
        ends += [recall for _, recall in PUBLISHED.values()]
    _recall_axis(panel.xaxis, ends)
    panel.set_xlabel("recall: log-density of p*'s points under the student (nats per point)")
    panel.set_ylabel("precision: log-density of the student's points (nats per point)")
    panel.grid(alpha=0.25)
    panel.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def modes(arms: Arms) -> Figure:
    """Draw how many modes the teacher emphasises and the student covers, against beta."""
    figure, panel = plt.subplots(figsize=(6, 4.2), layout="constrained")
    start = _beta_axis(panel, arms)

    def counts(arm: str | float, name: str) -> Mean:
        return mean_of(arms.table(arm)[name].sum(axis=1))

    for name, label, style in (
        ("emphasised_modes", "emphasised by the teacher", {"color": "0.5", "fmt": "s--"}),
        ("covered_modes", "covered by the student", {"color": "black", "fmt": "o-"}),
    ):
        _line(panel, arms.betas, [counts(beta, name) for beta in arms.betas], label, **style)
    _line(panel, [start], [counts("direct", "covered_modes")], "", color="black", fmt="o")
    panel.set_ylim(0, arms.facts["modes"] + 0.5)
    panel.set_ylabel(f"modes of p* (of {arms.facts['modes']})")
    panel.legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def terms(arms: Arms) -> Figure:
    """Draw the terms of J by rank of the teacher's component, for a student of one component."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    ranks = arms.facts["teacher_components"]
    shades = [str(value) for value in np.linspace(0.0, 0.65, ranks)]
    for rank, marker in zip(range(ranks), "os^Dv<>p" * ranks, strict=False):
        for panel, quantity in zip(axes, ("weight", "misfit", "term"), strict=True):
            means = [mean_of(arms.terms(beta)[quantity][:, rank]) for beta in arms.betas]
            label = f"{rank + 1}{'. (largest weight)' if rank == 0 else '.'}"
            _line(panel, arms.betas, means, label, color=shades[rank], fmt=f"{marker}-")
    for panel, title in zip(
        axes,
        (
            "joint weighting a' (a share)",
            "misfit -b' = -E log N'' (nats)",
            "its term of J: -a' b' (nats)",
        ),
        strict=True,
    ):
        panel.set_xscale("log")
        panel.set_xticks(arms.betas, [f"{beta:g}" for beta in arms.betas])
        panel.set_xticks([], minor=True)
        panel.set_xlabel("sharpening β")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.25)
    axes[1].set_yscale("symlog", linthresh=1.0)  # a density may exceed 1, so this may be negative
    axes[1].set_yticks([0, 1, 2, 5, 10, 20, 50, 100])
    axes[1].set_ylim(bottom=min(0.0, 1.1 * axes[1].dataLim.y0))
    axes[1].yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes[0].legend(frameon=False, fontsize=8, title="teacher's component", loc="upper left")
    return figure


def effect_size(effects: list[Effect]) -> Figure:
    """Draw the trade-off against |D| and K''; all other sizes are those of the first setting."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), sharex="col", layout="constrained")
    low, high = effects[0].arms.betas[0], effects[0].arms.betas[-1]
    for column, (size, label) in enumerate(
        {
            "train_points": "|D| (points)",
            "student_components": "K'' (components of the student)",
        }.items()
    ):
        series = sorted(
            (e for e in effects if _differs(e, effects[0]) <= {size}),
            key=lambda e: int(e.arms.facts[size]),
        )
        x = [e.arms.facts[size] for e in series]
        for panel, metric in zip(axes[:, column], ("precision", "recall"), strict=True):
            means = [getattr(e, metric) for e in series]
            _line(panel, x, means, metric, color="black", fmt="o-")
            panel.axhline(0.0, color="0.5", linewidth=0.8)
            panel.grid(alpha=0.25)
        if size == "train_points":
            axes[1, column].set_xscale("log")
        axes[1, column].set_xticks(x, [f"{value:,}" for value in x])
        axes[1, column].set_xticks([], minor=True)
        axes[1, column].set_xlabel(label)
    for panel, metric in zip(axes[:, 0], ("precision", "recall"), strict=True):
        panel.set_ylabel(f"change of {metric}\nβ = {high:g} against {low:g} (nats per point)")
    return figure


def _differs(effect: Effect, other: Effect) -> set[str]:
    """Return the names of the facts in which the settings of two effects differ."""
    mine, theirs = effect.arms.facts, other.arms.facts
    return {key for key in mine if mine[key] != theirs[key]} - {"setting", "arm"}


def effect_settings(effects: list[Effect]) -> Figure:
    """Draw the trade-off in every setting."""
    figure, axes = plt.subplots(
        1, 2, figsize=(10, 1.2 + 0.36 * len(effects)), sharey=True, layout="constrained"
    )
    low, high = effects[0].arms.betas[0], effects[0].arms.betas[-1]
    y = np.arange(len(effects))[::-1]
    for panel, metric in zip(axes, ("precision", "recall"), strict=True):
        means = [getattr(effect, metric) for effect in effects]
        panel.errorbar(
            [m.mean for m in means], y, xerr=_bars(means), fmt="o", color="black", capsize=2.5
        )
        panel.axvline(0.0, color="0.5", linewidth=0.8)
        panel.set_xscale("symlog", linthresh=1.0)
        ends = [0.0, *_ends(means)]
        low_end, high_end = 1.2 * min(ends) - 0.2, 1.2 * max(ends) + 0.2
        ticks = [s * size for s in (-1, 1) for size in (0.5, 1, 3, 10, 30, 100)]
        ticks = [0.0, *(tick for tick in ticks if low_end < tick < high_end)]
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.set_xticks([], minor=True)
        panel.set_xlim(low_end, high_end)
        panel.set_xlabel(f"change of {metric}, β = {high:g} against {low:g}\n(nats per point)")
        panel.grid(alpha=0.25)
    axes[0].set_yticks(y, [_described(effect, effects[0]) for effect in effects])
    return figure


def _described(effect: Effect, paper: Effect) -> str:
    """Describe a setting by its differences from the paper's."""
    names = {
        "truth": "p*",
        "train_points": "|D|",
        "teacher_components": "K'",
        "student_components": "K''",
        "em_starts": "EM starts",
    }
    facts, differs = effect.arms.facts, _differs(effect, paper)
    keys = [*(key for key in names if key in differs), *sorted(differs - names.keys())]
    texts = [facts[key] if isinstance(facts[key], str) else f"{facts[key]:,}" for key in keys]
    changes = [f"{names.get(key, key)} = {text}" for key, text in zip(keys, texts, strict=True)]
    return ", ".join(changes) or effect.arms.setting
