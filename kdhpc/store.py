"""File formats: token shards (Arrow), score shards and merged results (HDF5), text corpora.

A token shard opens without this project:
`datasets.load_dataset("arrow", data_files="runs/demo/2-sample-truth/train/*.arrow", split="train")`

Arrays in HDF5 lie in one piece each, so that any of them can be mapped into memory:
`np.memmap(path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)`. HDF5 has checksums
for chunks only, so a file carries a digest over its arrays.
"""

import contextlib
import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdhpc.artifacts import DISK_FULL_ERRNOS, PIECE_BYTES, Digest
from kdhpc.errors import DamagedError, InputError
from kdhpc.types import Json

MAX_VOCAB_SIZE = 2**16
"""Token ids are stored as uint16."""
HDF5_ROOM_BYTES = 2**16
"""For what HDF5 writes beside the arrays."""
HDF5_ALIGNMENT_BYTES = 64
"""Of every array in a file, so that mapped ones are aligned for any dtype."""
HDF5_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, AttributeError)
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

    def __getitem__(self, rows: slice) -> "Samples":
        """Some of the sequences, not copied."""
        return Samples(**{name: array[rows] for name, array in vars(self).items()})


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
        ids = _numbers(_in_one_piece(table["ids"]).values, np.uint16)
        rows: dict[str, Any] = {
            name: _numbers(_in_one_piece(table[name]), dtype) for name, dtype in ROW_COLUMNS.items()
        }
        return Samples(ids=ids.reshape(len(table), -1), **rows)
    except (pa.ArrowException, AttributeError, KeyError, ValueError, OSError) as error:
        raise DamagedError(f"{path}: not a token shard ({error})") from error


def _in_one_piece(column: Any) -> Any:
    """A column of a table: where it is mapped, if it was written as one batch."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _numbers(array: Any, dtype: type) -> NDArray[Any]:
    """An Arrow array of numbers, not copied; its own `to_numpy` imports pandas."""
    import pyarrow as pa

    if array.type != pa.from_numpy_dtype(dtype) or array.null_count:
        raise ValueError(f"expected {np.dtype(dtype)}, found {array.type}")
    start = array.offset * np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1], dtype, len(array), start)


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
Piece = tuple[str, NDArray[Any]]
"""Some rows [n, ...] of an array, by its name; its memory may be used again for the next piece."""


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a shard of named arrays and read it back.

    Raises:
        DamagedError: if what is read differs.
    """
    with _create(path) as file:
        lines = _put(file, len(next(iter(arrays.values()))), arrays.items())
        file.attrs["digest"] = _combine(lines)
    _verify_shard(path, _combine(lines))


def read_arrays(path: Path) -> Arrays:
    """Read a shard of named arrays: checked, then mapped into memory.

    Raises:
        DamagedError: naming a file that is not one, or whose arrays are not as written.
    """
    with _reading(path, "a shard of arrays"):
        with _open(path) as file:
            expected = str(file.attrs["digest"])
        _verify_shard(path, expected)
        return _map_arrays(path)


def _verify_shard(path: Path, expected: str) -> None:
    lines, _ = _digests(path)
    if _combine(lines) != expected:
        raise DamagedError(f"{path}: its arrays are not what was written")


def join_arrays(parts: Sequence[Arrays]) -> Arrays:
    """Shards of the same named arrays, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


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
    with _reading(path, "a score shard"):
        return Scores(**read_arrays(path))


def _score_arrays(scores: Scores) -> Arrays:
    return {name: array for name, array in vars(scores).items() if array is not None}


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Score shards, one after the other."""
    return Scores(**join_arrays([_score_arrays(part) for part in parts]))


def read_pieces(path: Path, whole: Digest) -> Iterator[Piece]:
    """The arrays of an HDF5 file of ours, some rows at a time, in one read of the whole file.

    Args:
        path: of the file.
        whole: is fed every byte of it, in order; before the end, what was yielded may be wrong.

    Raises:
        DamagedError: naming a file that is not one.
    """
    with _reading(path, "an HDF5 file of arrays"):
        layout = _layout(path)
        largest = max((at.row_bytes for at in layout.values() if at.num_bytes), default=0)
        buffer = memoryview(bytearray(max(PIECE_BYTES, largest)))
        with path.open("rb", buffering=0) as file:

            def read(num_bytes: int) -> memoryview:
                done = 0
                while done < num_bytes:
                    size = file.readinto(buffer[done:num_bytes])
                    if not size:
                        raise EOFError(f"ends {num_bytes - done} bytes early")
                    done += size
                whole.update(buffer[:num_bytes])
                return buffer[:num_bytes]

            for name, at in layout.items():
                while (gap := at.offset - file.tell()) > 0:
                    read(min(len(buffer), gap))
                if at.num_bytes and gap:
                    raise ValueError(f"{name} lies over another array")
                step = max(1, PIECE_BYTES // max(1, at.row_bytes))
                for start in range(0, max(1, at.shape[0]), step):
                    shape = (min(step, at.shape[0] - start), *at.shape[1:])
                    yield name, np.ndarray(shape, at.dtype, read(shape[0] * at.row_bytes))
            while size := file.readinto(buffer):
                whole.update(buffer[:size])


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an array lies in its file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


def _place(dataset: Any) -> _Place:
    """Where a dataset lies. h5py is slow to say, so it is asked once."""
    shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
    if (not shape and dataset.size) or dtype.hasobject:
        raise ValueError(f"{dataset.name} is no array")
    at = _Place(offset=offset or 0, dtype=dtype, shape=shape)
    if at.num_bytes and offset is None:
        raise ValueError(f"{dataset.name} does not lie in one piece")
    return at


def _layout(path: Path) -> dict[str, _Place]:
    """Every array of a file by its whole name, in the order of the file."""
    import h5py

    found: dict[str, _Place] = {}
    file_bytes = path.stat().st_size

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = at = _place(item)
            if at.num_bytes and at.offset + at.num_bytes > file_bytes:
                raise ValueError(f"{name} lies beyond the end")

    with _open(path) as file:
        file.visititems(visit)
    return dict(sorted(found.items(), key=lambda entry: entry[1].offset))


def _map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Every array of a file by its whole name, through one mapping of the file."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return {
        name: np.ndarray(at.shape, at.dtype, mapped, at.offset)
        for name, at in _layout(path).items()
    }


def map_array(path: Path, name: str) -> NDArray[Any]:
    """One array of an HDF5 file of ours, mapped into memory.

    Raises:
        DamagedError: naming a file that is not one, or has no such array.
    """
    with _reading(path, "an HDF5 file of arrays"):
        return _map_arrays(path)[name]


def _create(path: Path) -> Any:
    import h5py

    alignment = {"alignment_threshold": 1, "alignment_interval": HDF5_ALIGNMENT_BYTES}
    return h5py.File(path, "w", locking=False, **alignment)


def _open(path: Path) -> Any:
    import h5py

    return h5py.File(path, "r", locking=False)


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Name the file in whatever is raised for bytes that are not as written."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise DamagedError(f"{path}: not {what} ({error})") from error


def _put(group: Any, num_rows: int, pieces: Iterable[Piece]) -> list[str]:
    """Write arrays of `num_rows` rows past HDF5, which is half as fast.

    Returns:
        A line for each: name, dtype, shape and digest.
    """
    import h5py

    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    inside = group.name.strip("/")
    places: dict[str, _Place] = {}
    written: dict[str, int] = {}
    digests = {}
    with open(group.file.filename, "r+b", buffering=0) as sink:
        for name, piece in pieces:
            if name not in places:
                shape = (num_rows, *piece.shape[1:])
                num_bytes = num_rows * piece[:1].nbytes + HDF5_ROOM_BYTES
                _need_room(Path(group.file.filename).parent, num_bytes)
                made = group.create_dataset(name, shape, piece.dtype, dcpl=early)
                places[name] = _place(made)
                written[name], digests[name] = 0, Digest()
            at = places[name]
            if (piece.dtype, piece.shape[1:]) != (at.dtype, at.shape[1:]) or (
                written[name] + piece.nbytes > at.num_bytes
            ):
                raise DamagedError(
                    f"{inside}/{name}: a piece of {piece.shape} {piece.dtype} does not fit "
                    f"into {at.shape} {at.dtype}"
                )
            content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            digests[name].update(content)
            while content:
                size = os.pwrite(sink.fileno(), content, at.offset + written[name])
                content = content[size:]
                written[name] += size
    for name, at in places.items():
        if written[name] != at.num_bytes:
            raise ValueError(f"{inside}/{name}: {written[name]} bytes for {at.shape}")
    group.file.flush()
    return [_line(f"{inside}/{name}".strip("/"), at, digests[name]) for name, at in places.items()]


def _line(name: str, at: _Place, digest: Digest) -> str:
    return f"{name} {at.dtype.str} {at.shape} {digest.hexdigest()}"


def _digests(path: Path) -> tuple[list[str], str]:
    """The line of each array of a file, read in pieces, and the digest of the file."""
    layout, whole = _layout(path), Digest()
    digests = {name: Digest() for name in layout}
    for name, piece in read_pieces(path, whole):
        digests[name].update(piece.data)
    lines = [_line(name, at, digests[name]) for name, at in layout.items()]
    return lines, whole.hexdigest()


def _combine(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _need_room(folder: Path, num_bytes: int) -> None:
    """Raise ENOSPC or EDQUOT now: HDF5 that meets a full disk can take the process with it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise


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
    scores: Iterable[ScorePieces],
    models: Mapping[str, Mapping[str, Json]],
    *,
    tables: Iterable[tuple[str, Arrays]] = (),
    recipe: str,
    complete: bool,
    provenance: Mapping[str, str],
) -> Merged:
    """Write a merged file, one piece of an array (or one table) in memory at a time.

    It is read back once, in pieces too.

    Raises:
        DamagedError: if the digest of what is read differs from that of what was written.
    """
    lines = []
    with _create(path) as file:
        file.attrs["recipe"], file.attrs["complete"] = recipe, complete
        for part in scores:
            group = file.create_group(f"scores/{part.sampler}/{part.scorer}")
            lines += _put(group, part.num_rows, part.pieces)
        for name, arrays in tables:
            num_rows = len(next(iter(arrays.values())))
            lines += _put(file.create_group(f"tables/{name}"), num_rows, arrays.items())
        for name, facts in models.items():
            file.create_group(f"models/{name}").attrs.update(facts)
        file.create_group("provenance").attrs.update(provenance)
        expected = _logical_digest(lines, models, recipe, complete)
        file.attrs["logical_digest"] = expected
    with _reading(path, "a merged results file"):
        found, digest = _digests(path)
        with _open(path) as file:
            facts_read = _facts(file)
    if _logical_digest(found, *facts_read) != expected:
        raise DamagedError(f"{path}: reads back differently from what was written")
    return Merged(logical_digest=expected, digest=digest)


def read_results(path: Path) -> Results:
    """Read a merged file: all but its provenance checked in pieces, then arrays mapped into memory.

    Raises:
        DamagedError: naming a file that is not one, or that says something else than was written.
    """
    with _reading(path, "a merged results file"), path.open("rb") as held:
        found = _read_results(path)
        replaced = not os.path.samestat(os.fstat(held.fileno()), path.stat())
    return read_results(path) if replaced else found


def _read_results(path: Path) -> Results:
    with _reading(path, "a merged results file"):
        logical_digest(path)
        with _open(path) as file:
            models, recipe, complete = _facts(file)
            provenance = _attributes(file["provenance"])
        grouped: dict[str, dict[str, dict[str, Json]]] = {}
        for name, array in _map_arrays(path).items():
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
    with _reading(path, "a merged results file"):
        lines, _ = _digests(path)
        with _open(path) as file:
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
    return _combine([*lines, *facts, f"recipe {recipe}", f"complete {complete}"])


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
