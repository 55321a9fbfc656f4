"""Views of a mixture run for tables and figures: arms of a setting, means over seeds, effects."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kdhpc.science import gaussian
from kdhpc.storage.hdf5 import Arrays
from kdhpc.storage.results import Results

Floats = NDArray[np.float64]
PUBLISHED_BETA = 100.0
PUBLISHED = {"direct": (-20.26, -2.64), "distilled": (-0.70, -42.45)}
"""Precision and recall that the released notebook prints at beta = 100, in nats per point."""
DEFINED, AS_PUBLISHED = "as defined (p*-scored)", "as published (teacher-scored)"


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_of(values: Any) -> Mean:
    """Return the mean of values over seeds [S] with its t interval; NaN for a single seed."""
    numbers = np.asarray(values, dtype=float)
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Mean(mean=mean, low=math.nan, high=math.nan)
    half = float(stats.sem(numbers) * stats.t.ppf(0.975, len(numbers) - 1))
    return Mean(mean=mean, low=mean - half, high=mean + half)


class Arms:
    """The arms of one setting and their tables."""

    def __init__(self, results: Results, setting: str) -> None:
        self.setting = setting
        facts = [f for f in results.models.values() if f["setting"] == setting]
        self.betas = sorted(f["beta"] for f in facts if "beta" in f and "decode_beta" not in f)
        self.decode_betas = sorted({f["decode_beta"] for f in facts if "decode_beta" in f})
        """Betas of the control; empty if the run or the setting has none."""
        self.facts = facts[0]
        self._tables = {f["arm"]: results.tables[f"{setting}-{f['arm']}"] for f in facts}

    def table(self, arm: str | float) -> Arrays:
        return self._tables[arm if isinstance(arm, str) else f"beta{arm:g}"]

    def mixture(self, arm: str | float, role: str, row: int) -> gaussian.Mixture:
        table = self.table(arm)
        parts = ("weights", "means", "covariances")
        return gaussian.Mixture(**{part: table[f"{role}_{part}"][row] for part in parts})

    def series(self, quantity: str) -> list[Mean]:
        """Return the mean of a quantity at every beta."""
        return [mean_of(self.table(beta)[quantity]) for beta in self.betas]

    def change(self, quantity: str) -> Floats:
        """Return the change of a quantity from the smallest to the largest beta, by seed [S]."""
        change: Floats = self.table(self.betas[-1])[quantity] - self.table(self.betas[0])[quantity]
        return change

    def narrowed(self, base: str) -> dict[float, Arrays]:
        """Return the tables of a student by decode beta, from the smallest; 1 is as fitted."""
        tables = {beta: self._tables[f"{base}-decode{beta:g}"] for beta in self.decode_betas}
        return dict(sorted({1.0: self._tables[base], **tables}.items()))

    def terms(self, beta: float) -> dict[str, Floats]:
        """Return the parts of J for a student of one component.

        Returns:
            `weight` a', `misfit` -b' (nats) and their product `term` (nats), each [S, K'], with the
            teacher's components in order of falling weight.
        """
        table = self.table(beta)
        weight, misfit = table["joint_weights"][:, :, 0], -table["alignments"][:, :, 0]
        order = np.argsort(-weight, axis=1)
        weight, misfit = (np.take_along_axis(part, order, axis=1) for part in (weight, misfit))
        return {"weight": weight, "misfit": misfit, "term": weight * misfit}


@dataclass(frozen=True, kw_only=True, eq=False)
class Control:
    """A narrowed student beside a distilled one, in nats per point, by seed [S]."""

    base: str
    """The student that is narrowed: `direct` or `beta1`."""
    beta: float
    """Beta of the distilled student."""
    kept: Floats
    """Recall that the narrowed student keeps, less that of the distilled one, at the precision of
    the latter; NaN where no decode beta reaches that precision."""
    lead: Floats
    """Precision at the best decode beta of each seed, less that of the distilled student."""

    @property
    def num_outside(self) -> int:
        """Number of seeds in which no decode beta reaches the precision."""
        return int(np.isnan(self.kept).sum())

    @property
    def row(self) -> dict[str, Any]:
        """The comparison as a row of a table; means of `kept` are NaN if a seed is outside."""
        return {
            "narrowed": self.base,
            "beta": self.beta,
            **{f"recall_kept_{name}": value for name, value in asdict(mean_of(self.kept)).items()},
            "seeds_outside": self.num_outside,
            "seeds": len(self.kept),
            **{f"lead_{name}": value for name, value in asdict(mean_of(self.lead)).items()},
        }


def controls(arms: Arms) -> Iterator[Control]:
    """Yield the comparison of each narrowed student with each distilled one."""
    bases = ["direct", "beta1"] if 1.0 in arms.betas else ["direct"]
    for base in bases if arms.decode_betas else ():
        points = [
            (table["precision_as_defined"], table["recall_as_defined"])
            for table in arms.narrowed(base).values()
        ]
        for beta in arms.betas:
            if base == f"beta{beta:g}":
                continue
            precision, recall = (
                arms.table(beta)[f"{metric}_as_defined"] for metric in ("precision", "recall")
            )
            yield Control(
                base=base,
                beta=beta,
                kept=at_equal_precision(points, precision) - recall,
                lead=np.max([of for of, _ in points], axis=0) - precision,
            )


def at_equal_precision(points: list[tuple[Floats, Floats]], targets: Floats) -> Floats:
    """Return the recall at a precision, interpolated linearly in precision in each seed.

    Where several steps enclose the precision, the first counts; steps at which precision does not
    rise enclose nothing.

    Args:
        points: precision and recall at each decode beta, from the smallest, each [S].
        targets: precisions [S].

    Returns:
        [S], NaN in seeds whose precision no step encloses.
    """
    recalls = np.full(len(targets), np.nan)
    for (p_low, r_low), (p_high, r_high) in pairwise(points):
        inside = np.isnan(recalls) & (p_low < p_high) & (p_low <= targets) & (targets <= p_high)
        weights = (targets - p_low)[inside] / (p_high - p_low)[inside]
        recalls[inside] = (1.0 - weights) * r_low[inside] + weights * r_high[inside]
    return recalls


def settings(results: Results) -> list[str]:
    """Return the names of the settings, the paper's first."""
    names = {facts["setting"] for facts in results.models.values()}
    return sorted(names, key=lambda name: (name != "paper", name))


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The change from the smallest to the largest beta in a setting, in nats per point."""

    arms: Arms
    precision: Mean
    recall: Mean
    median_precision: float

    @property
    def absent(self) -> bool:
        """Whether the trade-off is absent: the interval of the change of precision contains 0."""
        return self.precision.low <= 0.0 <= self.precision.high

    @property
    def row(self) -> dict[str, Any]:
        """The effect as a row of a table."""
        facts, betas = self.arms.facts, self.arms.betas
        sizes = ("train_points", "teacher_components", "student_components", "dimension", "truth")
        return {
            "setting": self.arms.setting,
            **{name: facts[name] for name in sizes},
            "beta_low": betas[0],
            "beta_high": betas[-1],
            **{f"precision_{name}": value for name, value in asdict(self.precision).items()},
            "precision_median": self.median_precision,
            **{f"recall_{name}": value for name, value in asdict(self.recall).items()},
            "trade_off_absent": self.absent,
        }


def effects(results: Results) -> list[Effect]:
    """Return the effect of every setting, the paper's first."""
    all_effects = []
    for name in settings(results):
        arms = Arms(results, name)
        change = arms.change("precision_as_defined")
        all_effects.append(
            Effect(
                arms=arms,
                precision=mean_of(change),
                recall=mean_of(arms.change("recall_as_defined")),
                median_precision=float(np.median(change)),
            )
        )
    return all_effects


def is_paper(arms: Arms) -> bool:
    """Return whether the paper's numbers can be compared with this setting."""
    return arms.setting == "paper" and arms.betas[-1] == PUBLISHED_BETA
