"""Views of a mixture run for tables and figures: arms of a setting, means over seeds, effects."""

import math
from dataclasses import asdict, dataclass
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
        self.betas = sorted(f["beta"] for f in facts if "beta" in f)
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
