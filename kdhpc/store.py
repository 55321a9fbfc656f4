"""File formats: token shards (Arrow), score shards and merged results (HDF5), text corpora.

A token shard opens without this project:
`datasets.load_dataset("arrow", data_files="runs/demo/2-sample-truth/train/*.arrow", split="train")`
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdhpc.artifacts import DISK_FULL_ERRNOS
from kdhpc.errors import DamagedError, InputError

MAX_VOCAB_SIZE = 2**16
"""Token ids are stored as uint16."""
HDF5_ROOM_BYTES = 2**16
"""For what HDF5 writes beside the arrays."""
HDF5_ERRORS = (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError)
"""What h5py raises for a file whose bytes are not as written."""
ROW_COLUMNS = {"length": np.int32, "log_prob_sum": np.float64, "log_prob_tau_sum": np.float64}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Sequences and what their sampler thought of them."""

    ids: NDArray[np.uint16]
    """[N, L] token ids, the prompt first; what lies beyond a row's length means nothing."""
    length: NDArray[np.int32]
    """[N] tokens in the row: prompt, drawn tokens, and the end-of-sequence token if drawn."""
    log_prob_sum: NDArray[np.float64]
    """[N] nats: the sampler's own log-probability at temperature 1 of the counted tokens."""
    log_prob_tau_sum: NDArray[np.float64]
    """[N] nats: the same under the distribution that was drawn from (tau, truncation)."""

    def __len__(self) -> int:
        return len(self.length)


def write_samples(path: Path, samples: Samples, metadata: Mapping[str, str]) -> None:
    """Write a token shard as one Arrow record batch and read it back.

    Raises:
        DamagedError: if what is read differs.
    """
    import pyarrow as pa

    width = samples.ids.shape[1]
    columns = {"ids": pa.FixedSizeListArray.from_arrays(pa.array(samples.ids.reshape(-1)), width)}
    for name, dtype in ROW_COLUMNS.items():
        columns[name] = pa.array(getattr(samples, name).astype(dtype))
    table = pa.table(columns).replace_schema_metadata(dict(metadata))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    again = read_samples([path])
    if not (
        np.array_equal(again.ids, samples.ids) and np.array_equal(again.length, samples.length)
    ):
        raise DamagedError(f"{path}: reads back differently from what was written")


def read_samples(paths: Sequence[Path]) -> Samples:
    """Token shards, one after the other; a single one is mapped into memory, not copied.

    Raises:
        DamagedError: naming a file that is not a token shard.
    """
    parts = [_read_sample_shard(path) for path in paths]
    if len(parts) == 1:
        return parts[0]
    return Samples(
        ids=np.concatenate([part.ids for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        log_prob_sum=np.concatenate([part.log_prob_sum for part in parts]),
        log_prob_tau_sum=np.concatenate([part.log_prob_tau_sum for part in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Token ids of several shards as one array [N, L], mapped into memory, never copied whole."""

    parts: tuple[NDArray[np.uint16], ...]
    """[n_i, L] each."""
    length: NDArray[np.int32]
    """[N] tokens in each row."""

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint16]:
        """The rows asked for, [n, L], read from wherever they are."""
        ends = np.cumsum([len(part) for part in self.parts])
        which = np.searchsorted(ends, rows, side="right")
        found = np.empty((len(rows), self.parts[0].shape[1]), np.uint16)
        for index in np.unique(which):
            part = self.parts[index]
            found[which == index] = part[rows[which == index] - (ends[index] - len(part))]
        return found


def map_token_rows(paths: Sequence[Path]) -> TokenRows:
    """The ids of token shards, for random access.

    Raises:
        DamagedError: naming a file that is not a token shard.
    """
    parts = [_read_sample_shard(path) for path in paths]
    return TokenRows(
        parts=tuple(part.ids for part in parts),
        length=np.concatenate([part.length for part in parts]),
    )


def _read_sample_shard(path: Path) -> Samples:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_stream(source).read_all()
        ids = table["ids"].combine_chunks()
        flat = ids.flatten().to_numpy()
        rows = {name: table[name].combine_chunks().to_numpy() for name in ROW_COLUMNS}
        return Samples(ids=flat.reshape(len(table), -1), **rows)
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DamagedError(f"{path}: not a token shard ({error})") from error


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Log-probabilities of sequences under one model."""

    log_prob_sum: NDArray[np.float64]
    """[N] nats, over the counted tokens: no prompt, no padding, and by `eos` no end token."""
    num_tokens: NDArray[np.int32]
    """[N] counted tokens."""
    token_log_prob: NDArray[np.float32] | None = None
    """[N, L] nats, NaN where a token is not counted; only where asked for."""


Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name; the rows of all of them belong together."""


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a shard of named arrays and read it back.

    Raises:
        DamagedError: if what is read differs.
    """
    import h5py

    with h5py.File(path, "w", locking=False) as file:
        _put_arrays(file, arrays)
    again = read_arrays(path)
    if not all(np.array_equal(again[name], array) for name, array in arrays.items()):
        raise DamagedError(f"{path}: reads back differently from what was written")


def read_arrays(path: Path) -> Arrays:
    """Read a shard of named arrays.

    Raises:
        DamagedError: naming a file that is not one.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return _get_arrays(file)
    except OSError as error:
        raise DamagedError(f"{path}: not a shard of arrays ({error})") from error


def _put_arrays(group: Any, arrays: Arrays) -> None:
    num_bytes = sum(array.nbytes for array in arrays.values())
    _need_room(Path(group.file.filename).parent, num_bytes + HDF5_ROOM_BYTES)
    for name, array in arrays.items():
        group.create_dataset(name, data=array, fletcher32=True, chunks=_chunks(array))
    group.file.flush()


def _need_room(folder: Path, num_bytes: int) -> None:
    """Raise ENOSPC or EDQUOT now: HDF5 that meets a full disk can take the process with it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise


def _get_arrays(group: Any) -> Arrays:
    return {name: found[:] for name, found in group.items()}


def join_arrays(parts: Sequence[Arrays]) -> Arrays:
    """Shards of the same named arrays, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def write_scores(path: Path, scores: Scores) -> None:
    """Write a score shard and read it back.

    Raises:
        DamagedError: if what is read differs.
    """
    import h5py

    with h5py.File(path, "w", locking=False) as file:
        _put_arrays(file, _score_arrays(scores))
    if not np.array_equal(read_scores(path).log_prob_sum, scores.log_prob_sum):
        raise DamagedError(f"{path}: reads back differently from what was written")


def read_scores(path: Path) -> Scores:
    """Read a score shard.

    Raises:
        DamagedError: naming a file that is not one.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            return _get_scores(file)
    except HDF5_ERRORS as error:
        raise DamagedError(f"{path}: not a score shard ({error})") from error


def _score_arrays(scores: Scores) -> Arrays:
    arrays: dict[str, NDArray[Any]] = {
        "log_prob_sum": scores.log_prob_sum,
        "num_tokens": scores.num_tokens,
    }
    if scores.token_log_prob is not None:
        arrays["token_log_prob"] = scores.token_log_prob
    return arrays


def _chunks(array: NDArray[Any]) -> tuple[int, ...]:
    """Chunks of about 1 MiB, whole rows; checksums need chunks."""
    row_bytes = max(1, array[:1].nbytes)
    return (max(1, min(len(array), 2**20 // row_bytes)), *array.shape[1:])


def _get_scores(group: Any) -> Scores:
    token = group.get("token_log_prob")
    return Scores(
        log_prob_sum=group["log_prob_sum"][:],
        num_tokens=group["num_tokens"][:],
        token_log_prob=None if token is None else token[:],
    )


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Score shards, one after the other."""
    tokens = [part.token_log_prob for part in parts if part.token_log_prob is not None]
    return Scores(
        log_prob_sum=np.concatenate([part.log_prob_sum for part in parts]),
        num_tokens=np.concatenate([part.num_tokens for part in parts]),
        token_log_prob=np.concatenate(tokens) if tokens else None,
    )


@dataclass(frozen=True, kw_only=True)
class Results:
    """A merged run: `/scores/<sampler>/<scorer>`, `/tables/<arm>/<array>`, `/models/<name>`."""

    scores: Mapping[tuple[str, str], Scores]
    """By (sampler, scorer); the scorer `self` is the sampler's own opinion while it drew."""
    tables: Mapping[str, Arrays]
    """By arm, arrays with a row a seed; of pipelines whose scores are not of sequences."""
    models: Mapping[str, Mapping[str, Any]]
    """Facts of every model or arm: tau, size, seed, parameters, final loss."""
    recipe: str
    """Of the merge."""
    complete: bool
    """Whether nothing that was planned is missing."""
    provenance: Mapping[str, str]
    """Config, hosts, versions; outside the logical digest."""


def write_results(
    path: Path,
    scores: Iterator[tuple[str, str, Scores]],
    models: Mapping[str, Mapping[str, Any]],
    *,
    tables: Iterable[tuple[str, Arrays]] = (),
    recipe: str,
    complete: bool,
    provenance: Mapping[str, str],
) -> str:
    """Write a merged file, one pair of sampler and scorer (or table) in memory at a time.

    It is read back once.

    Returns:
        The logical digest.

    Raises:
        DamagedError: if the digest of what is read differs from that of what was written.
    """
    import h5py

    digests = []
    with h5py.File(path, "w", locking=False) as file:
        file.attrs["recipe"], file.attrs["complete"] = recipe, complete
        for sampler, scorer, part in scores:
            _put_arrays(file.create_group(f"scores/{sampler}/{scorer}"), _score_arrays(part))
            digests.append(_scores_digest(sampler, scorer, part))
        for name, arrays in tables:
            _put_arrays(file.create_group(f"tables/{name}"), arrays)
            digests += _table_digests(name, arrays)
        for name, facts in models.items():
            file.create_group(f"models/{name}").attrs.update(facts)
            digests.append(_model_digest(name, facts))
        file.create_group("provenance").attrs.update(provenance)
        expected = _combine(digests, recipe, complete)
        file.attrs["logical_digest"] = expected
    if logical_digest(path) != expected:
        raise DamagedError(f"{path}: reads back differently from what was written")
    return expected


def read_results(path: Path) -> Results:
    """Read a merged file, all but its provenance checked against its logical digest.

    Raises:
        DamagedError: naming a file that is not one, or that says something else than was written.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            scores = {
                (sampler, scorer): _get_scores(group)
                for sampler, scorers in file.get("scores", {}).items()
                for scorer, group in scorers.items()
            }
            tables = {name: _get_arrays(group) for name, group in file.get("tables", {}).items()}
            models = {name: _attributes(group) for name, group in file.get("models", {}).items()}
            results = Results(
                scores=scores,
                tables=tables,
                models=models,
                recipe=str(file.attrs["recipe"]),
                complete=bool(file.attrs["complete"]),
                provenance=_attributes(file["provenance"]),
            )
            expected = str(file.attrs["logical_digest"])
    except HDF5_ERRORS as error:
        raise DamagedError(f"{path}: not a merged results file ({error})") from error
    if _logical_digest(results) != expected:
        raise DamagedError(f"{path}: says something else than was written; merge again")
    return results


def _attributes(group: Any) -> dict[str, Any]:
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in group.attrs.items()
    }


def logical_digest(path: Path) -> str:
    """sha256 over what a merged file says: all but its provenance.

    Raises:
        DamagedError: naming a file that is not a merged one.
    """
    return _logical_digest(read_results(path))


def _logical_digest(results: Results) -> str:
    digests = [_scores_digest(*pair, scores) for pair, scores in results.scores.items()]
    digests += [d for name, arrays in results.tables.items() for d in _table_digests(name, arrays)]
    digests += [_model_digest(name, facts) for name, facts in results.models.items()]
    return _combine(digests, results.recipe, results.complete)


def _scores_digest(sampler: str, scorer: str, scores: Scores) -> str:
    return _arrays_digest(f"{sampler}/{scorer}", list(_score_arrays(scores).values()))


def _table_digests(name: str, arrays: Arrays) -> list[str]:
    return [_arrays_digest(f"{name}/{column}", [array]) for column, array in arrays.items()]


def _arrays_digest(name: str, arrays: Sequence[NDArray[Any]]) -> str:
    found = hashlib.sha256(name.encode())
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def _model_digest(name: str, facts: Mapping[str, Any]) -> str:
    text = "".join(f"{key}={facts[key]!r}\n" for key in sorted(facts))
    return hashlib.sha256(f"{name}\n{text}".encode()).hexdigest()


def _combine(digests: list[str], recipe: str, complete: bool) -> str:
    return hashlib.sha256("\n".join([*sorted(digests), recipe, str(complete)]).encode()).hexdigest()


CORPUS_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def read_corpus(source: str, text_column: str) -> list[str]:
    """Documents of a corpus: `python-docs`, a local text, JSONL or Parquet file, or a hub id.

    A text file is cut at blank lines, so that short documents have an end to learn.

    Raises:
        InputError: if it cannot be read or has no such column.
    """
    import datasets

    if source == "python-docs":
        from pydoc_data import topics

        texts = [topics.topics[name] for name in sorted(topics.topics)]
        return [part for text in texts for part in _paragraphs(text)]
    kinds = CORPUS_KINDS
    path = Path(source)
    datasets.disable_progress_bars()
    try:
        if path.suffix in kinds:
            found = datasets.load_dataset(
                kinds[path.suffix],
                data_files=str(path),
                split="train",
                **({"sample_by": "paragraph"} if path.suffix == ".txt" else {}),
            )
        else:
            found = datasets.load_dataset(source, split="train")
    except Exception as error:  # datasets raises its own, pyarrow's and the hub's errors
        raise InputError(f"truth.corpus={source}: cannot be read ({error})") from error
    if text_column not in found.column_names:
        raise InputError(
            f"truth.text_column={text_column}: {source} has the columns "
            f"{', '.join(found.column_names)}"
        )
    return [str(text) for text in found[text_column] if text]


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in text.split("\n\n") if part.strip()]


def _columns(path: Path) -> list[str] | None:
    """Columns of a corpus by its first document; None where that does not tell."""
    if path.suffix == ".txt":
        return ["text"]
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (OSError, ValueError) as error:
            raise InputError(f"truth.corpus={path}: not a Parquet file ({error})") from error
    with path.open() as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return None
    return list(first) if isinstance(first, dict) else None


def corpus_fingerprint(source: str, text_column: str = "text") -> str:
    """sha256 of a local corpus, without reading it as a data set; hub ids stand for themselves.

    Raises:
        InputError: for a local file that is not there, is empty, of no known kind, or without the
            column.
    """
    if source == "python-docs":
        from pydoc_data import topics

        text = "\0".join(topics.topics[name] for name in sorted(topics.topics))
        return hashlib.sha256(text.encode()).hexdigest()
    path = Path(source)
    if path.is_file():
        if path.suffix not in CORPUS_KINDS:
            raise InputError(
                f"truth.corpus={source}: expected a file named {', '.join(CORPUS_KINDS)}"
            )
        if not path.stat().st_size:
            raise InputError(f"truth.corpus={source}: is empty; expected documents")
        columns = _columns(path)
        if columns is not None and text_column not in columns:
            raise InputError(
                f"truth.text_column={text_column}: {source} has the columns {', '.join(columns)}"
            )
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    looks_local = path.suffix in {".txt", ".jsonl", ".json", ".parquet"} or source.startswith(
        (".", "~", os.sep)
    )
    if looks_local:
        raise InputError(f"truth.corpus={source}: no such file")
    return f"hub:{source}"
