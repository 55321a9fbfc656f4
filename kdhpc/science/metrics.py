"""Precision, recall and their uncertainty, computed from per-sequence scores.

precision = E_{x ~ p''}[log p*(x)] and recall = E_{x ~ p*}[log p''(x)], both in nats per token. They
are weighted by tokens: the sum of log-probabilities divided by the number of counted tokens. The
prompt and padding never count; the end-of-sequence token counts with `eos: learn` only (decision
2).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]
Numbers = NDArray[np.floating | np.integer]


def per_token(log_prob_sum: Numbers, num_tokens: Numbers, axis: int = -1) -> Numbers:
    """Return the token-weighted mean log-probability in nats per token."""
    mean: Numbers = log_prob_sum.sum(axis=axis) / num_tokens.sum(axis=axis)
    return mean


def bootstrap(
    arrays: Sequence[Numbers],
    statistic: Callable[..., Numbers] = per_token,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the 95 % percentile interval of a statistic over resampled sequences.

    Args:
        arrays: arrays [N]; row n of all of them belongs to sequence n, so rows are drawn together.
        statistic: function of the arrays with an `axis` argument.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap. The same seed draws the same sequences, so that models scored
            on one truth set are resampled together and a table is the same each time.
    """
    interval = stats.bootstrap(
        tuple(arrays),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // len(arrays[0])),
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def over_seeds(values: Sequence[float]) -> Interval:
    """Return the 95 % t interval of the mean over seeds; both ends are NaN for a single seed."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    mean = float(np.mean(values))
    return mean - float(half), mean + float(half)
