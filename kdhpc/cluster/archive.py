"""Archive a run in one file, and restore it: all that analysis reads, without models and corpora.

The file is NAME.kdhpc.tar.gz and holds a folder NAME: results, records, the ledger, logs of
trainings, small logs, the code of the last request, and of the data of shards what
`Stage.archived` names. Its first file is archive.json, which says what was left out and has the
digest of every other file. A restored run can be read and verified; it makes no more shards,
because the data that they would read is not there.
"""

import atexit
import contextlib
import gzip
import os
import secrets
import shutil
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from kdhpc import __version__
from kdhpc.cluster import ledger as ledgers
from kdhpc.cluster import places, runs
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.errors import BusyError, DamagedError, InputError
from kdhpc.storage.files import (
    PIECE_BYTES,
    Digest,
    digest_of,
    disk_errors,
    point_alias,
    read_once,
    stands_for,
    sync_tree,
    write_once,
)
from kdhpc.storage.run_folder import ARCHIVE, Record, Scan, verify
from kdhpc.types import Json

SUFFIX = ".kdhpc.tar.gz"
FORMAT = 1
"""Format number of archives; a change that older versions cannot read raises it."""
MAX_LOG_BYTES = 64_000
"""Logs of tasks that are larger than this are left out."""
MAX_NAME_BYTES = 200
"""Longest name of a restored run; file systems have 255 for names, and some are made longer."""
LEDGER = ("requests", "submissions", "attempts", "failures")
"""Folders of a run that are kept whole."""


@dataclass(frozen=True, kw_only=True)
class Archived:
    """What was written."""

    num_files: int
    num_bytes: int
    """Size of the archive."""
    num_left_out: int
    """Shards whose data, or a part of it, was left out."""


def archive(run: Run, state: State, file: Path) -> Archived:
    """Write the archive of a run at rest, under another name until it is whole.

    Args:
        run: the run.
        state: what was observed of it.
        file: the file to write, which must not exist.

    Raises:
        InputError: if the file exists, has another ending or cannot be in its folder, or the run
            was itself restored.
        BusyError: if a file changes meanwhile.
        DamagedError: if a planned shard is damaged, or the disk cannot be written.
    """
    check_new(file)
    runs.check_not_restored(run, "there is nothing to archive that its file lacks; copy that file")
    for problem in state.situation.damaged.values():
        raise DamagedError(f"{problem}; rerun.py RUN --put-aside makes it again")
    scan = run.scan()
    aliases = _aliases(run, scan)
    kept, left_out = _data(run, state, scan, frozenset(aliases.values()))
    paths = {*_facts(run, state, scan), *kept}
    manifest: dict[str, Json] = {
        "format": FORMAT,
        "version": __version__,
        "name": run.path.name,
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "left_out": sorted(left_out),
        "aliases": aliases,
        "files": {str(path.relative_to(run.path)): digest_of(path) for path in sorted(paths)},
    }
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    with disk_errors(file.parent), tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / ARCHIVE
        write_once(first, manifest)
        try:
            with tarfile.open(part, "x:gz", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, f"{run.path.name}/{ARCHIVE}", first, digest_of(first))
                for name, digest in manifest["files"].items():
                    _add(tar, f"{run.path.name}/{name}", run.path / name, digest)
            sync_tree(part)
            check_new(file)
            part.rename(file)
        finally:
            part.unlink(missing_ok=True)
    return Archived(num_files=len(paths), num_bytes=file.stat().st_size, num_left_out=len(left_out))


def check_new(file: Path) -> None:
    """Check that a file can be a new archive.

    Raises:
        InputError: if it cannot.
    """
    if not file.name.endswith(SUFFIX):
        raise InputError(f"{file}: expected a name that ends with {SUFFIX}")
    if file.exists():
        raise InputError(f"{file}: exists already; expected the name of a new file")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such folder; expected one to write the archive to")


def _facts(run: Run, state: State, scan: Scan) -> Iterator[Path]:
    """Yield the files that say what was asked for, done and made, other than data."""
    yield run.path / "run.json"
    for name in (*LEDGER, f"code/{state.request.code}"):
        yield from _files_in(run.path / name)
    for path in _files_in(run.path / "logs"):
        if path.stat().st_size <= MAX_LOG_BYTES:
            yield path
    for key in scan.records:
        yield run.record_path(key)
        yield from run.scratch_path(key).glob("*.jsonl")  # the log of a training


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _data(run: Run, state: State, scan: Scan, named: frozenset[str]) -> tuple[list[Path], set[str]]:
    """Return the files of data that are kept, and the keys of the shards that do not keep all.

    Args:
        run: the run.
        state: what was observed of it.
        scan: all its records.
        named: data that a fixed name stands for, relative to the run folder.

    Raises:
        DamagedError: if data that is kept differs from its record.
    """
    kept: list[Path] = []
    left_out: set[str] = set()
    for key, record in scan.records.items():
        shard = state.plan.shards.get(key)
        pattern = run.pipeline.archived(state.config, shard) if shard else ""
        if str(record.data.relative_to(run.path)) in named:
            pattern = "*"
        if pattern != "*":
            left_out.add(key)
        if pattern:
            verify(record)
            kept += _matching(record, pattern)
    return kept, left_out


def _matching(record: Record, pattern: str) -> list[Path]:
    if record.data.is_dir():
        return [path for path in sorted(record.data.rglob(pattern)) if path.is_file()]
    return [record.data] if PurePosixPath(record.data_name).match(pattern) else []


def _aliases(run: Run, scan: Scan) -> dict[str, str]:
    """Return the data that each fixed name stands for, both relative to the run folder."""
    aliases = {}
    for stage in run.aliases:
        alias = run.alias_path(stage)
        for key, record in scan.records.items():
            if alias and key.startswith(f"{stage}/") and stands_for(alias, record.data):
                data = record.data.relative_to(run.path)
                aliases[str(alias.relative_to(run.path))] = str(data)
    return aliases


class _Read:
    """A file that is read once, and the digest of what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = Digest()

    def read(self, size: int = -1) -> bytes:
        piece = self._file.read(size)
        self.digest.update(piece)
        return piece


def _add(tar: tarfile.TarFile, name: str, path: Path, digest: str) -> None:
    """Add a file as a regular one, whatever its links, owner and mode are.

    Raises:
        BusyError: if its digest is another one.
    """
    member, status = tarfile.TarInfo(name), path.stat()
    member.size, member.mtime = status.st_size, int(status.st_mtime)
    with path.open("rb") as file:
        content = _Read(file)
        tar.addfile(member, content)
    if content.digest.hexdigest() != digest:
        raise BusyError(f"{path}: changed while it was archived; try again when nothing runs")


def restore(file: Path, runs_dir: str = places.DEFAULT_DIR, name: str | None = None) -> Path:
    """Make a run folder of an archive; nothing is left of it if that fails.

    Args:
        file: the archive.
        runs_dir: folder to restore into.
        name: name of the restored run; None for the name that it had.

    Returns:
        The run folder.

    Raises:
        InputError: if the file is no whole archive, or there is a file or folder of that name.
        DamagedError: if the disk cannot be written.
    """
    if name is not None and (
        name != Path(name).name or name.startswith(".") or len(os.fsencode(name)) > MAX_NAME_BYTES
    ):
        raise InputError(f"--name {name}: expected the name of a folder, such as demo-2")
    with _opened(file) as tar:
        target = Path(runs_dir).expanduser().resolve() / (name or _first(file, tar)[0])
    with disk_errors(target.parent):
        for part in target.parents:
            if part.exists() and not part.is_dir():
                raise InputError(f"{part}: is a file; expected a folder (--runs-dir {runs_dir})")
        if target.exists():
            raise InputError(f"{target}: exists already; expected another --name or --runs-dir")
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder deeper, so that a run that is not whole yet is not found by name.
        beside = Path(tempfile.mkdtemp(prefix=".restore-", dir=target.parent))
        try:
            made = unpack(file, beside)
            runs.open_run(made)
            made.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    places.note(target)
    return target


def unpack_until_exit(file: Path) -> Path:
    """Unpack an archive into a temporary folder that is deleted when the process ends.

    Returns:
        The run folder.

    Raises:
        InputError: if the file is no whole archive.
        DamagedError: if the temporary folder cannot be written.
    """
    folder = Path(tempfile.mkdtemp(prefix="kdhpc-archive-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with disk_errors(folder):
        return unpack(file, folder)


def unpack(file: Path, folder: Path) -> Path:
    """Unpack an archive into a folder, and compare every file with its digest.

    Args:
        file: the archive.
        folder: an existing folder.

    Returns:
        The run folder, a new folder in the other one.

    Raises:
        InputError: if the file is no whole archive.
    """
    with _opened(file) as tar:
        name, first = _first(file, tar)
        run_dir = folder / name
        run_dir.mkdir(mode=0o700)
        (run_dir / ARCHIVE).write_bytes(first)
        manifest = _manifest(file, run_dir)
        digests: dict[str, str] = {}
        while (member := tar.next()) is not None:
            inner = _inner(file, member, name)
            if member.isdir():
                continue
            if inner in digests or inner not in manifest["files"]:
                raise InputError(f"{file}: {member.name} should not be in it; fetch it again")
            digests[inner] = _extract(tar, member, run_dir / inner)
        rest = cast(IO[bytes], tar.fileobj)
        while rest.read(PIECE_BYTES):  # to the end, where gzip's own check is
            pass
    if digests != manifest["files"]:
        different = sorted(dict(digests.items() ^ manifest["files"].items()))
        raise InputError(f"{file}: {different[0]} is missing or damaged in it; fetch it again")
    ledgers.make(run_dir)
    for alias, data in manifest["aliases"].items():
        path = PurePosixPath(alias)
        if path.is_absolute() or ".." in path.parts or alias in digests or data not in digests:
            raise InputError(f"{file}: cannot have {alias} for {data}; fetch it again")
        point_alias(run_dir / path, run_dir / data)
    return run_dir


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive; what shows that it is none, or not whole, becomes an `InputError`."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; expected an archive of runs.py archive")
    try:
        with file.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:gz") as tar:
            yield tar
    except PermissionError as error:
        if error.filename == str(file):
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error
        raise
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{file}: not a whole archive ({' '.join(str(error).split())}); expected a file of "
            "runs.py archive; fetch it again"
        ) from error


def _first(file: Path, tar: tarfile.TarFile) -> tuple[str, bytes]:
    """Return the name of the run and its archive.json, which is the first file in the archive."""
    member = tar.next()
    parts = PurePosixPath(member.name).parts if member else ()
    if member is None or len(parts) != 2 or parts[1] != ARCHIVE or not member.isreg():
        raise InputError(f"{file}: not an archive of a run; expected a file of runs.py archive")
    _inner(file, member, parts[0])
    return parts[0], _content(tar, member).read()


def _inner(file: Path, member: tarfile.TarInfo, name: str) -> str:
    """Return the path of a member relative to the run, after checking that it is inside of it."""
    path = PurePosixPath(member.name)
    inside = path.parts[:1] == (name,) and ".." not in path.parts and name not in {"/", "."}
    if not inside or not (member.isreg() or member.isdir()):
        raise InputError(
            f"{file}: {member.name!r} in it is no file inside of the run; it was not made by "
            "runs.py archive, so nothing was unpacked"
        )
    return str(path.relative_to(name))


def _manifest(file: Path, run_dir: Path) -> dict[str, Json]:
    """Read archive.json and check that this version can read the archive."""
    try:
        manifest = read_once(run_dir / ARCHIVE)
    except (DamagedError, ValueError) as error:
        raise InputError(f"{file}: its {ARCHIVE} is damaged; fetch it again") from error
    number = manifest.get("format")
    if number != FORMAT:
        raise InputError(
            f"{file}: has format {number}, from version {manifest.get('version')} of kdhpc; "
            f"expected format {FORMAT}; use that version"
        )
    return manifest


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    content = tar.extractfile(member)
    return cast(IO[bytes], content)  # a regular file has content


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> str:
    """Write a member to a path, and return the digest of what was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, content = Digest(), _content(tar, member)
    with path.open("xb") as target:
        while piece := content.read(PIECE_BYTES):
            target.write(piece)
            digest.update(piece)
    return digest.hexdigest()
