"""What a stage sees while it runs one shard, and the publishing of its output."""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from kdhpc.config.run import RunConfig
from kdhpc.errors import DamagedError
from kdhpc.plan.shards import Plan, Shard
from kdhpc.storage.files import (
    Digest,
    digest_of,
    remove,
    size_of,
    sync_tree,
    write_once,
)
from kdhpc.storage.run_folder import Record, RunFolder, read_record, verify
from kdhpc.types import Json

T = TypeVar("T")
C = TypeVar("C", bound=RunConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """Output of a stage's `run`: a file or folder at a path from `Work.new_path`."""

    path: Path
    num_rows: int
    stats: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    """Numbers worth keeping in the record, such as a final loss."""
    digest: str = ""
    """Result of `digest_of` for the path, if the stage has just read it back; else empty."""


class Work(Generic[C]):
    """Everything that a stage needs to run one shard: the config, the inputs, where to write.

    Its methods raise `DamagedError` if an input does not match its record.
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
        """Prepare to run shards of a plan.

        Args:
            run: the run folder.
            config: config of the run.
            plan: plan of that config.
            code: digest of the code snapshot that runs, for the records.
            should_stop: returns whether the stage should stop at its next checkpoint.
            progress: takes the done fraction of the shard, from 0 to 1.
            rank: rank of this process among those that run the shard.
            world_size: number of those processes.
        """
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
        """Return the record of an input shard; check its data once in this process.

        Raises:
            DamagedError: if the record is missing or its data does not match it.
        """
        record = self._unverified(key)
        if key not in self._verified and self.rank == 0:  # the other ranks wait for rank 0
            self._verify(record)
            self._keep(record)
        return record

    def stats(self, key: str) -> Mapping[str, Json]:
        """Return the stats in the record of an input shard, without checking its data.

        Raises:
            DamagedError: if the record is missing or damaged.
        """
        return self._unverified(key).stats

    def _unverified(self, key: str) -> Record:
        record = self._records.get(key) or read_record(self.run.record_path(key), key)
        if key in self.plan.shards and self.plan.shards[key].recipe != record.recipe:
            raise DamagedError(f"{record.data}: made with other settings than this run's")
        return record

    def _keep(self, record: Record) -> None:
        self._verified.add(record.key)
        self._records[record.key] = record

    def _verify(self, record: Record) -> None:
        """Check every byte; put a record aside if its data is damaged, so that it is made again."""
        try:
            verify(record)
        except DamagedError as error:
            if not isinstance(error.__cause__, OSError):
                self.run.quarantine(record.key)
            raise

    def input(self, key: str) -> Path:
        """Return the path of an input shard's data; its digest is checked at the first call."""
        return self.record(key).data

    def read(self, key: str, reader: Callable[[Path, Digest], Iterator[T]]) -> Iterator[T]:
        """Yield what a reader yields for the data of an input shard, and check its digest.

        The file is read once for both, so the check comes at the end: nothing that was made from
        these values may be published before the iterator has ended.

        Args:
            key: key of the shard.
            reader: reads a file once and feeds its bytes to a digest.

        Raises:
            DamagedError: at the end, if the data does not match its record.
        """
        record, digest = self._unverified(key), Digest()
        try:
            yield from reader(record.data, digest)
        except DamagedError:
            self.record(key)  # reads the data again, and puts a damaged record aside
            raise
        if digest.hexdigest() != record.digest:
            self.record(key)
            raise DamagedError(f"{record.data}: reads differently each time; check the disk")
        self._keep(record)

    def local_input(self, key: str) -> Path:
        """Return the data of an input shard, copied once per node to KDHPC_SCRATCH if that is set.

        This is for models, which every task of a node loads.
        """
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
            except OSError:  # another task on this node was first
                shutil.rmtree(temporary)
            if digest_of(copy) != record.digest:
                raise DamagedError(f"{copy}: differs from {record.data}")
        self._verified.add(str(copy))
        return copy

    def ready(self) -> None:
        """Note that everything is imported, read and loaded: from now on time is useful work."""
        self._ready_at = time.time()

    def provenance(self, keys: Sequence[str], packages: Sequence[str]) -> dict[str, str]:
        """Describe where merged numbers come from; this is outside their logical digest.

        Args:
            keys: keys of the shards that were merged.
            packages: names of packages whose versions matter.
        """
        import platform
        from importlib.metadata import version

        from kdhpc.config import presets

        records = [self._unverified(key) for key in keys]
        return {
            "config": presets.to_yaml(self.config),
            "merged_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": json.dumps({name: version(name) for name in packages}),
            "python": platform.python_version(),
            "hosts": json.dumps(sorted({r.attempt["host"] for r in records})),
            "code": json.dumps(sorted({r.code for r in records})),
            "seconds": json.dumps(round(sum(r.seconds for r in records), 1)),
        }

    def new_path(self, shard: Shard, suffix: str = "") -> Path:
        """Return a path that only this attempt uses, in the folder of the shard's record."""
        record_path = self.run.record_path(shard.key)
        self.run.make_folder(record_path.parent)
        path = record_path.with_name(f"{shard.name}.{secrets.token_hex(4)}{suffix}")
        self._unpublished.append(path)
        return path

    def discard(self) -> None:
        """Delete unpublished output, which would take space from other attempts on a full disk."""
        for path in self._unpublished:
            with contextlib.suppress(OSError):
                remove(path)
        self._unpublished.clear()

    def publish(self, shard: Shard, written: Written, started_at: float) -> bool:
        """Publish this attempt's output as the shard's, unless another attempt was first.

        Args:
            shard: the shard.
            written: output of this attempt; deleted if another attempt was first.
            started_at: start of this attempt, in seconds since the epoch.

        Returns:
            Whether this attempt's output was published.
        """
        sync_tree(written.path)
        path = self.run.record_path(shard.key)
        record = {
            "key": shard.key,
            "data": written.path.name,
            "bytes": size_of(written.path),
            "digest": written.digest or digest_of(written.path),
            "num_rows": written.num_rows,
            "row_range": shard.row_range,
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
                self._unpublished.clear()  # that record may be ours: keep its data
            raise
        self._unpublished.clear()
        if not won:
            remove(written.path)
        self.point_names(shard)
        return won

    def point_names(self, shard: Shard) -> None:
        """Make the fixed names of a published shard's data, if it has any, refer to it."""
        if shard.stage in self.run.aliases:
            self.run.point_names(read_record(self.run.record_path(shard.key), shard.key))
        elif shard.stage in self.run.links:
            with contextlib.suppress(DamagedError):  # of a record that somebody else published
                self.run.point_names(read_record(self.run.record_path(shard.key), shard.key))


def attempt_facts(started_at: float, ready_at: float) -> dict[str, object]:
    """Describe where, when and in which job this process runs, for a record's provenance.

    Args:
        started_at: when the attempt began, in seconds since the epoch.
        ready_at: when everything it works on was imported, read and loaded.
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
        **_memory_used(),
    }


def forget_memory() -> None:
    """Let the most memory that this process used count from now on, if the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if (torch := _torch_with_gpu()) is not None:
        torch.cuda.reset_peak_memory_stats()


def _torch_with_gpu() -> Any:
    """Return the module torch if this process has used a GPU, else None; nothing is imported."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _memory_used() -> dict[str, float]:
    """Return the most memory of this process, and of its GPU if it has used one, in 10^9 bytes."""
    used = {}
    with contextlib.suppress(OSError, StopIteration):
        status = Path("/proc/self/status").read_text().splitlines()
        peak = next(line for line in status if line.startswith("VmHWM:"))
        used["memory_gb"] = round(int(peak.split()[1]) * 1024 / 1e9, 3)
    if (torch := _torch_with_gpu()) is not None:
        used["gpu_memory_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 3)
    return used


@functools.cache
def process_started() -> float:
    """Return when the kernel started this process, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - up_s
