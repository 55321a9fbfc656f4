"""`advance(run)`: the one function that moves a run.

It reads how the run stands (`observe.py`), decides (`decide.py`, pure) and submits what may start
now (`submission.py`). `sweep.py`, `rerun.py`, the gate after every array and `sweep.py --watch` all
call it; the local executor (`local.py`) observes and decides the same way.
"""

import os
import sys
import time

from kdhpc.artifacts import RunFolder, disk_errors
from kdhpc.cluster import failures, runs, slurm
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission, launcher_gone
from kdhpc.cluster.observe import State, observe
from kdhpc.cluster.submission import submit
from kdhpc.errors import BusyError


def advance(run: RunFolder) -> State:
    """Submit to Slurm what the last request wants and may start now; how the run then stands.

    What Slurm refuses is recorded as a failure of its shards, so that the rest goes on.

    Raises:
        BusyError: if other launchers kept claiming submissions before this one could.
        ClusterError: if Slurm does not answer, or refused everything.
        DamagedError: if the disk is full.
    """
    with disk_errors(run.path):
        return _advance(run)


def _advance(run: RunFolder) -> State:
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


def _look(run: RunFolder, ledger: Ledger, room: int | None) -> State:
    """Observe, after putting right what launchers and tasks that died have left."""
    state = _observe(run, room)
    if _settle_orphans(ledger, state) | _explain_ended(run, ledger, state):
        state = _observe(run, room)
    settled = {s.name for s in state.submissions if (j := state.jobs.get(s.number)) and j.job_id}
    held = {
        task.job_id
        for task in state.queued
        if task.name.removeprefix("gate-") in settled and task.reason in slurm.HELD_REASONS
    }
    if held and not state.situation.stopped:
        slurm.release(sorted(held))
    return state


def _observe(run: RunFolder, room: int | None) -> State:
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
            names = {submission.name, f"gate-{submission.name}"}
            slurm.cancel(sorted({task.job_id for task in state.queued if task.name in names}))
    return settled


def _explain_ended(run: RunFolder, ledger: Ledger, state: State) -> bool:
    """Write down why shards left the queue without output and without a word."""
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
    job_ids = sorted({job_id for job_id, _ in silent})
    ended = slurm.accounting(job_ids)
    if silent.keys() - ended.keys():
        time.sleep(2.5)  # accounting lags
        ended = slurm.accounting(job_ids)
    written = False
    for (job_id, index), (submission, keys) in silent.items():
        said = ended.get((job_id, index), slurm.Ended(state="", exit_code="", node=""))
        log = ledger.log_path(submission.number, index)
        text = log.read_text(errors="replace") if log.exists() else ""
        started = [key for key in submission.tasks[index] if f"{key}: started" in text]
        kind, message = failures.of_slurm(said.state, said.exit_code, started=bool(started))
        if any(text.rfind(f"{key}: stopped") > text.rfind(f"{key}: started") for key in started):
            # Slurm kills the other ranks when the first one leaves, and reports that.
            kind, message = "STOPPED", "was told to stop and did"
        for key in keys if kind in {"CANCELLED", "LAUNCH"} or not started else started[-1:]:
            if key not in keys:
                continue  # it died between two shards: nobody's fault
            got_further = run.checkpoint_since(key, submission.time)
            further = failures.GOT_FURTHER if got_further else ""
            written |= ledger.add_failure(
                Failure(
                    key=key,
                    kind=kind,
                    message=f"{message}{further}",
                    fingerprint=kind,
                    submission=submission.number,
                    log=str(log),
                    node=said.node,
                    time=time.time(),
                )
            )
    return written
