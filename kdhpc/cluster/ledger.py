"""Requests, submissions and failures of a run: immutable JSON files in the run folder.

requests/0001.json          what somebody typed (sweep, rerun or cancel): config, code, shards
submissions/0001.json       the intent to submit: shards of each task; the first writer claims it
submissions/0001.job.json   the outcome of that: job ids, or that it was given up
submissions/0001.released   an empty file, made when its jobs were released
attempts/0001/3.jsonl       a line for each event of an attempt in task 3
attempts/0001/3.0.jsonl     the same for process 0 of a packed task
attempts/0001/3.claims/0/   shards that the processes of a packed task took and have not published,
                            by start of the task
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

Entry = TypeVar("Entry")
ORPHAN_AGE_S = 420.0
"""Age in seconds at which a submission without a job counts as left by a dead launcher; longer than
Slurm's programs usually take from the claim of a submission to the record of its job."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What somebody typed."""

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
        """Return whether this request asks for a shard, whatever happened to it before."""
        if self.kind == "cancel":
            return False
        if self.keys is not None:
            return key in self.keys
        return self.stage is None or key.startswith(f"{self.stage}/")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One array: its stage and the shards of each task."""

    number: int
    request: int
    name: str
    """Job name, unique in the cluster: a job is found by it when sbatch's answer is lost."""
    stage: str
    tasks: tuple[tuple[str, ...], ...]
    """Shard keys of each task, by array index; they never change."""
    resources: Mapping[str, Json]
    code: str
    time: float
    host: str
    pid: int

    @property
    def pack(self) -> int:
        """Number of shards that each task works on at once."""
        return int(self.resources.get("pack", 1))

    @property
    def keys(self) -> Iterator[str]:
        """Keys of all shards."""
        for task in self.tasks:
            yield from task

    @property
    def gate_name(self) -> str:
        """Name of the gate's job."""
        return f"gate-{self.name}"

    @property
    def job_names(self) -> tuple[str, str]:
        """Names of the two jobs: the array and its gate."""
        return self.name, self.gate_name


@dataclass(frozen=True, kw_only=True)
class Job:
    """Outcome of a submission."""

    job_id: str | None
    """Job id of the array; None if the submission was given up, or ran locally."""
    gate_id: str | None = None
    note: str = ""
    launcher_cpu_s: float = 0.0
    """In a local run, CPU seconds that its launcher had used so far."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why one shard of one submission has no output."""

    key: str
    kind: str
    """Failure class; see `failures.py`."""
    message: str
    fingerprint: str = ""
    """Equal for failures that have the same cause."""
    submission: int
    log: str = ""
    node: str = ""
    time: float = 0.0
    got_further: bool = False
    """Whether the attempt left a checkpoint."""


AttemptEvent = Literal["started", "stopped", "ended"]
"""What happened to an attempt: it began; it stopped when told to; it published, failed, or another
attempt had published first."""


@dataclass(frozen=True)
class Attempt:
    """One start of a shard."""

    key: str
    started: float
    """Seconds since the epoch."""
    ended: float | None = None
    """The same; None if it goes on, or died without a word."""
    stopped: bool = False
    """Whether it stopped when told to, with what it had done."""


class Ledger:
    """Reads and writes the requests, submissions, attempts and failures of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def log_path(self, number: int, task: int, process: int | None = None) -> Path:
        """Return the path of a task's log, or of the log of one process of a packed task.

        Args:
            number: number of the submission.
            task: index of the task in the array.
            process: index of the process in a packed task; None for what srun said.
        """
        return self.path / "logs" / f"{number:04d}" / f"{_process_name(task, process)}.log"

    def log_of(self, number: int, task: int, key: str) -> Path:
        """Return the path of the log that holds the last attempt of a shard in a task."""
        process = None
        for event in self._events(number, task):
            if event["key"] == key:
                process = event["process"]
        return self.log_path(number, task, process)

    def requests(self) -> list[Request]:
        """Read all requests, oldest first."""
        return [_request(path, raw) for path, raw in self._read("requests", r"(\d+)\.json")]

    def request(self, number: int) -> Request:
        """Read one request, as a task does: later ones may come from a newer version."""
        path = self.path / f"requests/{number:04d}.json"
        return _request(path, read_once(path))

    def submissions(self) -> list[Submission]:
        """Read all submissions, oldest first."""
        files = self._read("submissions", r"(\d+)\.json")
        return [_submission(path, raw) for path, raw in files]

    def submission(self, number: int) -> Submission:
        """Read one submission, as a task does, which need not know the others."""
        path = self.path / f"submissions/{number:04d}.json"
        return _submission(path, read_once(path))

    def jobs(self) -> dict[int, Job]:
        """Read the outcomes of submissions, by submission number."""
        files = self._read("submissions", r"(\d+)\.job\.json")
        return {int(path.name.partition(".")[0]): _entry(Job, path, raw) for path, raw in files}

    def failures(self) -> list[Failure]:
        """Read all failures, those of the oldest submission first."""
        failures = []
        for number in sorted(os.listdir(self.path / "failures"), key=int):
            failures += [
                _entry(Failure, path, raw)
                for path, raw in self._read(f"failures/{number}", r"[^.].*\.json")
            ]
        return sorted(failures, key=lambda failure: failure.submission)

    def add_request(self, request: Request) -> bool:
        """Write a request unless its number is taken. Returns whether it was written."""
        return write_once(self.path / f"requests/{request.number:04d}.json", asdict(request))

    def claim(self, submission: Submission) -> bool:
        """Write a submission unless its number is taken. Returns whether it was written."""
        path = self.path / f"submissions/{submission.number:04d}.json"
        return write_once(path, asdict(submission))

    def settle(self, number: int, job: Job) -> bool:
        """Write the outcome of a submission unless it has one. Returns whether it was written."""
        return write_once(self.path / f"submissions/{number:04d}.job.json", asdict(job))

    def note_released(self, number: int) -> None:
        """Note that the jobs of a submission were released; an unwritable disk is ignored."""
        with contextlib.suppress(OSError):
            (self.path / f"submissions/{number:04d}.released").touch()

    def released_at(self) -> dict[int, float]:
        """Return when the jobs of each submission were last released, by submission number."""
        paths = (self.path / "submissions").glob("*.released")
        return {int(path.stem): path.stat().st_mtime for path in paths}

    def add_failure(self, failure: Failure) -> bool:
        """Record a failure; the first failure of a shard in a submission is kept."""
        name = failure.key.replace("/", "__")
        folder = self.path / "failures" / f"{failure.submission:04d}"
        return write_once(folder / f"{name}.json", asdict(failure))

    def note_attempt(
        self, number: int, task: int, key: str, event: AttemptEvent, process: int | None = None
    ) -> None:
        """Append an event of an attempt; an unwritable disk is ignored. Only rank 0 calls this.

        Args:
            number: number of the submission.
            task: index of the task in the array.
            key: key of the shard.
            event: what happened.
            process: index of the process in a packed task; None in any other.
        """
        path = self._attempts_dir(number) / f"{_process_name(task, process)}.jsonl"
        line = json.dumps({"key": key, "event": event, "time": round(time.time(), 3)})
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(f"{line}\n")

    def last_events(self, number: int, task: int) -> dict[str, AttemptEvent]:
        """Read the last event of each shard that a task has begun, the last begun shard last."""
        events: dict[str, AttemptEvent] = {}
        for event in self._events(number, task):
            events.pop(event["key"], None)  # the dict then keeps the order of the events
            events[event["key"]] = event["event"]
        return events

    def attempts(self, number: int, task: int) -> list[Attempt]:
        """Read the attempts of a task, oldest first in each of its processes."""
        attempts: list[Attempt] = []
        begun: dict[tuple[str, int | None], float] = {}
        for event in self._events(number, task):
            place = event["key"], event["process"]
            if (started := begun.pop(place, None)) is not None:
                ended = None if event["event"] == "started" else event["time"]
                stopped = event["event"] == "stopped"
                attempts.append(Attempt(place[0], started=started, ended=ended, stopped=stopped))
            if event["event"] == "started":
                begun[place] = event["time"]
        attempts += [Attempt(key, started=time) for (key, _), time in begun.items()]
        return attempts

    def claim_shard(self, number: int, task: int, start: int, index: int) -> bool | None:
        """Take a shard for one process of a packed task, before another process does.

        Args:
            number: number of the submission.
            task: index of the task in the array.
            start: how many times Slurm has requeued the task; every start takes all shards anew.
            index: index of the shard in the task.

        Returns:
            Whether no other process has taken it; None if the disk cannot be written.
        """
        path = self._claim_path(number, task, start, index)
        try:
            for folder in reversed(path.parents[:3]):  # not the run folder, which may have moved
                folder.mkdir(exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return None
        return True

    def forget_claim(self, number: int, task: int, start: int, index: int) -> None:
        """Remove the file that says that a shard is taken; its record says so now."""
        with contextlib.suppress(OSError):
            self._claim_path(number, task, start, index).unlink()

    def _claim_path(self, number: int, task: int, start: int, index: int) -> Path:
        return self._attempts_dir(number) / f"{task}.claims" / str(start) / str(index)

    def _events(self, number: int, task: int) -> list[dict[str, Json]]:
        """Read the events of a task's attempts, oldest first, each with its `process`."""
        events = []
        folder = self._attempts_dir(number)
        for path in [folder / f"{task}.jsonl", *folder.glob(f"{task}.*.jsonl")]:
            process = re.fullmatch(r"\d+\.(\d+)\.jsonl", path.name)
            with contextlib.suppress(FileNotFoundError):
                for line in path.read_text(errors="replace").splitlines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short
                        event = json.loads(line)
                        known = {name: event[name] for name in ("key", "event", "time")}
                        events.append(known | {"process": process and int(process[1])})
        return sorted(events, key=lambda event: event["time"])

    def _attempts_dir(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:04d}"

    def _read(self, folder: str, pattern: str) -> Iterator[tuple[Path, dict[str, Json]]]:
        # Sorted by length first: numbers have four digits, and five from 10000 on.
        for name in sorted(os.listdir(self.path / folder), key=lambda name: (len(name), name)):
            if re.fullmatch(pattern, name):
                path = self.path / folder / name
                yield path, read_once(path)


def _request(path: Path, raw: dict[str, Json]) -> Request:
    if raw.get("keys") is not None:
        raw["keys"] = tuple(raw["keys"])
    return _entry(Request, path, raw)


def _submission(path: Path, raw: dict[str, Json]) -> Submission:
    raw["tasks"] = tuple(tuple(task) for task in raw.get("tasks", ()))
    return _entry(Submission, path, raw)


def _entry(entry_class: Callable[..., Entry], path: Path, raw: Mapping[str, Json]) -> Entry:
    try:
        return entry_class(**raw)
    except TypeError as error:
        raise DamagedError(
            f"{path}: was written by another version of kdhpc ({error}); use that version"
        ) from error


def _process_name(task: int, process: int | None) -> str:
    """Return the first part of the names of the files of a task, or of one process of it."""
    return str(task) if process is None else f"{task}.{process}"


def make(path: Path) -> Ledger:
    """Create the folders of a run's ledger in the run folder, and return the ledger."""
    for name in ("requests", "submissions", "attempts", "failures", "logs", "code", "progress"):
        (path / name).mkdir(exist_ok=True)
    return Ledger(path)


def launcher_gone(submission: Submission) -> bool:
    """Return whether the launcher that claimed an unsettled submission is dead."""
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
