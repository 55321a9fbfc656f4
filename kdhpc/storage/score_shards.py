"""Write and read score shards (HDF5): log-probabilities of sequences under one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdhpc.storage.hdf5 import (
    damaged_if_unreadable,
    join_arrays,
    read_arrays,
    write_arrays,
)

NUM_FIRST = 4
"""Number of tokens after the prompt whose log-probability under each component is kept."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of sequences under one model."""

    log_prob_sum: NDArray[np.float64]
    """[N] nats, over the counted tokens: no prompt, no padding, no end token if `eos: mask`."""
    num_tokens: NDArray[np.int32]
    """[N] number of counted tokens."""
    token_log_prob: NDArray[np.float32] | None = None
    """[N, L] nats, NaN where a token is not counted; None unless `scoring.per_token` is set."""
    end_log_prob: NDArray[np.float64] | None = None
    """[N] nats: log-probability of the end token, whether or not it counts; 0 if the sequence did
    not end. None in shards of earlier versions."""
    divergence_sum: NDArray[np.float64] | None = None
    """[N] nats: KL divergence of the sampler from the scorer over all drawn tokens, each averaged
    over the vocabulary; only with `scoring.expected`, whose `log_prob_sum` is averaged too."""
    component: NDArray[np.uint8] | None = None
    """[N] index of the component that each sequence was drawn from; only of a truth that is a
    mixture, where the scorer is `self`."""
    component_log_prob: NDArray[np.float64] | None = None
    """[N, K] nats: log-probability of all drawn tokens under each component of such a truth, where
    it is the scorer, or `self`."""
    component_first_log_prob: NDArray[np.float64] | None = None
    """[N, K] nats: the same of the first `NUM_FIRST` drawn tokens."""
    right: NDArray[np.uint8] | None = None
    """[N] 1 if the sequence's answer is right, else 0; only for prompts with answers, where the
    scorer is `self`."""
    rouge_l: NDArray[np.float32] | None = None
    """[N] ROUGE-L of the text after the prompt, 0 to 1; only for prompts with references, where the
    scorer is `self`."""
    num_characters: NDArray[np.int32] | None = None
    """[N] characters of the texts between prompt and end, where a judge with another tokenizer
    scores them; 0 if a text is empty, or is left out because the judge cannot write it or it is too
    long."""
    num_replaced: NDArray[np.int32] | None = None
    """[N] how many of them replace bytes that are no character, or characters that the judge cannot
    write; beside `num_characters`."""
    ids: NDArray[np.uint16] | NDArray[np.uint32] | None = None
    """[N, L] token ids of the sequences; only in archives that keep them (analysis/archive.py)."""
    length: NDArray[np.int32] | None = None
    """[N] number of tokens of the sequences, the prompt included; beside `ids`."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that are there, by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


def group_of(temperature: float) -> str:
    """Return the group of a score shard that holds the scores at a temperature; `` is the root."""
    return "" if temperature == 1.0 else f"T{temperature:g}/"


def write_scores(path: Path, scores: Mapping[float, Scores]) -> None:
    """Write a score shard, with one group for each temperature, and read it back.

    Raises:
        DamagedError: if it reads back differently.
    """
    write_arrays(
        path,
        {
            group_of(temperature) + name: array
            for temperature, part in scores.items()
            for name, array in part.arrays().items()
        },
    )


def read_scores(path: Path, temperature: float = 1.0) -> Scores:
    """Check a score shard, then map the scores at one temperature into memory.

    Raises:
        DamagedError: if the file is no score shard, or its arrays differ from what was written.
    """
    group = group_of(temperature)
    with damaged_if_unreadable(path, "a score shard"):
        arrays = {name.rpartition("/"): array for name, array in read_arrays(path).items()}
        return Scores(
            **{
                name: array
                for (above, slash, name), array in arrays.items()
                if above + slash == group
            }
        )


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Concatenate the scores of consecutive rows."""
    return Scores(**join_arrays([part.arrays() for part in parts]))
