"""The run folder: its paths, its records, and the check that data matches its record.

    runs/demo/
      run.json                      format, pipeline and identity of the run, and when it was made
      requests/0001.json            what was asked for: config, code, resources (`kdhpc.cluster`)
      submissions/0001.json ...     what was submitted
      code/3f9a.../                 kdhpc and configs as they were when submitted
      logs/0001/3.log               one log for each task; 3.0.log: of process 0, if it is packed
      failures/0001/...             one file for each failed shard
      pace.json                     what its stages took, for the times of later runs
      2-sample-truth/train/00017.json            the record: immutable, the first writer wins
      2-sample-truth/train/00017.9c41d2aa.arrow  its data, written whole before the record
      8-merge/results.h5            the newest merge
      models/teacher-s0             a link to the published checkpoint folder

A shard is done when its record exists and its data has the recorded size. Readers list records,
never data files.
"""

import contextlib
import dataclasses
import functools
import os
import stat
import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from kdhpc.errors import DamagedError, InputError
from kdhpc.storage.files import (
    digest_of,
    list_entries,
    point_alias,
    point_link,
    read_once,
    size_of,
)
from kdhpc.types import Json

RESULTS = "results.h5"
"""Fixed name of the newest merge in its stage's folder."""
ARCHIVE = "archive.json"
"""File that a run has if it was restored from an archive; it says what the archive left out."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A published shard."""

    key: str
    folder: Path
    data_name: str
    num_bytes: int
    digest: str
    num_rows: int
    recipe: str
    fields: Mapping[str, Json]
    inputs: Mapping[str, str]
    row_range: tuple[int, int] | None
    code: str
    attempt: Mapping[str, Json]
    stats: Mapping[str, Json]
    nonce: str
    reused_from: str = ""
    """Folder of the run that made the shard; empty if this one did."""

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
    """What is wrong with the record or the data of a shard, by its key."""


class RunFolder:
    """Paths and files of one run."""

    def __init__(
        self,
        path: Path,
        folders: Mapping[str, str],
        aliases: Mapping[str, str] | None = None,
        links: Mapping[str, str] | None = None,
    ) -> None:
        """Set the paths of a run folder; nothing is read or created.

        Args:
            path: the run folder.
            folders: the folder inside the run of each stage, by stage name.
            aliases: the fixed file name of the newest output, by the name of a stage that has one.
            links: the folder of the links to the output of each arm, by the name of a stage that
                has one.
        """
        self.path = path
        self.folders = folders
        self.aliases = aliases or {}
        self.links = links or {}

    @functools.cached_property
    def identity(self) -> str:
        """Four hexadecimal digits that tell apart runs with the same name."""
        return str(read_once(self.path / "run.json")["identity"])

    @property
    def is_restored(self) -> bool:
        """Whether the run was restored from an archive, so that it can be read only."""
        return (self.path / ARCHIVE).exists()

    @functools.cached_property
    def left_out(self) -> frozenset[str]:
        """Keys of the shards whose data, or a part of it, the archive of a restored run lacks."""
        return frozenset(read_once(self.path / ARCHIVE)["left_out"] if self.is_restored else ())

    def stage_dir(self, stage: str) -> Path:
        return self.path / self.folders[stage]

    def record_path(self, key: str) -> Path:
        """Return where the record of a shard is, or will be."""
        stage, arm, name = key.split("/")
        return self.stage_dir(stage) / arm / f"{name}.json"

    def scratch_path(self, key: str) -> Path:
        """Return where a shard keeps what its next attempt can use, such as checkpoints."""
        stage, arm, name = key.split("/")
        return self.stage_dir(stage) / arm / f"{name}.checkpoints"

    def make_folder(self, folder: Path) -> None:
        """Create a folder inside the run, but never the run folder, which may have been moved.

        Raises:
            FileNotFoundError: if there is no run folder here.
        """
        for part in reversed([folder, *folder.parents]):
            if part.is_relative_to(self.path) and part != self.path:
                part.mkdir(exist_ok=True)

    def check_there(self) -> None:
        """Check that the run folder has not been moved or deleted meanwhile.

        Raises:
            DamagedError: if there is no run folder here any more.
        """
        if not (self.path / "run.json").exists():
            raise DamagedError(
                f"{self.path}: was moved or deleted while it was in use; go on in its new place"
            )

    def checkpoint_since(self, key: str, time_s: float) -> bool:
        """Return whether a shard has a checkpoint newer than `time_s` (seconds since the epoch)."""
        newest = 0.0
        for path in self.scratch_path(key).glob("*/*.json"):
            with contextlib.suppress(FileNotFoundError):  # an older one was pruned meanwhile
                newest = max(newest, path.stat().st_mtime)
        return newest > time_s

    def alias_path(self, stage: str) -> Path | None:
        """Return the fixed name of a stage's newest output, if the stage has one."""
        return self.stage_dir(stage) / self.aliases[stage] if stage in self.aliases else None

    def link_path(self, key: str) -> Path | None:
        """Return the link to the output of a shard's arm, if the stage has such links."""
        stage, arm, _ = key.split("/")
        return self.path / self.links[stage] / arm if stage in self.links else None

    def point_names(self, record: Record) -> None:
        """Make the fixed names of a published shard's data, if it has any, refer to it."""
        alias = self.alias_path(record.key.partition("/")[0])
        if alias is not None:
            point_alias(alias, record.data)
        link = self.link_path(record.key)
        if link is not None:
            point_link(link, record.data)

    def make_lost_links(self) -> None:
        """Make the links that are missing, as in the runs of versions that made none."""
        for stage in self.links:
            for record in self._scan_stage(stage).records.values():
                link = self.link_path(record.key)
                if link is not None and not (link.exists() and link.samefile(record.data)):
                    point_link(link, record.data)

    def scan(self) -> Scan:
        """Read every record and check the size of its data, in one walk over the run folder.

        In a restored run, data that its archive has left out is not looked for.
        """
        records: dict[str, Record] = {}
        damaged: dict[str, str] = {}
        for stage in self.folders:
            of_stage = self._scan_stage(stage)
            records |= of_stage.records
            damaged |= of_stage.damaged
        return Scan(records=records, damaged=damaged)

    def _scan_stage(self, stage: str) -> Scan:
        records: dict[str, Record] = {}
        damaged: dict[str, str] = {}
        for arm in list_entries(self.stage_dir(stage)):
            if not arm.is_dir():
                continue
            for key, record in _records_in(arm, f"{stage}/{arm.name}", self.left_out):
                if isinstance(record, DamagedError):
                    damaged[key] = str(record)
                else:
                    records[key] = record
        return Scan(records=records, damaged=damaged)

    def quarantine(self, key: str) -> None:
        """Rename a damaged record, so that the shard is made again; nothing is deleted."""
        path = self.record_path(key)
        with contextlib.suppress(FileNotFoundError):
            path.rename(path.with_name(f"{path.name}.damaged-{time.time_ns()}"))


def read_record(path: Path, key: str) -> Record:
    """Read one record.

    Raises:
        DamagedError: if it is missing or damaged, or belongs to another shard.
    """
    return _record(read_once(path), key, path.parent)


def _records_in(
    arm: os.DirEntry[str], prefix: str, left_out: Set[str]
) -> Iterator[tuple[str, Record | DamagedError]]:
    """Yield the key of every shard of an arm that has a record, and the record or its damage.

    Args:
        arm: the folder.
        prefix: beginning of the keys, `stage/arm`.
        left_out: keys of the shards whose data is not looked for.
    """
    folder = Path(arm.path)
    present = {entry.name: entry for entry in list_entries(folder)}
    for name, entry in present.items():
        if not name.endswith(".json") or name.startswith("."):
            continue
        key = f"{prefix}/{name.removesuffix('.json')}"
        try:
            record = _record(read_once(entry.path), key, folder)
            if key in left_out:
                yield key, record
                continue
            # Data missing from the listing may have been written and recorded during the listing.
            size = size_of(present.get(record.data_name) or record.data)
            if size != record.num_bytes:
                problem = "is missing" if size is None else f"has {size} bytes"
                raise DamagedError(f"{record.data}: {problem}, its record says {record.num_bytes}")
            yield key, record
        except DamagedError as error:
            yield key, error


def _record(raw: Mapping[str, Json], key: str, folder: Path) -> Record:
    # The seal has shown that the values are those written, so their types are not checked.
    try:
        data = raw["data"]
        if raw["key"] != key or "/" in data or data in {"", ".", ".."}:
            raise DamagedError(
                f"{folder}: a record of {raw['key']} with data {data!r} is in the place of {key}"
            )
        return Record(
            key=key,
            folder=folder,
            data_name=data,
            num_bytes=raw["bytes"],
            digest=raw["digest"],
            num_rows=raw["num_rows"],
            recipe=raw["recipe"],
            fields=raw["fields"],
            inputs=raw["inputs"],
            row_range=tuple(raw["row_range"]) if raw["row_range"] else None,
            code=raw["code"],
            attempt=raw["attempt"],
            stats=raw["stats"],
            nonce=raw["nonce"],
            reused_from=raw.get("reused_from", ""),
        )
    except (TypeError, KeyError) as error:
        raise DamagedError(f"{folder}: the record of {key} has no field {error}") from error


def verify(record: Record) -> None:
    """Read every byte of a record's data and compare its digest.

    Raises:
        DamagedError: if the data is missing or its digest differs.
    """
    try:
        digest = digest_of(record.data)
    except OSError as error:
        raise DamagedError(f"{record.data}: cannot be read ({error.strerror})") from error
    if digest != record.digest:
        raise DamagedError(
            f"{record.data}: its bytes differ from what was published "
            f"(digest {digest[:12]}, expected {record.digest[:12]})"
        )


def check_run_folder(path: Path) -> None:
    """Check that a folder is a run to which nobody else may write, because its code is executed.

    Raises:
        InputError: if it is no run, belongs to somebody else, or is writable for others.
    """
    if not (path / "run.json").is_file():
        raise InputError(f"{path}: no run here; expected a folder that sweep.py made")
    mode = path.stat()
    if mode.st_uid != os.getuid() or mode.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(
            f"{path}: belongs to or may be written by others, and its code would run as you; "
            "expected a folder to which only you can write"
        )
