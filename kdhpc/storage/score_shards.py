"""Write and read score shards (HDF5): log-probabilities of sequences under one model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdhpc.storage.hdf5 import (
    Arrays,
    damaged_if_unreadable,
    join_arrays,
    read_arrays,
    write_arrays,
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of sequences under one model."""

    log_prob_sum: NDArray[np.float64]
    """[N] nats, over the counted tokens: no prompt, no padding, no end token if `eos: mask`."""
    num_tokens: NDArray[np.int32]
    """[N] number of counted tokens."""
    token_log_prob: NDArray[np.float32] | None = None
    """[N, L] nats, NaN where a token is not counted; None unless `scoring.per_token` is set."""


def write_scores(path: Path, scores: Scores) -> None:
    """Write a score shard and read it back.

    Raises:
        DamagedError: if it reads back differently.
    """
    write_arrays(path, _score_arrays(scores))


def read_scores(path: Path) -> Scores:
    """Check a score shard, then map it into memory.

    Raises:
        DamagedError: if the file is no score shard, or its arrays differ from what was written.
    """
    with damaged_if_unreadable(path, "a score shard"):
        return Scores(**read_arrays(path))


def _score_arrays(scores: Scores) -> Arrays:
    return {name: array for name, array in vars(scores).items() if array is not None}


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Concatenate score shards."""
    return Scores(**join_arrays([_score_arrays(part) for part in parts]))
