"""Random numbers that depend on their purpose, never on which process draws them or when.

Every stream has a name (`truth/train`, `teacher/s0/tau0.8/train`) and every sequence its own
counter, so a draw is a pure function of run seed, stream, sequence index and position.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def _philox(seed: int, stream: str, sequence_index: int, lane: int = 0) -> np.random.Philox:
    key = np.frombuffer(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:16], dtype=np.uint64)
    # The generator counts blocks of four numbers in the lowest word of the counter.
    return np.random.Philox(key=key, counter=np.array([0, lane, sequence_index, 0], np.uint64))


def uniforms(
    seed: int, stream: str, sequence_indices: range, num_positions: int
) -> NDArray[np.float64]:
    """Draw one uniform number in [0, 1) with 53 random bits for every sequence and position.

    Returns:
        [N, num_positions] float64; row n belongs to the n-th of the N `sequence_indices`.
    """
    return uniforms_of(seed, [(stream, index) for index in sequence_indices], num_positions)


def uniforms_of(
    seed: int, sequences: Sequence[tuple[str, int]], num_positions: int
) -> NDArray[np.float64]:
    """Draw uniform numbers as `uniforms` does, for sequences of several streams.

    Args:
        seed: seed of the run.
        sequences: stream and index in it of N sequences.
        num_positions: how many numbers each of them gets.

    Returns:
        [N, num_positions] float64.
    """
    rows = [_philox(seed, stream, i).random_raw(num_positions) for stream, i in sequences]
    return (np.stack(rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform_block(seed: int, stream: str, num_rows: int, num_columns: int) -> NDArray[np.float64]:
    """Draw uniform numbers in (0, 1) for a stream with many small rows, such as points.

    Returns:
        [num_rows, num_columns] float64. A larger block of the same stream starts with the same
        rows.
    """
    raw = _philox(seed, stream, 0).random_raw(num_rows * num_columns)
    # Adding a half excludes 0 and 1.
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5).reshape(num_rows, -1) * 2.0**-53


def permutation(seed: int, stream: str, epoch: int, num_items: int) -> NDArray[np.int64]:
    """Return the order of `num_items` items in an epoch; it does not depend on the ranks.

    Returns:
        [num_items] int64.
    """
    return np.argsort(_philox(seed, stream, epoch).random_raw(num_items), kind="stable")


def integer_seed(seed: int, stream: str) -> int:
    """Return a 63-bit seed for a generator that takes one, such as `torch.manual_seed`."""
    return int(_philox(seed, stream, 0).random_raw()) >> 1
