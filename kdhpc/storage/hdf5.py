"""Write and read named arrays in HDF5 files, piece by piece.

Every array is contiguous, so that any of them can be mapped into memory:
`np.memmap(path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)`. HDF5 has checksums
for chunked arrays only, so a file carries a digest of its arrays.
"""

import contextlib
import hashlib
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

from kdhpc.errors import DamagedError
from kdhpc.storage.files import DISK_FULL_ERRNOS, PIECE_BYTES, Digest

HDF5_ROOM_BYTES = 2**16
"""Free bytes required on the disk for what HDF5 writes beside an array."""
HDF5_ALIGNMENT_BYTES = 64
"""Alignment of every array in a file, so that mapped arrays are aligned for any dtype."""
HDF5_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, AttributeError)
"""Errors that h5py raises for a file whose bytes differ from what was written."""
Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name; row i of one belongs to row i of the others."""
Piece = tuple[str, NDArray[Any]]
"""Name of an array and some of its rows [n, ...]; the next piece may reuse their memory."""


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a shard of named arrays and read it back.

    Raises:
        DamagedError: if it reads back differently.
    """
    with create_file(path) as file:
        lines = write_pieces(file, len(next(iter(arrays.values()))), arrays.items())
        file.attrs["digest"] = combine_digests(lines)
    _verify_shard(path, combine_digests(lines))


def read_arrays(path: Path) -> Arrays:
    """Check a shard of named arrays, then map it into memory.

    Raises:
        DamagedError: if the file is no such shard, or its arrays differ from what was written.
    """
    with damaged_if_unreadable(path, "a shard of arrays"):
        with open_file(path) as file:
            expected = str(file.attrs["digest"])
        _verify_shard(path, expected)
        return map_arrays(path)


def _verify_shard(path: Path, expected: str) -> None:
    lines, _ = digest_arrays(path)
    if combine_digests(lines) != expected:
        raise DamagedError(f"{path}: its arrays differ from what was written")


def join_arrays(parts: Sequence[Arrays]) -> Arrays:
    """Concatenate shards of the same named arrays."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_pieces(path: Path, whole: Digest) -> Iterator[Piece]:
    """Yield the arrays of a file, some rows at a time, reading every byte of the file once.

    Args:
        path: an HDF5 file that this module wrote.
        whole: is fed every byte of the file, in order. Until the iterator ends and this digest has
            been compared, what was yielded may be damaged.

    Raises:
        DamagedError: if the file is no HDF5 file of contiguous arrays.
    """
    with damaged_if_unreadable(path, "an HDF5 file of arrays"):
        layout = _layout(path)
        largest = max((span.row_bytes for span in layout.values() if span.num_bytes), default=0)
        buffer = memoryview(bytearray(max(PIECE_BYTES, largest)))
        with path.open("rb", buffering=0) as file:

            def read(num_bytes: int) -> memoryview:
                num_read = 0
                while num_read < num_bytes:
                    size = file.readinto(buffer[num_read:num_bytes])
                    if not size:
                        raise EOFError(f"the file ends {num_bytes - num_read} bytes early")
                    num_read += size
                whole.update(buffer[:num_bytes])
                return buffer[:num_bytes]

            for name, span in layout.items():
                while (gap := span.offset - file.tell()) > 0:
                    read(min(len(buffer), gap))
                if span.num_bytes and gap:
                    raise ValueError(f"{name} overlaps another array")
                step = max(1, PIECE_BYTES // max(1, span.row_bytes))
                for start in range(0, max(1, span.shape[0]), step):
                    shape = (min(step, span.shape[0] - start), *span.shape[1:])
                    yield name, np.ndarray(shape, span.dtype, read(shape[0] * span.row_bytes))
            while size := file.readinto(buffer):
                whole.update(buffer[:size])


@dataclass(frozen=True, kw_only=True)
class _Span:
    """The bytes of an array in its file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def num_bytes(self) -> int:
        return self.shape[0] * self.row_bytes


def _span_of(dataset: Any) -> _Span:
    """Find the bytes of a dataset. Call it once for each: these properties are slow in h5py."""
    shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
    if (not shape and dataset.size) or dtype.hasobject:
        raise ValueError(f"{dataset.name} is not an array")
    span = _Span(offset=offset or 0, dtype=dtype, shape=shape)
    if span.num_bytes and offset is None:
        raise ValueError(f"{dataset.name} is not contiguous")
    return span


def _layout(path: Path) -> dict[str, _Span]:
    """Find every array of a file by its full name, in the order of their bytes."""
    import h5py

    spans: dict[str, _Span] = {}
    file_bytes = path.stat().st_size

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            spans[name] = span = _span_of(item)
            if span.num_bytes and span.offset + span.num_bytes > file_bytes:
                raise ValueError(f"{name} reaches beyond the end of the file")

    with open_file(path) as file:
        file.visititems(visit)
    return dict(sorted(spans.items(), key=lambda entry: entry[1].offset))


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Map a file into memory and return each of its arrays by its full name."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    return {
        name: np.ndarray(span.shape, span.dtype, mapped, span.offset)
        for name, span in _layout(path).items()
    }


def map_array(path: Path, name: str) -> NDArray[Any]:
    """Map one array of an HDF5 file into memory, without checking its digest.

    Raises:
        DamagedError: if the file is no HDF5 file of contiguous arrays, or has no such array.
    """
    with damaged_if_unreadable(path, "an HDF5 file of arrays"):
        return map_arrays(path)[name]


def create_file(path: Path) -> Any:
    """Create an HDF5 file, replacing an old one; its arrays are aligned."""
    import h5py

    alignment = {"alignment_threshold": 1, "alignment_interval": HDF5_ALIGNMENT_BYTES}
    return h5py.File(path, "w", locking=False, **alignment)


def open_file(path: Path) -> Any:
    """Open an HDF5 file for reading, without a lock."""
    import h5py

    return h5py.File(path, "r", locking=False)


@contextlib.contextmanager
def damaged_if_unreadable(path: Path, what: str) -> Iterator[None]:
    """Turn what h5py raises for damaged bytes into a `DamagedError` that names the file.

    Args:
        path: the file that is being read.
        what: what it was expected to be, such as `a score shard`.
    """
    try:
        yield
    except HDF5_ERRORS as error:
        raise DamagedError(f"{path}: not {what} ({error})") from error


def write_pieces(group: Any, num_rows: int, pieces: Iterable[Piece]) -> list[str]:
    """Write arrays, each from its pieces in order, into a group of an open HDF5 file.

    HDF5 allocates the arrays, and the bytes are written past it, which is twice as fast.

    Args:
        group: an h5py group, or the file itself.
        num_rows: rows of every array.
        pieces: rows of the arrays; pieces of different arrays may alternate.

    Returns:
        One line for each array: name, dtype, shape and digest.

    Raises:
        DamagedError: if a piece does not fit its array.
        OSError: ENOSPC or EDQUOT, if the disk has no room for an array.
        ValueError: if the pieces of an array have fewer rows than `num_rows`.
    """
    import h5py

    allocated_early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    allocated_early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    allocated_early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    group_name = group.name.strip("/")
    spans: dict[str, _Span] = {}
    written: dict[str, int] = {}
    digests = {}
    with open(group.file.filename, "r+b", buffering=0) as sink:
        for name, piece in pieces:
            if name not in spans:
                shape = (num_rows, *piece.shape[1:])
                num_bytes = num_rows * piece[:1].nbytes + HDF5_ROOM_BYTES
                _need_room(Path(group.file.filename).parent, num_bytes)
                dataset = group.create_dataset(name, shape, piece.dtype, dcpl=allocated_early)
                spans[name] = _span_of(dataset)
                written[name], digests[name] = 0, Digest()
            span = spans[name]
            if (piece.dtype, piece.shape[1:]) != (span.dtype, span.shape[1:]) or (
                written[name] + piece.nbytes > span.num_bytes
            ):
                raise DamagedError(
                    f"{group_name}/{name}: a piece of {piece.shape} {piece.dtype} does not fit "
                    f"into {span.shape} {span.dtype}"
                )
            content = np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
            digests[name].update(content)
            while content:
                size = os.pwrite(sink.fileno(), content, span.offset + written[name])
                content = content[size:]
                written[name] += size
    for name, span in spans.items():
        if written[name] != span.num_bytes:
            raise ValueError(
                f"{group_name}/{name}: the pieces have {written[name]} bytes; expected "
                f"{span.num_bytes} for {span.shape}"
            )
    group.file.flush()
    return [
        _digest_line(f"{group_name}/{name}".strip("/"), span, digests[name])
        for name, span in spans.items()
    ]


def _digest_line(name: str, span: _Span, digest: Digest) -> str:
    return f"{name} {span.dtype.str} {span.shape} {digest.hexdigest()}"


def digest_arrays(path: Path) -> tuple[list[str], str]:
    """Read a file in pieces; return the line of each array, as `write_pieces` does, and its digest.

    The digest is that of the file's bytes, as `files.digest_of` computes it.
    """
    layout, whole = _layout(path), Digest()
    digests = {name: Digest() for name in layout}
    for name, piece in read_pieces(path, whole):
        digests[name].update(piece.data)
    lines = [_digest_line(name, span, digests[name]) for name, span in layout.items()]
    return lines, whole.hexdigest()


def combine_digests(lines: Iterable[str]) -> str:
    """Compute one digest of many lines, whatever their order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _need_room(folder: Path, num_bytes: int) -> None:
    """Raise ENOSPC or EDQUOT early, because HDF5 can crash the process on a full disk."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise
