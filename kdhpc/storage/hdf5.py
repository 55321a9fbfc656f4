"""Named arrays in HDF5 files, written and read in pieces.

Every array is contiguous, so that any of them can be mapped into memory:
`np.memmap(path, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)`. HDF5 has checksums
for chunks only, so a file carries a digest over its arrays.
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
"""For what HDF5 writes beside the arrays."""
HDF5_ALIGNMENT_BYTES = 64
"""Of every array in a file, so that mapped ones are aligned for any dtype."""
HDF5_ERRORS = (OSError, EOFError, KeyError, ValueError, TypeError, RuntimeError, AttributeError)
"""What h5py raises for a file whose bytes are not as written."""
Arrays = Mapping[str, NDArray[Any]]
"""Arrays by name; the rows of all of them belong together."""
Piece = tuple[str, NDArray[Any]]
"""Some rows [n, ...] of an array, by its name; its memory may be used again for the next piece."""


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a shard of named arrays and read it back.

    Raises:
        DamagedError: if what is read differs.
    """
    with create(path) as file:
        lines = put(file, len(next(iter(arrays.values()))), arrays.items())
        file.attrs["digest"] = combine(lines)
    _verify_shard(path, combine(lines))


def read_arrays(path: Path) -> Arrays:
    """Read a shard of named arrays: checked, then mapped into memory.

    Raises:
        DamagedError: naming a file that is not one, or whose arrays are not as written.
    """
    with reading(path, "a shard of arrays"):
        with open_file(path) as file:
            expected = str(file.attrs["digest"])
        _verify_shard(path, expected)
        return map_arrays(path)


def _verify_shard(path: Path, expected: str) -> None:
    lines, _ = digests(path)
    if combine(lines) != expected:
        raise DamagedError(f"{path}: its arrays are not what was written")


def join_arrays(parts: Sequence[Arrays]) -> Arrays:
    """Shards of the same named arrays, one after the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_pieces(path: Path, whole: Digest) -> Iterator[Piece]:
    """The arrays of an HDF5 file of ours, some rows at a time, in one read of the whole file.

    Args:
        path: of the file.
        whole: is fed every byte of it, in order; before the end, what was yielded may be wrong.

    Raises:
        DamagedError: naming a file that is not one.
    """
    with reading(path, "an HDF5 file of arrays"):
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

    with open_file(path) as file:
        file.visititems(visit)
    return dict(sorted(found.items(), key=lambda entry: entry[1].offset))


def map_arrays(path: Path) -> dict[str, NDArray[Any]]:
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
    with reading(path, "an HDF5 file of arrays"):
        return map_arrays(path)[name]


def create(path: Path) -> Any:
    import h5py

    alignment = {"alignment_threshold": 1, "alignment_interval": HDF5_ALIGNMENT_BYTES}
    return h5py.File(path, "w", locking=False, **alignment)


def open_file(path: Path) -> Any:
    import h5py

    return h5py.File(path, "r", locking=False)


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Name the file in whatever is raised for bytes that are not as written."""
    try:
        yield
    except HDF5_ERRORS as error:
        raise DamagedError(f"{path}: not {what} ({error})") from error


def put(group: Any, num_rows: int, pieces: Iterable[Piece]) -> list[str]:
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


def digests(path: Path) -> tuple[list[str], str]:
    """The line of each array of a file, read in pieces, and the digest of the file."""
    layout, whole = _layout(path), Digest()
    digests = {name: Digest() for name in layout}
    for name, piece in read_pieces(path, whole):
        digests[name].update(piece.data)
    lines = [_line(name, at, digests[name]) for name, at in layout.items()]
    return lines, whole.hexdigest()


def combine(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _need_room(folder: Path, num_bytes: int) -> None:
    """Raise ENOSPC or EDQUOT now: HDF5 that meets a full disk can take the process with it."""
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        except OSError as error:
            if error.errno in DISK_FULL_ERRNOS:
                raise
