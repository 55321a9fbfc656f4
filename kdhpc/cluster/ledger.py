"""What was asked, what was submitted, what failed: immutable JSON files in the run folder.

requests/0001.json          somebody typed sweep, rerun or cancel: config, code, which shards
submissions/0001.json       intent: which shards go into which task; claimed by whoever links it
submissions/0001.job.json   what became of it: job ids, or that it was given up
attempts/0001/3.jsonl       what task 3 began and how it ended, a line each; for explanations only
failures/0001/<shard>.json  one failed shard of one submission
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from kdhpc.errors import DamagedError
from kdhpc.storage.files import read_once, write_once
from kdhpc.types import Json

Made = TypeVar("Made")
ORPHAN_AGE_S = 420.0
"""An intent without a job this old was left by a launcher that died; longer than every time limit
on the way from one to the other."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody asked for."""

    number: int
    kind: str
    """`sweep`, `rerun` or `cancel`."""
    time: float
    config: Mapping[str, Json]
    code: str
    """Digest of the code snapshot that new submissions run."""
    executor: str
    """`local` or `slurm`."""
    stage: str | None = None
    """For rerun: only this stage."""
    keys: tuple[str, ...] | None = None
    """For rerun: only these shards."""
    resources: Mapping[str, Json] = field(default_factory=dict)
    """For rerun: fields of `slurm` that replace the config's."""

    def covers(self, key: str) -> bool:
        """Whether this request asks for a shard, whatever became of it before."""
        if self.kind == "cancel":
            return False
        if self.keys is not None:
            return key in self.keys
        return self.stage is None or key.startswith(f"{self.stage}/")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An array: one stage, the shards of each task."""

    number: int
    request: int
    name: str
    """Unique in the whole cluster; how a job is found when sbatch's answer was lost."""
    stage: str
    tasks: tuple[tuple[str, ...], ...]
    """Shard keys by array index; never changed afterwards."""
    resources: Mapping[str, Json]
    code: str
    time: float
    host: str
    pid: int

    @property
    def keys(self) -> Iterator[str]:
        for task in self.tasks:
            yield from task

    @property
    def gate_name(self) -> str:
        """Name of the gate's job."""
        return f"gate-{self.name}"

    @property
    def job_names(self) -> tuple[str, str]:
        """Names of its two jobs: the array and its gate."""
        return self.name, self.gate_name


@dataclass(frozen=True, kw_only=True)
class Job:
    """What became of a submission."""

    job_id: str | None
    """None if it was given up, or ran locally."""
    gate_id: str | None = None
    note: str = ""
    launcher_cpu_s: float = 0.0
    """Of a local run: what its launcher had computed by then."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one shard of one submission has no output."""

    key: str
    kind: str
    """Failure class; see `failures.py`."""
    message: str
    fingerprint: str = ""
    """Equal for failures with the same cause."""
    submission: int
    log: str = ""
    node: str = ""
    time: float = 0.0
    got_further: bool = False
    """Whether the attempt left a newer checkpoint than the one before it."""


AttemptEvent = Literal["started", "stopped", "ended"]
"""A shard's attempt began; was told to stop and did; published, failed, or lost to another one."""


class Ledger:
    """The three folders of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log_path(self, number: int, task: int) -> Path:
        return self.path / "logs" / f"{number:04d}" / f"{task}.log"

    def requests(self) -> list[Request]:
        """All requests, oldest first."""
        found = []
        for path, raw in self._read("requests", r"(\d+)\.json"):
            if raw.get("keys") is not None:
                raw["keys"] = tuple(raw["keys"])
            found.append(_made(Request, path, raw))
        return found

    def submissions(self) -> list[Submission]:
        """All submissions, oldest first."""
        found = self._read("submissions", r"(\d+)\.json")
        return [_submission(path, raw) for path, raw in found]

    def submission(self, number: int) -> Submission:
        """One of them: a task need not read what all the others were told."""
        path = self.path / f"submissions/{number:04d}.json"
        return _submission(path, read_once(path))

    def jobs(self) -> dict[int, Job]:
        """By submission number, what became of it."""
        found = self._read("submissions", r"(\d+)\.job\.json")
        return {int(path.name.partition(".")[0]): _made(Job, path, raw) for path, raw in found}

    def failures(self) -> list[Failure]:
        """All failures, oldest first."""
        found = []
        for number in sorted(os.listdir(self.path / "failures"), key=int):
            found += [
                _made(Failure, path, raw)
                for path, raw in self._read(f"failures/{number}", r"[^.].*\.json")
            ]
        return sorted(found, key=lambda failure: failure.submission)

    def add_request(self, request: Request) -> bool:
        """Claim the request's number. Returns whether it is ours."""
        return write_once(self.path / f"requests/{request.number:04d}.json", asdict(request))

    def claim(self, submission: Submission) -> bool:
        """Claim the submission's number. Returns whether it is ours."""
        path = self.path / f"submissions/{submission.number:04d}.json"
        return write_once(path, asdict(submission))

    def settle(self, number: int, job: Job) -> bool:
        """Say what became of a submission, once."""
        return write_once(self.path / f"submissions/{number:04d}.job.json", asdict(job))

    def add_failure(self, failure: Failure) -> bool:
        """Record a failure; the first word on a shard of a submission stays."""
        name = failure.key.replace("/", "__")
        folder = self.path / "failures" / f"{failure.submission:04d}"
        return write_once(folder / f"{name}.json", asdict(failure))

    def note_attempt(self, number: int, task: int, key: str, event: AttemptEvent) -> None:
        """Note what an attempt does, by the first rank; a disk that takes nothing stops no work."""
        path = self._attempts_path(number, task)
        line = json.dumps({"key": key, "event": event, "time": round(time.time(), 3)})
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(f"{line}\n")

    def last_events(self, number: int, task: int) -> dict[str, AttemptEvent]:
        """By shard that a task has begun, in order, the last event of its last attempt."""
        found: dict[str, AttemptEvent] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self._attempts_path(number, task).read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line
                    event = json.loads(line)
                    found.pop(event["key"], None)  # the last begun comes last
                    found[event["key"]] = event["event"]
        return found

    def _attempts_path(self, number: int, task: int) -> Path:
        return self.path / "attempts" / f"{number:04d}" / f"{task}.jsonl"

    def _read(self, folder: str, pattern: str) -> Iterator[tuple[Path, dict[str, Json]]]:
        # Numbers have four digits, and one day five.
        for name in sorted(os.listdir(self.path / folder), key=lambda name: (len(name), name)):
            if re.fullmatch(pattern, name):
                path = self.path / folder / name
                yield path, read_once(path)


def _submission(path: Path, raw: dict[str, Json]) -> Submission:
    raw["tasks"] = tuple(tuple(task) for task in raw.get("tasks", ()))
    return _made(Submission, path, raw)


def _made(kind: Callable[..., Made], path: Path, raw: Mapping[str, Json]) -> Made:
    try:
        return kind(**raw)
    except TypeError as error:
        raise DamagedError(f"{path}: of another version of kdhpc ({error})") from error


def make(path: Path) -> Ledger:
    """The ledger of a run folder, its folders created."""
    for name in ("requests", "submissions", "attempts", "failures", "logs", "code", "progress"):
        (path / name).mkdir(parents=True, exist_ok=True)
    return Ledger(path)


def launcher_gone(submission: Submission) -> bool:
    """Whether whoever claimed this intent, and never settled it, is no more."""
    if time.time() - submission.time > ORPHAN_AGE_S:
        return True
    if submission.host != socket.gethostname():
        return False
    with contextlib.suppress(PermissionError):
        try:
            os.kill(submission.pid, 0)
        except ProcessLookupError:
            return True
    return False
