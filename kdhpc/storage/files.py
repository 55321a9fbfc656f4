"""Files that are written once: sealed JSON, digests, and names that only one writer can claim."""

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
"""Last field of every JSON file that is written once: the sha256 of the file with an empty seal."""
SEAL_PLACE = slice(-67, -3)
"""Position of the seal's 64 hexadecimal digits in the file, counted from its end."""
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
PIECE_BYTES = 2**20
"""Read size in bytes; a piece of this size stays in a core's cache."""
Digest = xxhash.xxh3_128
"""Digest of data files: it finds damage as reliably as sha256, at memory speed (decision 12)."""


def list_entries(path: Path) -> list[os.DirEntry[str]]:
    """List the entries of a folder by name; a missing folder has none."""
    try:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def size_of(path: Path | os.DirEntry[str]) -> int | None:
    """Return the bytes of a file, or of all files below a folder; None if it does not exist."""
    if path.is_dir():
        return sum(size_of(inner) or 0 for inner in list_entries(Path(path)))
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def digest_of(path: Path) -> str:
    """Compute the digest of a file, or of the names and digests of all files below a folder."""
    digest = Digest()
    if path.is_dir():
        for inner in sorted(inner for inner in path.rglob("*") if inner.is_file()):
            digest.update(f"{inner.relative_to(path)} {digest_of(inner)}\n".encode())
        return digest.hexdigest()
    piece = memoryview(bytearray(PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def write_once(path: Path, value: Mapping[str, object]) -> bool:
    """Create a JSON file that must not exist yet, and its folder; the first writer wins.

    The file is written and synced under another name, then linked, so that nobody ever sees half of
    it. Its last field is a digest of the rest, which `read_once` checks.

    Returns:
        Whether the file now has this content. An existing file is compared, because a file server
        that repeats a request answers EEXIST although the first request succeeded.
    """
    text = json.dumps({**value, SEAL: ""}, indent=1)
    text = f"{text[:-3]}{hashlib.sha256(text.encode()).hexdigest()}{text[-3:]}"
    path.parent.mkdir(exist_ok=True)
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
        DamagedError: if the file cannot be read or any byte differs from what was written.
    """
    try:
        raw = _read(path)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    unsealed = raw[: SEAL_PLACE.start] + raw[SEAL_PLACE.stop :]
    if hashlib.sha256(unsealed).hexdigest().encode() != raw[SEAL_PLACE]:
        raise DamagedError(f"{path}: differs from what was written; restore it from a copy")
    value: dict[str, Json] = json.loads(raw.decode())
    del value[SEAL]
    return value


def _read(path: str | Path) -> bytes:
    """Read a small file in half the time that `open` takes; a run has thousands of them."""
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
    """Flush a file, or a folder and everything below it, and the folder that holds it to disk."""
    for inner in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if inner.is_file():
            with inner.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _sync_folder(inner)
    _sync_folder(path.parent)


def point_alias(alias: Path, target: Path) -> None:
    """Make a fixed name refer to `target`; a process that has the old file open keeps it."""
    temporary = alias.with_name(f".{alias.name}.{secrets.token_hex(4)}")
    try:
        os.link(target, temporary)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}:
            raise
        shutil.copyfile(target, temporary)
    os.replace(temporary, alias)


def stands_for(alias: Path, target: Path) -> bool:
    """Return whether a fixed name is a link to `target`, or a copy on a disk without links."""
    try:
        if os.path.samefile(alias, target):
            return True
        one, other = alias.stat(), target.stat()
        return one.st_nlink == other.st_nlink == 1 and one.st_size == other.st_size
    except FileNotFoundError:
        return False


def point_link(link: Path, target: Path) -> None:
    """Make a symbolic link to a file or folder of the same run, relative, so that the run can move.

    It is a convenience: where it cannot be made, there is none.
    """
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        link.parent.mkdir(exist_ok=True)
        temporary.symlink_to(os.path.relpath(target, link.parent))
        try:
            temporary.replace(link)
        except OSError:  # somebody's folder has this name
            temporary.unlink()


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn the errors of a full, unwritable or moved folder into a `DamagedError` of one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not where.exists():
            raise DamagedError(
                f"{where}: was moved or deleted while it was in use; go on in its new place"
            ) from error
        if error.errno in DISK_FULL_ERRNOS:
            raise DamagedError(
                f"{where}: the disk is full; free some space and run again"
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise DamagedError(f"{where}: cannot be written ({error.strerror})") from error
        raise
