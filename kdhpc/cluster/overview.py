"""All known runs, a line for each; one that cannot be read does not hide the others."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdhpc.cluster import runs, slurm
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import look
from kdhpc.errors import ClusterError, KdhpcError
from kdhpc.storage.files import list_entries, read_once

Queue = Callable[[], Sequence[slurm.Queued]]


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What is worth knowing of a run among others."""

    name: str
    path: str
    pipeline: str
    state: str
    """`complete` (up to `until`), `running`, `queued`, `cancelled`, `failed`, `incomplete`,
    `unreadable`, or `unknown` if Slurm does not answer."""
    done: int
    planned: int
    """Shards that the last request plans, and those of them that are done."""
    num_bytes: int
    """Size on disk."""
    rank_hours: float
    """Work of its own published shards, without reused ones."""
    changed: float
    """Time of the last change of any file, in seconds since the epoch."""
    is_restored: bool
    """Whether it was restored from an archive."""
    problem: str = ""
    """Why it cannot be read, or why its state is unknown, in one line."""


def overviews(paths: Sequence[Path]) -> list[Overview]:
    """Look at runs one after the other, with one squeue for all of them, if any.

    Args:
        paths: their absolute folders.
    """
    queue = _asked_once()
    return [_overview(path, queue) for path in paths]


def _asked_once() -> Queue:
    """Return a function that asks Slurm for the queue once, and then repeats the answer."""
    answers: list[Sequence[slurm.Queued] | ClusterError] = []

    def queue() -> Sequence[slurm.Queued]:
        if not answers:
            try:
                answers.append(slurm.queue())
            except ClusterError as error:
                answers.append(error)
        if isinstance(answers[0], ClusterError):
            raise answers[0]
        return answers[0]

    return queue


def _overview(path: Path, queue: Queue) -> Overview:
    num_bytes, changed = _on_disk(path)
    try:
        run = runs.open_run(path)
        state = look(run, queue)
        return Overview(
            name=path.name,
            path=str(path),
            pipeline=_pipeline(path),
            state=_state(run, state),
            done=len(state.situation.done),
            planned=len(state.plan.shards),
            num_bytes=num_bytes,
            rank_hours=_rank_hours(state),
            changed=changed,
            is_restored=run.is_restored,
            problem=f"{path}: {state.queue_error}" if state.queue_error else "",
        )
    except Exception as error:  # whatever is wrong with one run, the others are shown
        text = " ".join(str(error).split())
        if not isinstance(error, KdhpcError):
            text = f"{type(error).__name__}: {text}"
        return Overview(
            name=path.name,
            path=str(path),
            pipeline=_pipeline(path),
            state="unreadable",
            done=0,
            planned=0,
            num_bytes=num_bytes,
            rank_hours=0.0,
            changed=changed,
            is_restored=False,
            problem=text if str(path) in text else f"{path}: {text}",
        )


def _pipeline(path: Path) -> str:
    """Return the name of a run's pipeline; empty if it cannot be read."""
    try:
        return str(read_once(path / "run.json")["pipeline"])
    except Exception:
        return ""


def _state(run: Run, state: State) -> str:
    situation = state.situation
    if state.finished:
        return "complete"
    if state.running or runs.is_locked(run):
        return "running"
    if situation.active or state.queued:
        return "queued"
    if state.queue_error:
        return "unknown"
    if situation.stopped:
        return "cancelled"
    broken = {key for key, failures in situation.failures.items() if failures}
    return "failed" if (broken | situation.damaged.keys()) - situation.done else "incomplete"


def _rank_hours(state: State) -> float:
    shards = state.plan.shards
    return (
        sum(
            record.seconds * (shards[key].arm.nodes * shards[key].arm.ranks_per_node)
            if key in shards
            else record.seconds
            for key, record in state.scan.records.items()
            if not record.reused_from
        )
        / 3600
    )


def _on_disk(path: Path) -> tuple[int, float]:
    """Return the bytes that a folder takes on its disk, and when a file in it last changed.

    A file with several names counts once, and symbolic links are not followed.
    """
    num_bytes, changed = 0, 0.0
    seen: set[int] = set()
    folders: list[str | Path] = [path]
    while folders:
        for entry in _entries(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:  # it was deleted meanwhile
                continue
            changed = max(changed, status.st_mtime)
            if status.st_ino not in seen:
                seen.add(status.st_ino)
                num_bytes += 512 * status.st_blocks
    return num_bytes, changed


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        return list_entries(Path(folder))
    except OSError:  # it may not be read
        return []
