"""Means over seeds with intervals that cover both seeds and sequences.

A `Statistic` is a number of one seed, such as the precision of a student: a ratio of sums over
sequences, or any linear combination of such ratios. It knows how much each sequence moves it, and
which set of sequences each part was averaged over. `over_seeds` turns one statistic for each seed
into their mean with its interval:

    def precision(student: str) -> Statistic:
        scores = results.scores[student, "truth"]
        return ratio(scores.log_prob_sum, scores.num_tokens, rows=student)

    gain = over_seeds(
        [
            precision(f"student-s{s}-small-tau0.8") - precision(f"student-s{s}-small-direct")
            for s in range(4)
        ]
    )
    print(gain.estimate, gain.low, gain.high, gain.p_value(0.0, "greater"))

The mean is that of the seeds that could have been drawn, and of the sequences that could have been
sampled, given p* and D. Shapes: N sequences, S seeds. `docs/statistics.md` has the method in one
page and its measured coverage.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Floats = NDArray[np.float64]
Numbers = NDArray[np.floating | np.integer]
Alternative = Literal["two-sided", "greater", "less"]
LEAST_P_VALUE = 1e-100
"""Smaller p-values are returned as 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistic:
    """A number of one seed, and how much each sequence moves it.

    Statistics are added, subtracted, and scaled by constants; constants are added too. Influence
    values on one set of rows are combined row by row, so a contrast of two models on the same
    sequences is paired. A product or quotient of statistics is linearised by hand, with constants
    in place of all factors but one (the delta method): the share a/b around the means A and B is
    `(a - A / B * b) / B + A / B`.
    """

    value: float
    """In the unit of the ratio, such as nats per token."""
    influence: Mapping[str, Floats]
    """By the name of a set of rows: [N], the change of the value by each sequence. They sum to 0,
    and their sum of squares is the sampling variance, up to N / (N - 1)."""
    __array_ufunc__: ClassVar[None] = None
    """Numbers of numpy leave `number * statistic` to this class."""

    def __add__(self, other: "Statistic | float") -> "Statistic":
        """Add a statistic of the same seed, or a constant.

        Raises:
            ValueError: if both have rows of one name, but not equally many.
        """
        if not isinstance(other, Statistic):
            return Statistic(value=self.value + float(other), influence=self.influence)
        influence = dict(self.influence)
        for rows, values in other.influence.items():
            if rows in influence:
                _check_lengths(rows, (influence[rows], values))
                values = influence[rows] + values
            influence[rows] = values
        return Statistic(value=self.value + other.value, influence=influence)

    def __mul__(self, factor: float) -> "Statistic":
        influence = {rows: factor * values for rows, values in self.influence.items()}
        return Statistic(value=float(factor * self.value), influence=influence)

    def __neg__(self) -> "Statistic":
        return self * -1.0

    def __sub__(self, other: "Statistic | float") -> "Statistic":
        return self + -other

    def __rsub__(self, other: float) -> "Statistic":
        return -self + other

    def __truediv__(self, divisor: float) -> "Statistic":
        return self * (1.0 / divisor)

    __radd__ = __add__
    __rmul__ = __mul__


def ratio(numerators: Numbers, denominators: Numbers | None = None, *, rows: str) -> Statistic:
    """Return the sum of numerators divided by the sum of denominators, linearised.

    The influence of row n is (numerator - ratio * denominator) / (sum of denominators).
    Source: W. G. Cochran, Sampling Techniques (1977), section 6.3.

    Args:
        numerators: [N], such as the log-probabilities of sequences in nats.
        denominators: [N], such as their numbers of counted tokens; 1 each if not given.
        rows: name of the set of sequences, such as its sampler's. The same name means the same
            sequences, in all statistics and all seeds; sequences of its own need a name of its own.

    Raises:
        ValueError: if there are fewer than two rows, their numbers differ, a number is not finite,
            or the sum of denominators is not positive.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.ones_like(above) if denominators is None else np.asarray(denominators, np.float64)
    _check_lengths(rows, (above, below))
    if len(above) < 2:
        raise ValueError(f"rows {rows!r}: {len(above)} sequences; expected at least two")
    total = float(below.sum())
    value = float(above.sum()) / total if total > 0.0 else math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"rows {rows!r}: the sums do not have a finite ratio; expected finite numerators and "
            "a positive sum of denominators"
        )
    return Statistic(value=value, influence={rows: (above - value * below) / total})


def by_cluster(statistic: Statistic, clusters: NDArray[np.int64], *, rows: str) -> Statistic:
    """Return a statistic whose sequences are drawn in clusters, such as those of one prompt.

    The influence of a cluster is the sum of those of its sequences, so what sequences of one
    cluster have in common is in the sampling variance. Statistics with the same name of clusters
    are paired cluster by cluster.

    Source: K.-Y. Liang, S. L. Zeger, Biometrika 73 (1986), 13-22.

    Args:
        statistic: a statistic of rows that all belong to clusters.
        clusters: [N] the cluster of each row, from 0 to C-1 without gaps.
        rows: name of the set of clusters.

    Raises:
        ValueError: if the statistic has another number of rows.
    """
    influence = np.zeros(int(clusters.max()) + 1)
    for name, values in statistic.influence.items():
        _check_lengths(name, (values, clusters))
        influence += np.bincount(clusters, values, len(influence))
    return Statistic(value=statistic.value, influence={rows: influence})


def through(
    function: Callable[[Floats], float], of: Sequence[Statistic], step: float = 0.01
) -> Statistic:
    """Return a function of statistics of one seed, linearised by central differences.

    Args:
        function: takes their values [M] and returns a number.
        of: M statistics.
        step: step of the differences, in the unit of the values. It should be about their errors,
            so that a function with small kinks is linearised over what the values may be.
    """
    values = np.array([statistic.value for statistic in of])
    result = Statistic(value=function(values), influence={})
    for index, statistic in enumerate(of):
        change = np.zeros(len(of))
        change[index] = step
        slope = (function(values + change) - function(values - change)) / (2.0 * step)
        result = result + slope * Statistic(value=0.0, influence=statistic.influence)
    return result


@dataclass(frozen=True, kw_only=True)
class SeedMean:
    """The mean of a statistic over seeds, with its uncertainty over seeds and over sequences.

    Two seeds that are scored on the same sequences have sampling errors with a covariance. The
    spread of the seeds' values does not show what they have in common, so this is added:

        variance of the mean = spread + covariance.

    This is the mean of a two-way crossed random-effects model, estimated by mean squares: spread is
    MS(seed), and covariance is MS(row) - MS(seed x row), all divided by N S. The interaction of
    seeds and rows is in the spread and is subtracted from the rows, so it counts once. Rows that
    every seed has for itself have no covariance; the spread alone contains all of their error.

    The variance of the mean is also the sum of `seed_variance` and `sequence_variance`, the two
    components. A difference below 0 counts as 0.

    **The interval** at confidence 1 - alpha is the estimate +- h, with quantiles t at 1 - alpha/2:

        h^2 = max(t(S-1)^2 spread + t(N-1)^2 covariance, t(N-1)^2 sequence_variance).

    The first term weights each variance by the quantile of its own degrees of freedom. Coverage is
    at least 1 - alpha for normal errors, because P(|Z| <= sqrt(x)) is concave in x. A single t with
    Satterthwaite's degrees of freedom falls below (docs/statistics.md): with few seeds a spread
    that is small by chance also gives many degrees of freedom. The second term makes no interval
    narrower than that of the sampling error alone, which is all that one seed can show.

    Sources: S. R. Searle, G. Casella, C. E. McCulloch, Variance Components (1992), chapter 4; N. A.
    Obuchowski, H. E. Rockette, Commun. Statist. Simul. 24 (1995), 285-308, for statistics of
    readers who share cases, as seeds share rows; S. K. Banerjee, Sankhya 22 (1960), 357-358, for
    the interval.
    """

    estimate: float
    """Mean over seeds, in the unit of the statistic; the variances are in its square."""
    num_seeds: int
    """S; with 1 the interval covers the sampling error only."""
    num_rows: int
    """N of the smallest set of rows."""
    spread: float
    """Variance of the seeds' values divided by S; NaN for one seed."""
    covariance: float
    """Mean sampling covariance of two seeds, at least 0; 0 for one seed."""
    sequence_variance: float
    """Sampling variance of the mean over sequences, for these very models."""

    @property
    def seed_variance(self) -> float:
        """Variance of the mean because models differ from seed to seed; NaN for one seed."""
        if self.num_seeds == 1:
            return math.nan
        return max(0.0, self.spread + self.covariance - self.sequence_variance)

    @property
    def standard_error(self) -> float:
        """Square root of the sum of both components; of the sequences' alone for one seed."""
        if self.num_seeds == 1:
            return math.sqrt(self.sequence_variance)
        return math.sqrt(self.seed_variance + self.sequence_variance)

    @property
    def degrees_of_freedom(self) -> float:
        """Satterthwaite's number for spread + covariance; N - 1 for one seed.

        It says how well the standard error is known. The interval does not use it.
        Source: F. E. Satterthwaite, Biometrics Bulletin 2 (1946), 110-114.
        """
        if self.num_seeds == 1:
            return self.num_rows - 1.0
        total = self.spread + self.covariance
        share = self.spread / total if total > 0.0 else 1.0
        return 1.0 / (share**2 / (self.num_seeds - 1) + (1.0 - share) ** 2 / (self.num_rows - 1))

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.interval()[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.interval()[1]

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return both ends of the interval at a confidence between 0 and 1."""
        half = self._half_width((1.0 - confidence) / 2.0)
        return self.estimate - half, self.estimate + half

    def p_value(self, against: float = 0.0, alternative: Alternative = "two-sided") -> float:
        """Return the p-value of the hypothesis that the mean over all seeds is `against`.

        It is the alpha at which `against` is an end of the interval, so the two always agree.

        Args:
            against: the value of the hypothesis, or a margin that is to be exceeded.
            alternative: what the mean is if it is not `against`; `greater` and `less` are the
                one-sided tests.
        """
        distance = self.estimate - against
        if alternative == "two-sided":
            return 2.0 * self._tail(abs(distance))
        tail = self._tail(abs(distance))
        return tail if (distance >= 0.0) == (alternative == "greater") else 1.0 - tail

    def _half_width(self, tail: float) -> float:
        """Return half the width of the interval that leaves this probability at each end."""
        rows_quantile = _upper_quantile(self.num_rows - 1, tail)
        alone = rows_quantile * math.sqrt(self.sequence_variance)
        if self.num_seeds == 1:
            return alone
        seeds_quantile = _upper_quantile(self.num_seeds - 1, tail)
        combined = math.hypot(
            seeds_quantile * math.sqrt(self.spread), rows_quantile * math.sqrt(self.covariance)
        )
        return max(combined, alone)

    def _tail(self, distance: float) -> float:
        """Return the probability at each end of the interval whose half width is `distance`."""
        if distance == 0.0:
            return 0.5
        if self._half_width(LEAST_P_VALUE) <= distance:
            return 0.0
        exponent = optimize.brentq(
            lambda exponent: self._half_width(math.exp(exponent)) - distance,
            math.log(LEAST_P_VALUE),
            math.log(0.5),
            xtol=1e-12,
        )
        return math.exp(exponent)


def over_seeds(statistics: Sequence[Statistic]) -> SeedMean:
    """Return the mean of a statistic over seeds, with its uncertainty.

    Rows of one name are shared by the seeds that have them, such as truth's evaluation rows for
    recall; rows with a name that no other seed has are independent, such as a student's own.

    Args:
        statistics: one for each seed, at least one. With one the sampling error alone is known.

    Raises:
        ValueError: if there is none, or two seeds have rows of one name, but not equally many.
    """
    if not statistics:
        raise ValueError("no statistics; expected one for each seed")
    num_seeds = len(statistics)
    values = np.array([statistic.value for statistic in statistics])
    sampling = _sampling_covariance(statistics)
    spread, covariance = math.nan, 0.0
    if num_seeds > 1:
        spread = float(values.var(ddof=1)) / num_seeds
        of_two_seeds = sampling[~np.eye(num_seeds, dtype=bool)]
        covariance = max(0.0, float(of_two_seeds.mean()))
    lengths = [len(rows) for statistic in statistics for rows in statistic.influence.values()]
    return SeedMean(
        estimate=float(values.mean()),
        num_seeds=num_seeds,
        num_rows=min(lengths),
        spread=spread,
        covariance=covariance,
        sequence_variance=max(0.0, float(sampling.mean())),
    )


def _sampling_covariance(statistics: Sequence[Statistic]) -> Floats:
    """Return the covariance of the sampling errors of all seeds, [S, S]."""
    sampling = np.zeros((len(statistics), len(statistics)))
    seeds_of: dict[str, list[int]] = {}
    for seed, statistic in enumerate(statistics):
        for rows in statistic.influence:
            seeds_of.setdefault(rows, []).append(seed)
    for rows, seeds in seeds_of.items():
        influence = [statistics[seed].influence[rows] for seed in seeds]
        _check_lengths(rows, influence)
        stacked = np.stack(influence)
        num_rows = stacked.shape[1]
        sampling[np.ix_(seeds, seeds)] += stacked @ stacked.T * (num_rows / (num_rows - 1))
    return sampling


class Tested(Protocol):
    """Something that is tested against a value."""

    def p_value(self, against: float = 0.0, alternative: Alternative = "two-sided") -> float:
        """Return the p-value of the hypothesis that it is `against`."""
        ...


def equivalence_p_value(mean: Tested, margin: float) -> float:
    """Return the p-value of two one-sided tests: that the mean is not within +-margin.

    It is below alpha exactly if the interval at confidence 1 - 2 alpha is within +-margin.
    Source: D. J. Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987), 657-680.
    """
    return max(mean.p_value(-margin, "greater"), mean.p_value(margin, "less"))


def holm(p_values: Sequence[float]) -> Floats:
    """Return p-values of several hypotheses, adjusted for their number, in the given order.

    The probability of one or more false rejections among those below alpha is at most alpha.
    Source: S. Holm, Scand. J. Statist. 6 (1979), 65-70.
    """
    given = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(given, kind="stable")
    steps = given[order] * np.arange(len(given), 0, -1)
    adjusted = np.empty_like(given)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def _upper_quantile(degrees_of_freedom: int, tail: float) -> float:
    """Return the quantile of Student's t above which this probability is."""
    return -float(special.stdtrit(degrees_of_freedom, tail))


def _check_lengths(rows: str, arrays: Sequence[Numbers]) -> None:
    lengths = sorted({len(array) for array in arrays})
    if len(lengths) > 1:
        raise ValueError(
            f"rows {rows!r}: {lengths[0]} and {lengths[-1]} sequences; expected the same sequences "
            "wherever they have the same name"
        )
