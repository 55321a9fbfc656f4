"""Tell people about single shards: `status.py RUN` with `--list`, `--explain` or `--log`."""

import difflib
import time
from collections.abc import Iterator

from kdhpc.cluster.failures import REMEDIES
from kdhpc.cluster.ledger import AttemptEvent, Failure, Ledger, Submission
from kdhpc.cluster.logs import LogPart, last_part, tasks_of
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import DAMAGE_ADVICE, look
from kdhpc.errors import InputError
from kdhpc.plan.shards import Shard
from kdhpc.storage.run_folder import Record

LOG_LINES = 20
"""Lines of a log that `--explain` shows."""
FOLLOW_EVERY_S = 2.0


def planned_shard(state: State, key: str, option: str) -> Shard:
    """Return the planned shard of this key.

    Args:
        state: state of the run.
        key: what was typed.
        option: the option after which it was typed, for the error.

    Raises:
        InputError: if no such shard is planned.
    """
    if key not in state.plan.shards:
        near = difflib.get_close_matches(key, state.plan.shards, n=1, cutoff=0.0)
        raise InputError(
            f"{option} {key}: no such shard; expected STAGE/ARM/NAME, such as {near[0]}"
        )
    return state.plan.shards[key]


def list_stage(run: Run, state: State, stage: str) -> list[str]:
    """List the shards of a stage: key, state in one or two words, and task and node if known.

    Returns:
        A line for each shard, in the order of the plan.

    Raises:
        InputError: if there is no such stage.
    """
    stages = [s.name for s in run.pipeline.stages]
    if stage not in stages:
        near = difflib.get_close_matches(stage, stages, n=1, cutoff=0.0)[0]
        others = ", ".join(name for name in stages if name != near)
        raise InputError(f"--list {stage}: no such stage; expected {near}, or one of {others}")
    newest = {
        key: (submission, index)
        for submission in state.submissions
        for index, keys in enumerate(submission.tasks)
        for key in keys
    }
    ledger = Ledger(run.path)
    events = {
        (submission.number, index): ledger.last_events(submission.number, index)
        for key, (submission, index) in newest.items()
        if key in state.situation.active and submission.stage == stage
    }
    rows = []
    for shard in state.plan.stage(stage):
        submission, index = newest.get(shard.key, (None, 0))
        begun = events.get((submission.number, index), {}) if submission else {}
        word = _word(state, shard.key, submission, begun)
        rows.append((shard.key, word, _where(state, shard.key, submission, index)))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [
        f"{key.ljust(widths[0])}  {word.ljust(widths[1])}  {where}".rstrip()
        for key, word, where in rows
    ]


def _word(
    state: State, key: str, submission: Submission | None, begun: dict[str, AttemptEvent]
) -> str:
    """Return the state of a shard in one or two words.

    Args:
        state: state of the run.
        key: key of the shard.
        submission: the newest one that has the shard, if any.
        begun: the last event of each shard that the newest task has begun.
    """
    situation = state.situation
    failure = situation.failures[key][-1] if situation.failures.get(key) else None
    if key in situation.done:
        return "published"
    if key in situation.active:
        if failure and submission and failure.submission == submission.number:
            return f"failed {failure.kind}"  # its task goes on with other shards
        return "running" if key in state.running and key in begun else "queued"
    if key in situation.damaged:
        return "damaged"
    if failure:
        return f"failed {failure.kind}"
    return "cancelled" if situation.stopped else "waiting"


def _where(state: State, key: str, submission: Submission | None, index: int) -> str:
    """Name the newest task of a shard, and the node on which the shard was published or failed."""
    parts = []
    if submission is not None:
        job = state.jobs.get(submission.number)
        number = f"submission {submission.number:04d} task {index}"
        parts.append(f"job {job.job_id}_{index}" if job and job.job_id else number)
    if key in state.situation.done:
        parts.append(f"on {_node(state.scan.records[key])}")
    elif key not in state.situation.active and state.situation.failures.get(key):
        node = state.situation.failures[key][-1].node
        parts.append(f"on {node}" if node else "")
    return " ".join(filter(None, parts))


def show_log(run: Run, shard: Shard, *, follow: bool) -> int:
    """Print what a shard's last attempt wrote.

    Args:
        run: the run folder.
        shard: a planned shard.
        follow: whether to go on until the shard is published or failed, or nothing runs any more.

    Returns:
        The exit code: 0 if the shard is published, else 1.
    """
    printed = ""
    while True:
        state = look(run)
        part = last_part(run, state, shard)  # after `look`: has all that an ended attempt wrote
        never = f"{shard.key}: was never tried; {_state_of(state, shard.key)}\n"
        text = part.text if part else never
        # Another attempt, or the first, is printed from its beginning.
        print(text.removeprefix(printed), end="", flush=True)
        printed = text
        if not follow or _has_ended(state, shard.key):
            return 0 if shard.key in state.situation.done else 1
        time.sleep(FOLLOW_EVERY_S)


def _has_ended(state: State, key: str) -> bool:
    """Return whether a shard is published, its newest attempt has failed, or nothing runs."""
    if key in state.situation.done or not (state.situation.active or state.queued):
        return True
    tasks, failures = tasks_of(state, key), state.situation.failures.get(key)
    return bool(failures and tasks and failures[-1].submission == tasks[-1][0].number)


def explain(run: Run, state: State, shard: Shard) -> list[str]:
    """Explain a shard to people: its state, every attempt, its own part of the log, what to do.

    Returns:
        Lines of text.
    """
    key = shard.key
    lines = [f"{key}: {_state_of(state, key)}"]
    record = state.scan.records.get(key)
    if record is not None:
        lines += _provenance(record)
    ledger = Ledger(run.path)
    failures = {f.submission: f for f in ledger.failures() if f.key == key}
    for submission, index in tasks_of(state, key):
        job = state.jobs.get(submission.number)
        where = f"job {job.job_id}_{index}" if job and job.job_id else "no job"
        note = job.note if job and job.note else ""
        outcome = _outcome(failures.get(submission.number), note)
        lines.append(f"submission {submission.number:04d} ({where}): {outcome}")
    if failures or key in state.situation.active:
        lines += _end_of(last_part(run, state, shard))
    if key not in state.situation.done:
        lines.append(f"what to do: {_advice(state, key, failures)}")
    return lines


def _state_of(state: State, key: str) -> str:
    situation = state.situation
    if key in situation.done:
        return "published"
    if key in situation.active:
        return _in_queue(state, key)
    if key in situation.damaged:
        return f"damaged: {situation.damaged[key]}"
    if key in state.decision.blocked:
        return f"not started: {state.decision.blocked[key]}"
    if situation.stopped:
        return "not started: the run was cancelled"
    missing = [read for read in state.plan.shards[key].reads if read not in situation.done]
    if missing:
        return f"waits for {len(missing)} shards that it reads; the first is {missing[0]}"
    if situation.failures.get(key):
        return "failed; it will be tried again"
    if situation.active:
        return "waits for its turn: limits on the queue, or the first tasks of its stage"
    return "not started"


def _in_queue(state: State, key: str) -> str:
    for submission in reversed(state.submissions):
        job = state.jobs.get(submission.number)
        for task in state.queued:
            if (
                job
                and task.name == submission.name
                and task.index is not None
                and key in submission.tasks[task.index]
            ):
                reason = f" ({task.reason})" if task.reason not in {"", "None"} else ""
                return f"in the queue as {task.job_id}_{task.index}: {task.state}{reason}"
    return "being worked on, or submitted at this moment"


def _provenance(record: Record) -> Iterator[str]:
    started = float(record.attempt.get("started", 0))
    made_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started))
    yield f"made on {_node(record)} at {made_at} in {record.seconds:.1f} s by code {record.code}"
    yield f"data: {record.data} ({record.num_bytes} bytes, digest {record.digest[:12]})"


def _node(record: Record) -> str:
    return str(record.attempt.get("node") or record.attempt.get("host", "?"))


def _end_of(part: LogPart | None) -> list[str]:
    """Return the path of a log and the last lines of a part of it."""
    if part is None:
        return []
    return [f"log: {part.path}", *(f"    {line}" for line in part.last_lines(LOG_LINES))]


def _outcome(failure: Failure | None, note: str) -> str:
    if failure is None:
        return note or "no failure recorded"
    node = f" on {failure.node}" if failure.node else ""
    return f"{failure.kind}{node}: {failure.message}"


def _advice(state: State, key: str, failures: dict[int, Failure]) -> str:
    if key in state.situation.active:
        return "nothing: it is queued or running"
    if key in state.situation.damaged:
        return DAMAGE_ADVICE
    if failures:
        last = failures[max(failures)]
        return REMEDIES[last.kind].advice
    if state.situation.active:
        return "nothing: it starts by itself"
    missing = [read for read in state.plan.shards[key].reads if read not in state.situation.done]
    if missing:
        return f"status.py RUN --explain {missing[0]}"
    until = state.config.until
    later = state.plan.shards[key].stage not in state.plan.stages_until(until)
    return f"run sweep.py without until={until}" if later else "run sweep.py again"
