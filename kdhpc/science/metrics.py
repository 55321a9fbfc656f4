"""Precision, recall and their uncertainty from per-sequence scores.

precision = E_{x ~ p''}[log p*(x)], recall = E_{x ~ p*}[log p''(x)], both in nats per token and
weighted by tokens: sum of log-probabilities over sum of counted tokens. The prompt and padding
never count; the end-of-sequence token counts with `eos: learn` only (decision 2).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]
Numbers = NDArray[np.floating | np.integer]


def per_token(log_prob_sum: Numbers, num_tokens: Numbers, axis: int = -1) -> Numbers:
    """Token-weighted mean log-probability, nats per token."""
    mean: Numbers = log_prob_sum.sum(axis=axis) / num_tokens.sum(axis=axis)
    return mean


def bootstrap(
    arrays: Sequence[Numbers],
    statistic: Callable[..., Numbers] = per_token,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """95 % percentile interval of a statistic over sequences, which are drawn together (paired).

    Args:
        arrays: each [N]; row n of all of them is one sequence.
        statistic: function of the arrays with an `axis` argument.
        resamples: number of bootstrap samples.
        seed: of the bootstrap. The same seed draws the same sequences, so that models scored on one
            truth set are resampled together and a table is the same each time.
    """
    found = stats.bootstrap(
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
    return float(found.low), float(found.high)


def over_seeds(values: Sequence[float]) -> Interval:
    """95 % t interval of the mean over seeds; NaN for a single one."""
    if len(values) < 2:
        return math.nan, math.nan
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    mean = float(np.mean(values))
    return mean - float(half), mean + float(half)
