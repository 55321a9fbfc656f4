"""The merged results of a run, one HDF5 file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kdhpc.errors import DamagedError
from kdhpc.storage.hdf5 import (
    Arrays,
    Piece,
    combine,
    create,
    digests,
    map_arrays,
    open_file,
    put,
    reading,
)
from kdhpc.storage.score_shards import Scores
from kdhpc.types import Json


@dataclass(frozen=True, kw_only=True)
class Results:
    """A merged run: `/scores/<sampler>/<scorer>`, `/tables/<arm>/<array>`, `/models/<name>`.

    Arrays are mapped into memory, not copied.
    """

    scores: Mapping[tuple[str, str], Scores]
    """By (sampler, scorer); the scorer `self` is the sampler's own opinion while it drew."""
    tables: Mapping[str, Arrays]
    """By arm, arrays with a row a seed; of pipelines whose scores are not of sequences."""
    models: Mapping[str, Mapping[str, Json]]
    """Facts of every model or arm: tau, size, seed, parameters, final loss."""
    recipe: str
    """Of the merge."""
    complete: bool
    """Whether nothing that was planned is missing."""
    provenance: Mapping[str, str]
    """Config, hosts, versions; outside the logical digest."""


@dataclass(frozen=True, kw_only=True)
class ScorePieces:
    """Scores of a sampler's sequences under one model, on their way into the merged file."""

    sampler: str
    scorer: str
    num_rows: int
    pieces: Iterable[Piece]
    """Of the arrays of `Scores`."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Digests of a merged file."""

    logical_digest: str
    """Of what it says, all but its provenance: not of shards, order or place."""
    digest: str
    """Of its bytes, as `artifacts.digest_of` finds it."""


def write_results(
    path: Path,
    *,
    recipe: str,
    provenance: Mapping[str, str],
    scores: Iterable[ScorePieces] = (),
    tables: Iterable[tuple[str, Arrays]] = (),
    models: Mapping[str, Mapping[str, Json]] = MappingProxyType({}),
    complete: bool = True,
) -> Merged:
    """Write a merged file, one piece of an array (or one table) in memory at a time.

    It is read back once, in pieces too.

    Args:
        path: of the file, which is replaced.
        recipe: of the merge.
        provenance: texts by name, outside the logical digest.
        scores: groups of `/scores`.
        tables: groups of `/tables`.
        models: facts of every model, as attributes of groups of `/models`.
        complete: whether nothing that was planned is missing.

    Raises:
        DamagedError: if the digest of what is read differs from that of what was written.
    """
    lines = []
    with create(path) as file:
        file.attrs["recipe"], file.attrs["complete"] = recipe, complete
        for part in scores:
            group = file.create_group(f"scores/{part.sampler}/{part.scorer}")
            lines += put(group, part.num_rows, part.pieces)
        for name, arrays in tables:
            num_rows = len(next(iter(arrays.values())))
            lines += put(file.create_group(f"tables/{name}"), num_rows, arrays.items())
        for name, facts in models.items():
            file.create_group(f"models/{name}").attrs.update(facts)
        file.create_group("provenance").attrs.update(provenance)
        expected = _logical_digest(lines, models, recipe, complete)
        file.attrs["logical_digest"] = expected
    with reading(path, "a merged results file"):
        found, digest = digests(path)
        with open_file(path) as file:
            facts_read = _facts(file)
    if _logical_digest(found, *facts_read) != expected:
        raise DamagedError(f"{path}: reads back differently from what was written")
    return Merged(logical_digest=expected, digest=digest)


def read_results(path: Path) -> Results:
    """Read a merged file: all but its provenance checked in pieces, then arrays mapped into memory.

    Raises:
        DamagedError: naming a file that is not one, or that says something else than was written.
    """
    with reading(path, "a merged results file"), path.open("rb") as held:
        found = _read_results(path)
        replaced = not os.path.samestat(os.fstat(held.fileno()), path.stat())
    return read_results(path) if replaced else found


def _read_results(path: Path) -> Results:
    with reading(path, "a merged results file"):
        logical_digest(path)
        with open_file(path) as file:
            models, recipe, complete = _facts(file)
            provenance = _attributes(file["provenance"])
        grouped: dict[str, dict[str, dict[str, Json]]] = {}
        for name, array in map_arrays(path).items():
            kind, rest = name.split("/", 1)
            group, column = rest.rsplit("/", 1)
            grouped.setdefault(kind, {}).setdefault(group, {})[column] = array
        scores = {}
        for name, arrays in sorted(grouped.get("scores", {}).items()):
            sampler, scorer = name.split("/")
            scores[sampler, scorer] = Scores(**arrays)
        return Results(
            scores=scores,
            tables=dict(sorted(grouped.get("tables", {}).items())),
            models=models,
            recipe=recipe,
            complete=complete,
            provenance=provenance,
        )


def logical_digest(path: Path) -> str:
    """The digest of what a merged file says: of all but its provenance.

    Raises:
        DamagedError: naming a file that is not a merged one, or says something else than was
            written.
    """
    with reading(path, "a merged results file"):
        lines, _ = digests(path)
        with open_file(path) as file:
            facts, expected = _facts(file), str(file.attrs["logical_digest"])
    if _logical_digest(lines, *facts) != expected:
        raise DamagedError(f"{path}: says something else than was written; merge again")
    return expected


def _facts(file: Any) -> tuple[dict[str, dict[str, Json]], str, bool]:
    """Models, recipe and completeness of a merged file."""
    models = {name: _attributes(group) for name, group in file.get("models", {}).items()}
    return models, str(file.attrs["recipe"]), bool(file.attrs["complete"])


def _attributes(group: Any) -> dict[str, Json]:
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in group.attrs.items()
    }


def _logical_digest(
    lines: Sequence[str], models: Mapping[str, Mapping[str, Json]], recipe: str, complete: bool
) -> str:
    facts = [f"models/{name} {sorted(found.items())}" for name, found in models.items()]
    return combine([*lines, *facts, f"recipe {recipe}", f"complete {complete}"])
