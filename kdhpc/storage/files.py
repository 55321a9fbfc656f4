"""Files that are written once: sealed JSON, digests, names that only one writer can win."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from kdhpc.errors import DamagedError
from kdhpc.types import Json

SEAL = "seal"
"""Last field of every JSON file that is written once: the sha256 of the file without it."""
SEAL_PLACE = slice(-67, -3)
"""Of its 64 hexadecimal digits."""
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
PIECE_BYTES = 2**20
"""Of a file that is read once from end to end; so much stays in a core's cache."""
Digest = xxhash.xxh3_128
"""Of data files: it finds damage as surely as sha256, at the speed of memory (decision 12)."""


def entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def size_of(path: Path | os.DirEntry[str]) -> int | None:
    """Bytes of a file, or of all files below a folder; None if it is not there."""
    if path.is_dir():
        return sum(size_of(inner) or 0 for inner in entries(Path(path)))
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def digest_of(path: Path) -> str:
    """Digest of a file, or of the names and digests of all files below a folder."""
    found = Digest()
    if path.is_dir():
        for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            found.update(f"{inner.relative_to(path)} {digest_of(inner)}\n".encode())
        return found.hexdigest()
    piece = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            found.update(piece[:size])
    return found.hexdigest()


def write_once(path: Path, value: Mapping[str, object]) -> bool:
    """Create a JSON file that must not exist; whoever is first wins.

    Written and synced under another name, then linked: nobody ever sees half of it. The test of
    EEXIST against the content serves file servers that answer a repeated request with a failure.
    Its last field is a digest of the rest, for `read_once`.

    Returns:
        Whether the file is now this one.
    """
    text = json.dumps({**value, SEAL: ""}, indent=1)
    text = f"{text[:-3]}{hashlib.sha256(text.encode()).hexdigest()}{text[-3:]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _write_synced(temporary, text, "x")
        try:
            os.link(temporary, path)
        except FileExistsError:
            return path.read_text() == text
        except OSError as error:
            if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
                raise
            try:
                _write_synced(path, text, "x")
            except FileExistsError:
                return path.read_text() == text
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def read_once(path: str | Path) -> dict[str, Json]:
    """Read what `write_once` wrote, without its seal.

    Raises:
        DamagedError: if a byte of it is not as written.
    """
    try:
        raw = _read(path)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    unsealed = raw[: SEAL_PLACE.start] + raw[SEAL_PLACE.stop :]
    if hashlib.sha256(unsealed).hexdigest().encode() != raw[SEAL_PLACE]:
        raise DamagedError(f"{path}: differs from what was written; restore it from a copy")
    found: dict[str, Json] = json.loads(raw.decode())
    del found[SEAL]
    return found


def _read(path: str | Path) -> bytes:
    """A small file's bytes, in half of the time that `open` takes: a run has thousands."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        parts = []
        while part := os.read(descriptor, 2**16):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, text: str, mode: str) -> None:
    with path.open(mode) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    for inner in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if inner.is_file():
            with inner.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(inner)
    _sync_folder(path.parent)


def point_alias(alias: Path, target: Path) -> None:
    """Let a fixed name stand for `target`, replaced whole: who has the old file open keeps it."""
    temporary = alias.with_name(f".{alias.name}.{secrets.token_hex(4)}")
    try:
        os.link(target, temporary)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
            raise
        shutil.copyfile(target, temporary)
    os.replace(temporary, alias)


def stands_for(alias: Path, target: Path) -> bool:
    """Whether a fixed name is another name of `target`, or a copy where there are no links."""
    try:
        if os.path.samefile(alias, target):
            return True
        return target.stat().st_nlink == 1 and alias.stat().st_size == target.stat().st_size
    except FileNotFoundError:
        return False


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise DamagedError(
                f"{where}: the disk is full; free some space and run again"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise DamagedError(f"{where}: cannot be written ({error.strerror})") from error
        raise
