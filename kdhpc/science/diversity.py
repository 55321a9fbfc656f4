"""How varied samples are: n-grams that repeat, mass that is missing, and how well text compresses.

These describe samples without a model, beside precision and recall. They depend on the number of
sequences and on their length, so compare sets with the same of both, and two sets of truth's own
samples as a calibration.

Shapes: N sequences, L tokens.
"""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.integer]
Bools = NDArray[np.bool_]

COLLAPSE_REPEATED = 0.05
"""Excess over truth's share of sequences with a repeated 4-gram above which samples count as
collapsed. It was fixed before any run."""
COLLAPSE_MASS = 0.5
"""Part of truth's missing mass below which samples count as collapsed. It was fixed beforehand."""
SELF_BLEU_TEXTS = 200
"""Number of texts of self-BLEU, whose cost is quadratic."""


def ngrams(ids: Ids, length: NDArray[np.integer], n: int) -> tuple[NDArray[np.int64], Bools]:
    """Number the n-grams of sequences: equal numbers are equal n-grams.

    Args:
        ids: [N, L], the prompt included.
        length: [N] number of tokens of each sequence.
        n: number of tokens of an n-gram.

    Returns:
        Numbers [N, L - n + 1], or [N, 0] if L is smaller than n, and which of them lie within their
        sequence.
    """
    if ids.shape[1] < n:
        return np.empty((len(ids), 0), np.int64), np.empty((len(ids), 0), np.bool_)
    windows = np.lib.stride_tricks.sliding_window_view(ids, n, axis=1)
    inside = np.arange(windows.shape[1]) + n <= length[:, None]
    base = int(ids.max(initial=0)) + 1
    if base**n < 2**63:  # one number for each n-gram sorts much faster than n of them
        powers = base ** np.arange(n - 1, -1, -1, dtype=np.int64)
        _, numbers = np.unique(windows[inside].astype(np.int64) @ powers, return_inverse=True)
    else:
        _, numbers = np.unique(windows[inside], axis=0, return_inverse=True)
    out = np.full(inside.shape, -1, dtype=np.int64)
    out[inside] = numbers.reshape(-1)
    return out, inside


def has_repeat(ids: Ids, length: NDArray[np.integer], n: int = 4) -> Bools:
    """Return which sequences have an n-gram more than once: [N]."""
    numbers, inside = ngrams(ids, length, n)
    ordered = np.sort(numbers, axis=1)
    same = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    return np.asarray(same.any(axis=1) & inside.any(axis=1))


def distinct_share(ids: Ids, length: NDArray[np.integer], n: int = 4) -> float:
    """Return the number of different n-grams of all sequences, divided by that of all n-grams."""
    numbers, inside = ngrams(ids, length, n)
    return len(np.unique(numbers[inside])) / max(1, int(inside.sum()))


def distinct_shares(ids: Ids, length: NDArray[np.integer], n: int = 4) -> NDArray[np.float64]:
    """Return each sequence's part of `distinct_share`: [N].

    It is the mean over its n-grams of 1 / number of times that all sequences have it. The mean over
    sequences, weighted by their number of n-grams, is `distinct_share`. NaN without n-grams.
    """
    numbers, inside = ngrams(ids, length, n)
    counts = np.bincount(numbers[inside], minlength=1)
    parts = np.where(inside, 1.0 / np.maximum(counts[numbers], 1), 0.0).sum(axis=1)
    num_ngrams = inside.sum(axis=1)
    return np.where(num_ngrams > 0, parts / np.maximum(num_ngrams, 1), np.nan)


def missing_mass(ids: Ids, length: NDArray[np.integer], n: int = 4) -> float:
    """Estimate the probability that the next n-gram has not been seen yet.

    It is the share of n-grams that occur once (I. J. Good, Biometrika 40 (1953), 237-264).
    """
    numbers, inside = ngrams(ids, length, n)
    counts = np.bincount(numbers[inside])
    return int((counts == 1).sum()) / max(1, int(inside.sum()))


def compression_ratio(texts: Sequence[str]) -> float:
    """Return the bytes of all texts, divided by their bytes after compression by zlib."""
    raw = "\n".join(texts).encode()
    return len(raw) / len(zlib.compress(raw, 9))


def self_bleu(texts: Sequence[str]) -> float:
    """Return the mean BLEU of each of the first 200 texts against the others: 0 to 100.

    It needs sacrebleu, which kdhpc[report] installs. Empty texts are left out.
    """
    from sacrebleu.metrics.bleu import BLEU

    kept = [text for text in texts if text.strip()][:SELF_BLEU_TEXTS]
    bleu = BLEU(effective_order=True)
    scores = [
        bleu.sentence_score(text, [*kept[:index], *kept[index + 1 :]]).score
        for index, text in enumerate(kept)
    ]
    return float(np.mean(scores))
