"""`advance(run)`: the one function that moves a run on.

It reads the state of the run (`observe.py`), decides what may start now (`decide.py`, pure) and
submits that (`submission.py`). `sweep.py`, `rerun.py`, the gate after every array and
`sweep.py --watch` all call it; the local executor (`local.py`) observes and decides the same way.
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
    """Submit to Slurm everything that the last request asks for and that may start now.

    An array that Slurm refuses is recorded as a failure of its shards, and the rest goes on.

    Returns:
        The state of the run afterwards.

    Raises:
        BusyError: if other launchers claimed every submission before this one could.
        ClusterError: if Slurm does not answer, or refused everything.
        DamagedError: if the disk is full or cannot be written.
    """
    with disk_errors(run.path):
        requests = Ledger(run.path).requests()
        if requests and requests[-1].executor == "local":
            return _observe(run, None)  # this is a gate of an earlier request
        return _advance(run)


def wait_for_cancelled(run: Run, limit_s: float = 180.0) -> None:
    """Wait until the jobs that the last request cancelled have left the queue.

    As long as they end, their shards count as active, and nobody would submit them again later.

    Raises:
        BusyError: if they are still there after `limit_s` seconds.
        ClusterError: if Slurm does not answer.
    """
    ledger = Ledger(run.path)
    requests = ledger.requests()
    if not requests or requests[-1].kind != "cancel":
        return
    names = {name for submission in ledger.submissions() for name in submission.job_names}
    deadline = time.monotonic() + limit_s
    while ending := sorted({task.job_id for task in slurm.queue() if task.name in names}):
        if time.monotonic() > deadline:
            raise BusyError(
                f"{run.path}: the cancelled jobs {', '.join(ending)} have not ended yet; type the "
                "same again when they have"
            )
        time.sleep(1)


def _advance(run: Run) -> State:
    ledger = Ledger(run.path)
    room: int | None = None
    num_submitted, refusals = 0, []
    for _ in range(50):
        state = _settle_and_observe(run, ledger, room)
        if not state.decision.batches:
            break
        for batch in state.decision.batches:
            try:
                if not submit(run, ledger, state, batch):
                    time.sleep(0.2)  # another launcher was first: observe again
                    break
                num_submitted += 1
            except slurm.OverLimitError as error:
                if len(batch.tasks) == 1:
                    if num_submitted or _others_queued(state):
                        # A gate that is in the queue submits more when the queue has room again.
                        return _settle_and_observe(run, ledger, room)
                    raise
                room = (len(batch.tasks) + 1) // 2 + state.policy.per_array
                print(f"{error}; trying {room}", file=sys.stderr)
                break
            except slurm.RefusedError as error:
                refusals.append(error)
    else:
        raise BusyError(f"{run.path}: another launcher is submitting; look at it with status.py")
    if refusals and not num_submitted:
        raise refusals[0]
    return state


def _settle_and_observe(run: Run, ledger: Ledger, room: int | None) -> State:
    """Settle what dead launchers and tasks left behind, release held jobs, and observe the run."""
    state = _observe(run, room)
    if _settle_orphans(ledger, state) | _record_unexplained(run, ledger, state):
        state = _observe(run, room)
    if state.to_release and not state.situation.stopped:
        slurm.release(sorted(state.to_release))
        for number, job in state.jobs.items():
            if job.job_id in state.to_release:
                ledger.note_released(number)
    return state


def _observe(run: Run, room: int | None) -> State:
    """Observe by the config of the last request, even if a new request arrives meanwhile."""
    while True:
        number, config, plan = runs.current(run)
        state = observe(run, config, plan, room=room)
        if state.request.number == number:
            return state


def _others_queued(state: State) -> bool:
    """Return whether a gate of this run is in the queue, other than the gate that may run this."""
    gates = {job.gate_id for job in state.jobs.values()} - {None, os.environ.get("SLURM_JOB_ID")}
    return any(task.job_id in gates for task in state.queued)


def _settle_orphans(ledger: Ledger, state: State) -> bool:
    """Give up submissions whose launcher died before it recorded the job ids; cancel their jobs."""
    settled = False
    for submission in state.submissions:
        job = state.jobs.get(submission.number)
        if job is None and launcher_gone(submission):
            job = Job(job_id=None, note="its launcher died")
            if not ledger.settle(submission.number, job):
                continue  # the launcher is alive and has just recorded the job ids
            settled = True
        if job is not None and job.job_id is None:
            names = submission.job_names
            slurm.cancel(sorted({task.job_id for task in state.queued if task.name in names}))
    return settled


def _record_unexplained(run: Run, ledger: Ledger, state: State) -> bool:
    """Record a failure for shards whose task left the queue without output or failure.

    Returns:
        Whether any failure was recorded.
    """
    unexplained = _unexplained(ledger, state)
    ended = slurm.remembered({submission.name for submission, _ in unexplained.values()})
    for wait_s in (0.0, 2.5):  # accounting lags behind the queue
        if forgotten := unexplained.keys() - ended.keys():
            time.sleep(wait_s)
            ended = slurm.accounting(sorted({job_id for job_id, _ in forgotten})) | ended
    recorded = False
    for (job_id, index), (submission, keys) in unexplained.items():
        task_end = ended.get((job_id, index), slurm.Ended(state="", exit_code="", node=""))
        for failure in _failures_of(run, ledger, submission, index, keys, task_end):
            recorded |= ledger.add_failure(failure)
    return recorded


def _unexplained(
    ledger: Ledger, state: State
) -> dict[tuple[str, int], tuple[Submission, list[str]]]:
    """Find tasks that left the queue with shards that have neither output nor failure.

    Returns:
        The submission and those shards of each such task, by job id and array index.
    """
    known = {(failure.submission, failure.key) for failure in ledger.failures()}
    present = {(task.name, task.index) for task in state.queued}
    newest = {key: s.number for s in state.submissions for key in s.keys}
    unexplained: dict[tuple[str, int], tuple[Submission, list[str]]] = {}
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
                unexplained[job.job_id, index] = submission, keys
    return unexplained


def _failures_of(
    run: Run,
    ledger: Ledger,
    submission: Submission,
    index: int,
    keys: list[str],
    task_end: slurm.Ended,
) -> Iterator[Failure]:
    """Yield the failures of a task that left the queue.

    Usually only the shard that a process began last has failed, and none if the process died
    between two shards. If the task was cancelled or never started, all its shards have.
    """
    events = ledger.last_events(submission.number, index)
    kind, message = failures.of_slurm(
        task_end.state,
        task_end.exit_code,
        started=bool(events),
        cancelled=any(
            request.kind == "cancel" and request.number > submission.request
            for request in ledger.requests()
        ),
    )
    begun = [key for key, event in events.items() if event != "ended"] or list(events)[-1:]
    for key in keys if kind in {"CANCELLED", "LAUNCH"} or not begun else begun:
        if key in keys:
            # Slurm kills the other ranks when the first one leaves, and reports that as the state.
            # A user's scancel tells a task to stop too, and stays a cancel.
            stopped = events.get(key) == "stopped" and kind != "CANCELLED"
            yield Failure(
                key=key,
                kind="STOPPED" if stopped else kind,
                message="was told to stop and did" if stopped else message,
                fingerprint="STOPPED" if stopped else kind,
                submission=submission.number,
                log=str(ledger.log_of(submission.number, index, key)),
                node=task_end.node,
                time=time.time(),
                got_further=run.checkpoint_since(key, submission.time),
            )
