"""Find the part of a task's log that one shard's last attempt wrote."""

from dataclasses import dataclass
from pathlib import Path

from kdhpc.cluster.failures import STARTED
from kdhpc.cluster.ledger import Ledger, Submission
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.plan.shards import Shard


@dataclass(frozen=True, kw_only=True)
class LogPart:
    """The lines of a log that one attempt wrote."""

    path: Path
    """The whole log."""
    text: str

    def last_lines(self, count: int) -> tuple[str, ...]:
        """Return the last lines that are not empty, at most `count`."""
        return tuple(line for line in self.text.splitlines() if line.strip())[-count:]


def tasks_of(state: State, key: str) -> list[tuple[Submission, int]]:
    """Return every task that was to make a shard, as submission and array index, oldest first."""
    return [
        (submission, index)
        for submission in state.submissions
        for index, keys in enumerate(submission.tasks)
        if key in keys
    ]


def last_part(run: Run, state: State, shard: Shard) -> LogPart | None:
    """Return what a shard's last attempt wrote; None if the shard was never tried."""
    for submission, index in reversed(tasks_of(state, shard.key)):
        path = Ledger(run.path).log_of(submission.number, index, shard.key)
        part = own_part(path, shard)
        if part is not None:
            return part
    return None


def own_part(path: Path, shard: Shard) -> LogPart | None:
    """Cut what a shard's last attempt wrote out of the log of its task.

    In a log in which no shard was started, all lines are about why.

    Returns:
        The part; None if there is no log, or only other shards were started in it.
    """
    try:
        lines = path.read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return None
    starts = [i for i, line in enumerate(lines) if line.rstrip().endswith(STARTED)]
    own = [i for i in starts if lines[i].rstrip() == f"{shard.key}{STARTED}"]
    if not starts:
        return LogPart(path=path, text="".join(lines)) if lines else None
    if not own:
        return None
    # Every rank says that it has started.
    begin = own[-shard.arm.nodes * shard.arm.ranks_per_node :][0]
    end = next((i for i in starts if i > own[-1]), len(lines))
    return LogPart(path=path, text="".join(lines[begin:end]))
