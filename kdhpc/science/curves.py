"""Precision-recall curves of a model against the truth, exact because both densities are known.

For a factor lambda > 0, precision alpha and recall beta are

    alpha(lambda) = E_{x ~ p''}[min(1, lambda p*(x) / p''(x))]
    beta(lambda)  = E_{x ~ p*}[min(1, p''(x) / (lambda p*(x)))]

Both are integrals of min(p'', lambda p*), so alpha = lambda beta, and the distance of total
variation is 1 - alpha(1). Whole sequences hardly overlap, so x is the first k tokens of a
sequence; one that has ended is its own prefix.

Source: Djolonga et al. 2020 (arXiv 1905.10768), Sykes et al. 2024 (arXiv 2405.01611).

Shapes: N sequences, L tokens, K prefix lengths, M factors. Log-probabilities are in nats.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PREFIXES = (1, 2, 4, 8, 16)
"""Numbers of tokens after the prompt whose distributions are compared."""


def prefix_log_prob(
    token_log_prob: NDArray[np.floating],
    end_log_prob: NDArray[np.floating] | None = None,
    prefixes: Sequence[int] = PREFIXES,
) -> Floats:
    """Sum the log-probabilities of the first k tokens of each sequence.

    Args:
        token_log_prob: [N, L] of every token that counts, NaN elsewhere.
        end_log_prob: [N] of the end token, 0 if the sequence did not end. Give it only if end
            tokens do not count; otherwise `token_log_prob` has them already.
        prefixes: [K] numbers of tokens k.

    Returns:
        [N, K].
    """
    counted = ~np.isnan(token_log_prob)
    index = counted.cumsum(axis=1)
    columns = []
    for k in prefixes:
        inside = counted & (index <= k)
        columns.append(np.where(inside, token_log_prob, 0.0).sum(axis=1, dtype=np.float64))
        if end_log_prob is not None:
            columns[-1] += np.where(index[:, -1] < k, end_log_prob, 0.0)
    return np.stack(columns, axis=1)


def precision_terms(log_ratio: Floats, log_factors: Floats) -> Floats:
    """Return min(1, lambda p*/p'') for samples of p''; their mean is alpha(lambda).

    Args:
        log_ratio: [N] log p* - log p'' of samples of p''.
        log_factors: [M] log lambda.

    Returns:
        [N, M].
    """
    return np.asarray(np.exp(np.minimum(0.0, log_factors + log_ratio[:, None])))


def recall_terms(log_ratio: Floats, log_factors: Floats) -> Floats:
    """Return min(1, p''/(lambda p*)) for samples of p*; their mean is beta(lambda).

    Args:
        log_ratio: [N] log p* - log p'' of samples of p*.
        log_factors: [M] log lambda.

    Returns:
        [N, M].
    """
    return np.asarray(np.exp(np.minimum(0.0, -log_factors - log_ratio[:, None])))
