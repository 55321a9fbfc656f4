"""Explain the state of one shard: `status.py RUN --explain SHARD`."""

import difflib
import time
from collections.abc import Iterator
from pathlib import Path

from kdhpc.cluster.failures import REMEDIES, STARTED
from kdhpc.cluster.ledger import Failure, Ledger
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.errors import InputError
from kdhpc.storage.run_folder import Record

LOG_LINES = 20


def explain(run: Run, state: State, key: str) -> list[str]:
    """Explain a shard to people: its state, every attempt, its own part of the log, what to do.

    Returns:
        Lines of text.

    Raises:
        InputError: if no such shard is planned.
    """
    if key not in state.plan.shards:
        near = difflib.get_close_matches(key, state.plan.shards, n=1, cutoff=0.0)
        raise InputError(
            f"--explain {key}: no such shard; expected STAGE/ARM/NAME, such as {near[0]}"
        )
    lines = [f"{key}: {_state_of(state, key)}"]
    record = state.scan.records.get(key)
    if record is not None:
        lines += _provenance(record)
    ledger = Ledger(run.path)
    failures = {f.submission: f for f in ledger.failures() if f.key == key}
    for submission in state.submissions:
        for index, task in enumerate(submission.tasks):
            if key in task:
                job = state.jobs.get(submission.number)
                where = f"job {job.job_id}_{index}" if job and job.job_id else "no job"
                note = job.note if job and job.note else ""
                failure = failures.get(submission.number)
                lines.append(
                    f"submission {submission.number:04d} ({where}): {_outcome(failure, note)}"
                )
                log = ledger.log_path(submission.number, index)
    if failures or key in state.situation.active:
        lines.append(f"log: {log}")
        lines += [f"    {line}" for line in own_lines(log, key)]
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
    attempt = record.attempt
    where = attempt.get("node") or attempt.get("host", "?")
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(attempt.get("started", 0))))
    yield f"made on {where} at {started} in {record.seconds:.1f} s by code {record.code}"
    yield f"data: {record.data} ({record.num_bytes} bytes, digest {record.digest[:12]})"


def _outcome(failure: Failure | None, note: str) -> str:
    if failure is None:
        return note or "no failure recorded"
    node = f" on {failure.node}" if failure.node else ""
    return f"{failure.kind}{node}: {failure.message}"


def _advice(state: State, key: str, failures: dict[int, Failure]) -> str:
    if key in state.situation.active:
        return "nothing: it is queued or running"
    if key in state.situation.damaged:
        return "run sweep.py or rerun.py, which make it again"
    if failures:
        last = failures[max(failures)]
        return REMEDIES[last.kind].advice
    if state.situation.active:
        return "nothing: it starts by itself"
    missing = [read for read in state.plan.shards[key].reads if read not in state.situation.done]
    return f"status.py RUN --explain {missing[0]}" if missing else "run sweep.py again"


def own_lines(log: Path, key: str) -> list[str]:
    """Return the last lines that a shard's last attempt wrote to the log of its task."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return []
    starts = [i for i, line in enumerate(lines) if line == f"{key}{STARTED}"]
    lines = lines[starts[-1] :] if starts else lines
    stops = [i for i, line in enumerate(lines) if line.endswith(STARTED) and i]
    return [line for line in lines[: stops[0] if stops else None] if line.strip()][-LOG_LINES:]
