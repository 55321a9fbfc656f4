"""Write and read the merged results of a run, one HDF5 file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from kdhpc.errors import DamagedError
from kdhpc.storage.hdf5 import (
    Arrays,
    Piece,
    combine_digests,
    create_file,
    damaged_if_unreadable,
    digest_arrays,
    map_arrays,
    open_file,
    write_pieces,
)
from kdhpc.storage.score_shards import Scores
from kdhpc.types import Json


@dataclass(frozen=True, kw_only=True)
class Results:
    """A merged run: groups `/scores`, `/downstream`, `/tables` and `/models`.

    Arrays are mapped into memory, not copied.
    """

    scores: Mapping[tuple[str, str], Scores]
    """By (sampler, scorer); the scorer `self` is what the sampler computed while it drew."""
    tables: Mapping[str, Arrays]
    """By arm, arrays with a row for each seed; for pipelines that do not score sequences."""
    models: Mapping[str, Mapping[str, Json]]
    """Facts about every model or arm: tau, size, seed, parameters, final loss."""
    recipe: str
    """Recipe of the merge."""
    complete: bool
    """Whether everything that was planned is included."""
    provenance: Mapping[str, str]
    """Config, hosts, versions; outside the logical digest."""
    downstream: Mapping[tuple[str, str], Arrays] = field(default_factory=dict)
    """By (model, task), arrays with a row for each item of the task."""


@dataclass(frozen=True, kw_only=True)
class ScorePieces:
    """Scores of a sampler's sequences under one model, to be written into the merged file."""

    sampler: str
    scorer: str
    num_rows: int
    pieces: Iterable[Piece]
    """Pieces of the arrays of `Scores`."""


@dataclass(frozen=True, kw_only=True)
class Merged:
    """Digests of a merged file."""

    logical_digest: str
    """Digest of everything but the provenance; shards, their order and hosts do not change it."""
    digest: str
    """Digest of its bytes, as `files.digest_of` computes it."""


def write_results(
    path: Path,
    *,
    recipe: str,
    provenance: Mapping[str, str],
    scores: Iterable[ScorePieces] = (),
    tables: Iterable[tuple[str, Arrays]] = (),
    downstream: Iterable[tuple[tuple[str, str], Arrays]] = (),
    models: Mapping[str, Mapping[str, Json]] = MappingProxyType({}),
    complete: bool = True,
) -> Merged:
    """Write a merged file and read it back once, both in pieces.

    At most one piece of an array, or one table, is in memory at a time.

    Args:
        path: the file to write; an old one is replaced.
        recipe: recipe of the merge.
        provenance: texts by name, outside the logical digest.
        scores: groups of `/scores`.
        tables: groups of `/tables`, by name.
        downstream: groups of `/downstream`, by model and task.
        models: facts about every model, as attributes of groups of `/models`.
        complete: whether everything that was planned is included.

    Raises:
        DamagedError: if the file reads back differently.
    """
    lines = []
    with create_file(path) as file:
        file.attrs["recipe"], file.attrs["complete"] = recipe, complete
        for part in scores:
            group = file.create_group(f"scores/{part.sampler}/{part.scorer}")
            lines += write_pieces(group, part.num_rows, part.pieces)
        named = ((f"tables/{name}", arrays) for name, arrays in tables)
        evaluated = ((f"downstream/{'/'.join(pair)}", arrays) for pair, arrays in downstream)
        for name, arrays in chain(named, evaluated):
            num_rows = len(next(iter(arrays.values())))
            lines += write_pieces(file.create_group(name), num_rows, arrays.items())
        for name, facts in models.items():
            file.create_group(f"models/{name}").attrs.update(facts)
        file.create_group("provenance").attrs.update(provenance)
        expected = _logical_digest(lines, models, recipe, complete)
        file.attrs["logical_digest"] = expected
    with damaged_if_unreadable(path, "a merged results file"):
        lines_read, digest = digest_arrays(path)
        with open_file(path) as file:
            facts_read = _facts(file)
    if _logical_digest(lines_read, *facts_read) != expected:
        raise DamagedError(f"{path}: reads back differently from what was written")
    return Merged(logical_digest=expected, digest=digest)


def read_results(path: str | Path) -> Results:
    """Check all of a merged file but its provenance, in pieces, then map its arrays into memory.

    Raises:
        DamagedError: if the file is no merged file, or differs from what was written.
    """
    path = Path(path)
    with damaged_if_unreadable(path, "a merged results file"), path.open("rb") as held:
        results = _read_results(path)
        replaced = not os.path.samestat(os.fstat(held.fileno()), path.stat())
    # A merge may have replaced the file between the check and the mapping.
    return read_results(path) if replaced else results


def _read_results(path: Path) -> Results:
    with damaged_if_unreadable(path, "a merged results file"):
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
        downstream = {}
        for name, arrays in sorted(grouped.get("downstream", {}).items()):
            model, task = name.split("/")
            downstream[model, task] = arrays
        return Results(
            scores=scores,
            downstream=downstream,
            tables=dict(sorted(grouped.get("tables", {}).items())),
            models=models,
            recipe=recipe,
            complete=complete,
            provenance=provenance,
        )


def logical_digest(path: Path) -> str:
    """Read all of a merged file but its provenance, and return the digest of that.

    Raises:
        DamagedError: if the file is no merged file, or differs from what was written.
    """
    with damaged_if_unreadable(path, "a merged results file"):
        lines, _ = digest_arrays(path)
        with open_file(path) as file:
            facts, expected = _facts(file), str(file.attrs["logical_digest"])
    if _logical_digest(lines, *facts) != expected:
        raise DamagedError(f"{path}: its content differs from what was written; merge again")
    return expected


def _facts(file: Any) -> tuple[dict[str, dict[str, Json]], str, bool]:
    """Read models, recipe and completeness of a merged file."""
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
    model_lines = [f"models/{name} {sorted(facts.items())}" for name, facts in models.items()]
    return combine_digests([*lines, *model_lines, f"recipe {recipe}", f"complete {complete}"])
