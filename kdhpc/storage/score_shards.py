"""Score shards (HDF5): log-probabilities of sequences under one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdhpc.storage.hdf5 import Arrays, join_arrays, read_arrays, reading, write_arrays


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of sequences under one model."""

    log_prob_sum: NDArray[np.float64]
    """[N] nats, over the counted tokens: no prompt, no padding, and by `eos` no end token."""
    num_tokens: NDArray[np.int32]
    """[N] counted tokens."""
    token_log_prob: NDArray[np.float32] | None = None
    """[N, L] nats, NaN where a token is not counted; only where asked for."""


def write_scores(path: Path, scores: Scores) -> None:
    """Write a score shard and read it back.

    Raises:
        DamagedError: if what is read differs.
    """
    write_arrays(path, _score_arrays(scores))


def read_scores(path: Path) -> Scores:
    """Read a score shard: checked, then mapped into memory.

    Raises:
        DamagedError: naming a file that is not one, or whose arrays are not as written.
    """
    with reading(path, "a score shard"):
        return Scores(**read_arrays(path))


def _score_arrays(scores: Scores) -> Arrays:
    return {name: array for name, array in vars(scores).items() if array is not None}


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Score shards, one after the other."""
    return Scores(**join_arrays([_score_arrays(part) for part in parts]))
