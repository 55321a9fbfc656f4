"""`advance(run)`: the one function that moves a run.

It reads how the run stands (`observe.py`), decides (`decide.py`, pure) and submits what may start
now (`submission.py`). `sweep.py`, `rerun.py`, the gate after every array and `sweep.py --watch` all
call it; the local executor (`local.py`) observes and decides the same way.
"""

import os
import sys
import time
from collections.abc import Iterator

from kdhpc.cluster import failures, runs, slurm
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission, launcher_gone
from kdhpc.cluster.observe import State, observe
from kdhpc.cluster.runs import Run
from kdhpc.cluster.submission import submit
from kdhpc.errors import BusyError
from kdhpc.storage.files import disk_errors


def advance(run: Run) -> State:
    """Submit to Slurm what the last request wants and may start now; how the run then stands.

    What Slurm refuses is recorded as a failure of its shards, so that the rest goes on.

    Raises:
        BusyError: if other launchers kept claiming submissions before this one could.
        ClusterError: if Slurm does not answer, or refused everything.
        DamagedError: if the disk is full.
    """
    with disk_errors(run.path):
        return _advance(run)


def _advance(run: Run) -> State:
    ledger = Ledger(run.path)
    room: int | None = None
    num_submitted, refusals = 0, []
    for _ in range(50):
        state = _look(run, ledger, room)
        if not state.decision.batches:
            break
        for batch in state.decision.batches:
            try:
                if not submit(run, ledger, state, batch):
                    time.sleep(0.2)  # another launcher was first: look again
                    break
                num_submitted += 1
            except slurm.OverLimitError as error:
                if len(batch.tasks) == 1:
                    if num_submitted or _others_queued(state):
                        # A gate that is in the queue goes on when there is room.
                        return _look(run, ledger, room)
                    raise
                room = (len(batch.tasks) + 1) // 2 + state.policy.per_array
                print(f"{error}; trying {room}", file=sys.stderr)
                break
            except slurm.RefusedError as error:
                refusals.append(error)
    else:
        raise BusyError(f"{run.path}: another launcher is submitting; look again with status.py")
    if refusals and not num_submitted:
        raise refusals[0]
    return state


def _look(run: Run, ledger: Ledger, room: int | None) -> State:
    """Observe, after putting right what launchers and tasks that died have left."""
    state = _observe(run, room)
    if _settle_orphans(ledger, state) | _explain_ended(run, ledger, state):
        state = _observe(run, room)
    settled = {
        name
        for submission in state.submissions
        if (job := state.jobs.get(submission.number)) and job.job_id
        for name in submission.job_names
    }
    held = {
        task.job_id
        for task in state.queued
        if task.name in settled and task.reason in slurm.HELD_REASONS
    }
    if held and not state.situation.stopped:
        slurm.release(sorted(held))
    return state


def _observe(run: Run, room: int | None) -> State:
    """Observe by the config of the last request, even if that comes in between."""
    while True:
        number, config, plan = runs.current(run)
        state = observe(run, config, plan, room=room)
        if state.request.number == number:
            return state


def _others_queued(state: State) -> bool:
    """Whether a gate of this run is in the queue beside the one that may be asking."""
    gates = {job.gate_id for job in state.jobs.values()} - {None, os.environ.get("SLURM_JOB_ID")}
    return any(task.job_id in gates for task in state.queued)


def _settle_orphans(ledger: Ledger, state: State) -> bool:
    """Give up submissions whose launcher died between claiming and recording; cancel their jobs."""
    settled = False
    for submission in state.submissions:
        job = state.jobs.get(submission.number)
        if job is None and launcher_gone(submission):
            job = Job(job_id=None, note="its launcher died")
            if not ledger.settle(submission.number, job):
                continue  # it lives, and was just recorded
            settled = True
        if job is not None and job.job_id is None:
            names = submission.job_names
            slurm.cancel(sorted({task.job_id for task in state.queued if task.name in names}))
    return settled


def _explain_ended(run: Run, ledger: Ledger, state: State) -> bool:
    """Write down why shards left the queue without output and without a word."""
    silent = _silent(ledger, state)
    job_ids = sorted({job_id for job_id, _ in silent})
    ended = slurm.accounting(job_ids)
    if silent.keys() - ended.keys():
        time.sleep(2.5)  # accounting lags
        ended = slurm.accounting(job_ids)
    written = False
    for (job_id, index), (submission, keys) in silent.items():
        said = ended.get((job_id, index), slurm.Ended(state="", exit_code="", node=""))
        for failure in _failures_of(run, ledger, submission, index, keys, said):
            written |= ledger.add_failure(failure)
    return written


def _silent(ledger: Ledger, state: State) -> dict[tuple[str, int], tuple[Submission, list[str]]]:
    """By job id and index, the tasks that are gone, and their shards that nothing is known of."""
    known = {(failure.submission, failure.key) for failure in ledger.failures()}
    present = {(task.name, task.index) for task in state.queued}
    newest = {key: s.number for s in state.submissions for key in s.keys}
    silent: dict[tuple[str, int], tuple[Submission, list[str]]] = {}
    for submission in state.submissions:
        job = state.jobs.get(submission.number)
        if job is None or job.job_id is None:
            continue
        for index, task in enumerate(submission.tasks):
            keys = [
                key
                for key in task
                if key in state.plan.shards
                and key not in state.scan.records
                and newest[key] == submission.number
                and (submission.number, key) not in known
            ]
            if keys and (submission.name, index) not in present:
                silent[job.job_id, index] = submission, keys
    return silent


def _failures_of(
    run: Run,
    ledger: Ledger,
    submission: Submission,
    index: int,
    keys: list[str],
    said: slurm.Ended,
) -> Iterator[Failure]:
    """The failures of a task that is gone: of the shard that it had begun last, or of all.

    A task that died between two shards is nobody's failure.
    """
    events = ledger.last_events(submission.number, index)
    kind, message = failures.of_slurm(said.state, said.exit_code, started=bool(events))
    if "stopped" in events.values():
        # Slurm kills the other ranks when the first one leaves, and reports that.
        kind, message = "STOPPED", "was told to stop and did"
    last = list(events)[-1:]
    for key in keys if kind in {"CANCELLED", "LAUNCH"} or not last else last:
        if key in keys:
            yield Failure(
                key=key,
                kind=kind,
                message=message,
                fingerprint=kind,
                submission=submission.number,
                log=str(ledger.log_path(submission.number, index)),
                node=said.node,
                time=time.time(),
                got_further=run.checkpoint_since(key, submission.time),
            )
