"""The run folder: the only maker of paths, and the only place that publishes.

    runs/demo/
      run.json                      who made the run, when, for which pipeline
      requests/0001.json            what was asked: config, code, resources (see `kdhpc.cluster`)
      submissions/0001.json ...     what was submitted
      code/3f9a.../                 kdhpc and configs as they were when submitted
      logs/0001/0_3.log             one log a task; failures/0001/... one file a failed shard
      2-sample-truth/train/00017.json            the record: immutable, first writer wins
      2-sample-truth/train/00017.9c41d2aa.arrow  its data, written whole before the record
      8-merge/results.h5            the newest merge

A shard is done when its record exists and its data has the recorded size. Readers list records,
never data files.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import secrets
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import xxhash

from kdhpc.config import RunConfig
from kdhpc.errors import DamagedError, InputError
from kdhpc.shards import Plan, Shard
from kdhpc.types import Json

RESULTS = "results.h5"
"""Fixed name of the newest merge in its stage's folder."""
SEAL = "seal"
"""Last field of every JSON file that is written once: the sha256 of the file without it."""
SEAL_PLACE = slice(-67, -3)
"""Of its 64 hexadecimal digits."""
DISK_FULL_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
PIECE_BYTES = 2**20
"""Of a file that is read once from end to end; so much stays in a core's cache."""

Digest = xxhash.xxh3_128
"""Of data files: it finds damage as surely as sha256, at the speed of memory (decision 12)."""
T = TypeVar("T")
C = TypeVar("C", bound=RunConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """What a stage's `run` leaves behind: a file or folder, made by `Work.new_path`."""

    path: Path
    rows: int
    stats: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    """Numbers worth keeping in the record, such as a final loss."""
    digest: str = ""
    """What `digest_of` finds for the path, from a stage that has just read it back."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A published shard."""

    key: str
    folder: Path
    data_name: str
    num_bytes: int
    digest: str
    rows: int
    recipe: str
    fields: Mapping[str, Json]
    inputs: Mapping[str, str]
    row_range: tuple[int, int] | None
    code: str
    attempt: Mapping[str, Json]
    stats: Mapping[str, Json]
    nonce: str

    @property
    def data(self) -> Path:
        return self.folder / self.data_name

    @property
    def seconds(self) -> float:
        return float(self.attempt["seconds"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """All records of a run, read once."""

    records: Mapping[str, Record]
    damaged: Mapping[str, str]
    """By shard key, what is wrong with its record or data."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(
        self, path: Path, folders: Mapping[str, str], aliases: Mapping[str, str] | None = None
    ) -> None:
        """Name the folders that it serves; nothing is read or made.

        Args:
            path: of the run.
            folders: by stage name, the folder inside the run.
            aliases: by stage name, the fixed file name of its newest output, where there is one.
        """
        self.path = path
        self.folders = folders
        self.aliases = aliases or {}

    @functools.cached_property
    def identity(self) -> str:
        """Four hexadecimal digits that tell runs of one name apart."""
        return str(read_once(self.path / "run.json")["identity"])

    def stage_dir(self, stage: str) -> Path:
        return self.path / self.folders[stage]

    def record_path(self, key: str) -> Path:
        stage, arm, name = key.split("/")
        return self.stage_dir(stage) / arm / f"{name}.json"

    def scratch_path(self, key: str) -> Path:
        """Where a shard keeps what its next attempt can use, such as checkpoints."""
        stage, arm, name = key.split("/")
        return self.stage_dir(stage) / arm / f"{name}.checkpoints"

    def checkpoint_since(self, key: str, time_s: float) -> bool:
        """Whether a shard has a checkpoint that is newer than that."""
        found = self.scratch_path(key).glob("*/*.json")
        return any(path.stat().st_mtime > time_s for path in found)

    def alias_path(self, stage: str) -> Path | None:
        """The fixed name of a stage's newest output, if it has one."""
        return self.stage_dir(stage) / self.aliases[stage] if stage in self.aliases else None

    def scan(self) -> Scan:
        """Every record and whether its data is there, in one walk over the run's folder."""
        records: dict[str, Record] = {}
        damaged: dict[str, str] = {}
        for stage in self.folders:
            for arm in _entries(self.stage_dir(stage)):
                if not arm.is_dir():
                    continue
                for key, record in _records_in(arm, f"{stage}/{arm.name}"):
                    if isinstance(record, DamagedError):
                        damaged[key] = str(record)
                    else:
                        records[key] = record
        return Scan(records=records, damaged=damaged)

    def quarantine(self, key: str) -> None:
        """Move a damaged record aside, so that the shard can be made again; nothing is deleted."""
        path = self.record_path(key)
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))


def read_record(path: Path, key: str) -> Record:
    """Read one record.

    Raises:
        DamagedError: if it is not whole or speaks of another shard.
    """
    return _record(read_once(path), key, path.parent)


def _records_in(arm: os.DirEntry[str], prefix: str) -> Iterator[tuple[str, Record | DamagedError]]:
    """Keys of the shards of one arm that have a record, and the record or what is wrong with it."""
    folder = Path(arm.path)
    present = {entry.name: entry for entry in _entries(folder)}
    for name, entry in present.items():
        if not name.endswith(".json") or name.startswith("."):
            continue
        key = f"{prefix}/{name.removesuffix('.json')}"
        try:
            record = _record(read_once(entry.path), key, folder)
            # Data that is not listed was written, and recorded, while the folder was being listed.
            size = _size(present.get(record.data_name) or record.data)
            if size != record.num_bytes:
                what = "is missing" if size is None else f"has {size} bytes"
                raise DamagedError(f"{record.data}: {what}, its record says {record.num_bytes}")
            yield key, record
        except DamagedError as error:
            yield key, error


def _record(raw: Mapping[str, Json], key: str, folder: Path) -> Record:
    # The seal says that the values are those that were written.
    try:
        data = raw["data"]
        if raw["key"] != key or "/" in data or data in {"", ".", ".."}:
            raise DamagedError(f"{folder}: a record of {raw['key']} with data {data!r}")
        return Record(
            key=key,
            folder=folder,
            data_name=data,
            num_bytes=raw["bytes"],
            digest=raw["digest"],
            rows=raw["rows"],
            recipe=raw["recipe"],
            fields=raw["fields"],
            inputs=raw["inputs"],
            row_range=tuple(raw["row_range"]) if raw["row_range"] else None,
            code=raw["code"],
            attempt=raw["attempt"],
            stats=raw["stats"],
            nonce=raw["nonce"],
        )
    except (TypeError, KeyError) as error:
        raise DamagedError(f"{folder}: a record of {key} without {error}") from error


def _entries(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as found:
            return sorted(found, key=lambda entry: entry.name)
    except FileNotFoundError:
        return []


def _size(path: Path | os.DirEntry[str]) -> int | None:
    """Bytes of a file, or of all files below a folder; None if it is not there."""
    if path.is_dir():
        return sum(_size(inner) or 0 for inner in _entries(Path(path)))
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


def verify(record: Record) -> None:
    """Read the data of a record again, every byte.

    Raises:
        DamagedError: naming the file, if it is missing or its digest differs.
    """
    try:
        found = digest_of(record.data)
    except OSError as error:
        raise DamagedError(f"{record.data}: cannot be read ({error.strerror})") from error
    if found != record.digest:
        raise DamagedError(
            f"{record.data}: its bytes differ from what was published "
            f"(digest {found[:12]}, expected {record.digest[:12]})"
        )


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


class Work(Generic[C]):
    """What a stage sees while it runs one shard: its config, its inputs, where to write.

    Raises `DamagedError` when an input is not what its record says.
    """

    def __init__(
        self,
        run: RunFolder,
        config: C,
        plan: Plan,
        *,
        code: str = "",
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[float], None] = lambda fraction: None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.run = run
        self.config = config
        self.plan = plan
        self.should_stop = should_stop
        self.progress = progress
        self.rank = rank
        self.world_size = world_size
        self._code = code
        self._ready_at = 0.0
        self._records: dict[str, Record] = {}
        self._verified: set[str] = set()
        self._unpublished: list[Path] = []

    def record(self, key: str) -> Record:
        """The record of an input shard.

        Raises:
            DamagedError: if it is not there or its data differs from it.
        """
        record = self._unverified(key)
        if key not in self._verified and self.rank == 0:  # the others wait for rank 0
            self._verify(record)
            self._keep(record)
        return record

    def _unverified(self, key: str) -> Record:
        record = self._records.get(key) or read_record(self.run.record_path(key), key)
        if key in self.plan.shards and self.plan.shards[key].recipe != record.recipe:
            raise DamagedError(f"{record.data}: made with other settings than this run's")
        return record

    def _keep(self, record: Record) -> None:
        self._verified.add(record.key)
        self._records[record.key] = record

    def _verify(self, record: Record) -> None:
        """Check every byte; what differs is put aside, so that it is made again."""
        try:
            verify(record)
        except DamagedError as error:
            if not isinstance(error.__cause__, OSError):
                self.run.quarantine(record.key)
            raise

    def input(self, key: str) -> Path:
        """Data of an input shard, its digest checked at the first read."""
        return self.record(key).data

    def read(self, key: str, reader: Callable[[Path, Digest], Iterator[T]]) -> Iterator[T]:
        """What a reader finds in the data of an input shard, checked in the same read of the file.

        Nothing of it may be published before it has come to its end.

        Args:
            key: of the shard.
            reader: reads a file once, and feeds it to a digest.

        Raises:
            DamagedError: at the end, if the data differs from its record.
        """
        record, found = self._unverified(key), Digest()
        try:
            yield from reader(record.data, found)
        except DamagedError:
            self.record(key)  # reads it again; what is damaged is put aside
            raise
        if found.hexdigest() != record.digest:
            self.record(key)
            raise DamagedError(f"{record.data}: reads differently each time")
        self._keep(record)

    def local_input(self, key: str) -> Path:
        """The same, copied once a node to KDHPC_SCRATCH where that is set: for models."""
        scratch = os.environ.get("KDHPC_SCRATCH")
        record = self.record(key)
        if not scratch:
            return record.data
        copy = Path(scratch) / f"kdhpc-models-{os.getuid()}" / record.digest
        if str(copy) in self._verified:
            return copy
        if not copy.is_dir() or digest_of(copy) != record.digest:
            temporary = copy.with_name(f".{copy.name}.{secrets.token_hex(4)}")
            temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copytree(record.data, temporary)
            shutil.rmtree(copy, ignore_errors=True)
            try:
                temporary.rename(copy)
            except OSError:  # another task of this node was first
                shutil.rmtree(temporary)
            if digest_of(copy) != record.digest:
                raise DamagedError(f"{copy}: differs from {record.data}")
        self._verified.add(str(copy))
        return copy

    def ready(self) -> None:
        """Say that all is imported, read and loaded: from here on a shard's time is useful work."""
        self._ready_at = time.time()

    def provenance(self, keys: Sequence[str], packages: Sequence[str]) -> dict[str, str]:
        """Where merged numbers come from; outside their logical digest.

        Args:
            keys: of the shards that they were merged from.
            packages: whose versions matter.
        """
        import platform
        from importlib.metadata import version

        from kdhpc import compose

        records = [self._unverified(key) for key in keys]
        return {
            "config": compose.to_yaml(self.config),
            "merged_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": json.dumps({name: version(name) for name in packages}),
            "python": platform.python_version(),
            "hosts": json.dumps(sorted({r.attempt["host"] for r in records})),
            "code": json.dumps(sorted({r.code for r in records})),
            "seconds": json.dumps(round(sum(r.seconds for r in records), 1)),
        }

    def new_path(self, shard: Shard, suffix: str = "") -> Path:
        """A name of this attempt's own, beside the record to come."""
        record_path = self.run.record_path(shard.key)
        record_path.parent.mkdir(parents=True, exist_ok=True)
        path = record_path.with_name(f"{shard.name}.{secrets.token_hex(4)}{suffix}")
        self._unpublished.append(path)
        return path

    def discard(self) -> None:
        """Delete what was begun and not published: on a full disk it would keep others out."""
        for path in self._unpublished:
            with contextlib.suppress(OSError):
                remove(path)
        self._unpublished.clear()

    def publish(self, shard: Shard, written: Written, started_at: float) -> bool:
        """Make one attempt's output the shard's, unless another attempt was first.

        The loser's data is deleted. Returns whether this attempt won.
        """
        sync_tree(written.path)
        path = self.run.record_path(shard.key)
        num_bytes = (
            sum(f.stat().st_size for f in written.path.rglob("*") if f.is_file())
            if written.path.is_dir()
            else written.path.stat().st_size
        )
        record = {
            "key": shard.key,
            "data": written.path.name,
            "bytes": num_bytes,
            "digest": written.digest or digest_of(written.path),
            "rows": written.rows,
            "row_range": shard.rows,
            "recipe": shard.recipe,
            "fields": dict(shard.arm.fields),
            "inputs": dict(shard.arm.inputs),
            "code": self._code,
            "attempt": attempt_facts(started_at, max(started_at, self._ready_at)),
            "stats": dict(written.stats),
            "nonce": secrets.token_hex(8),
        }
        try:
            won = write_once(path, record)
        except OSError:
            if path.exists():
                self._unpublished.clear()  # it may be ours
            raise
        self._unpublished.clear()
        if not won:
            remove(written.path)
        self.point_alias(shard)
        return won

    def point_alias(self, shard: Shard) -> None:
        """Let the stage's fixed name, if it has one, stand for a published shard."""
        alias = self.run.alias_path(shard.stage)
        if alias is not None:
            point_alias(alias, read_record(self.run.record_path(shard.key), shard.key).data)


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


def attempt_facts(started_at: float, ready_at: float) -> dict[str, object]:
    """Where, when and under which job this process runs, for a record's provenance.

    Args:
        started_at: when the attempt began.
        ready_at: when it had imported, read and loaded what it works on.
    """
    return {
        "host": socket.gethostname(),
        "node": os.environ.get("SLURMD_NODENAME", ""),
        "pid": os.getpid(),
        "process_started": round(process_started(), 3),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "started": round(started_at, 3),
        "ready": round(ready_at, 3),
        "seconds": round(time.time() - started_at, 3),
    }


@functools.cache
def process_started() -> float:
    """When this process was started, by the kernel's account."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - up_s


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


def check_run_folder(path: Path) -> None:
    """Check that a run is there and that nobody else may write to it: its code is run.

    Raises:
        InputError: if it is not so.
    """
    if not (path / "run.json").is_file():
        raise InputError(f"{path}: no run here; expected a folder that sweep.py made")
    mode = path.stat()
    if mode.st_uid != os.getuid() or mode.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"{path}: belongs to or may be written by others; its code would run as you"
        )
