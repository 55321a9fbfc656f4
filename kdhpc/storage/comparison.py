"""Compare two merged files: array by array, model by model, and where they come from."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdhpc.config import presets
from kdhpc.storage.results import Results
from kdhpc.types import Json

Array = NDArray[Any]
PIECE_ROWS = 4096
"""Rows of an array that are compared at a time, as per-token scores may not fit into memory."""
JSON_FACTS = ("versions", "hosts", "code", "seconds")
"""Facts of the provenance that are JSON."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """An array of two files, or scores of a sampler under a scorer."""

    name: str
    """Name of the array; of scores it is `sampler under scorer`, and the numbers are those of
    `log_prob_sum` in nats per sequence."""
    rows: tuple[int | None, int | None]
    """Rows in either file; None where it is missing."""
    means: tuple[float | None, float | None]
    """Means without NaN; None where there is no number."""
    largest: float | None
    """Largest absolute difference in a row; None if they have no rows in common."""
    is_equal: bool
    """Whether every bit of the array, or of all arrays of these scores, is equal."""

    @property
    def difference(self) -> float | None:
        """Difference of the means, second less first."""
        first, second = self.means
        return None if first is None or second is None else second - first


def pairs(first: Results, second: Results) -> Iterator[Pair]:
    """Yield every array that either file has; scores by sampler and scorer."""
    for of in dict.fromkeys([*first.scores, *second.scores]):
        both = [r.scores[of].arrays() if of in r.scores else {} for r in (first, second)]
        sums = [arrays.get("log_prob_sum") for arrays in both]
        yield _pair(" under ".join(of), sums[0], sums[1], is_equal=_all_equal(both[0], both[1]))
    flat = [_flat(results) for results in (first, second)]
    for name in dict.fromkeys([*flat[0], *flat[1]]):
        one, other = flat[0].get(name), flat[1].get(name)
        yield _pair(name, one, other, is_equal=same_bits(one, other))


def _flat(results: Results) -> dict[str, Array]:
    groups = {**results.tables, **{" in ".join(of): a for of, a in results.downstream.items()}}
    return {f"{group} {name}": array for group, of in groups.items() for name, array in of.items()}


def _pair(name: str, one: Array | None, other: Array | None, *, is_equal: bool) -> Pair:
    return Pair(
        name=name,
        rows=(None if one is None else len(one), None if other is None else len(other)),
        means=(_mean(one), _mean(other)),
        largest=_largest(one, other),
        is_equal=is_equal,
    )


def _is_number(array: Array | None) -> bool:
    return array is not None and array.dtype.kind in "biuf"


def _mean(array: Array | None) -> float | None:
    if array is None or not _is_number(array):
        return None
    values = array.astype(np.float64)
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _largest(one: Array | None, other: Array | None) -> float | None:
    """Return the largest absolute difference; where both are NaN, or infinite alike, it is 0."""
    if one is None or other is None or one.shape != other.shape or not one.size:
        return None
    if not (_is_number(one) and _is_number(other)):
        return None
    first, second = one.astype(np.float64), other.astype(np.float64)
    same = (first == second) | (np.isnan(first) & np.isnan(second))
    with np.errstate(invalid="ignore"):
        return float(np.where(same, 0.0, np.abs(first - second)).max())


def _all_equal(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def same_bits(one: Array | None, other: Array | None) -> bool:
    """Return whether two arrays have the same bits."""
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return all(
        one[start : start + PIECE_ROWS].tobytes() == other[start : start + PIECE_ROWS].tobytes()
        for start in range(0, len(one), PIECE_ROWS)
    )


def models(first: Results, second: Results) -> list[str]:
    """Return the facts in which models differ, a line for each."""
    return presets.difference(_plain(first.models), _plain(second.models))


def configs(first: Results, second: Results) -> list[str]:
    """Return the fields in which the configs of the merges differ, a line for each."""
    one, other = (presets.from_yaml(r.provenance.get("config", "")) for r in (first, second))
    return presets.difference(one, other)


def provenance(first: Results, second: Results) -> list[str]:
    """Return in what else the files say that they were made differently, a line for each."""
    return presets.difference(_provenance(first), _provenance(second))


def _provenance(results: Results) -> dict[str, Json]:
    return {
        name: json.loads(text) if name in JSON_FACTS else text
        for name, text in results.provenance.items()
        if name != "config"
    }


def _plain(facts: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    return {name: dict(of) for name, of in facts.items()}
