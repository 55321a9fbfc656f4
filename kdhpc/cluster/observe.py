"""Observe a run at one moment: its submissions, the queue and its records, read in that order.

If they disagree, a published record counts more than squeue, and squeue more than sacct. Nothing is
written here.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kdhpc.cluster import eta, failures, slurm
from kdhpc.cluster.decide import Decision, Policy, Situation, decide
from kdhpc.cluster.ledger import Failure, Job, Ledger, Request, Submission, launcher_gone
from kdhpc.cluster.runs import Run
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Plan
from kdhpc.storage.files import stands_for
from kdhpc.storage.run_folder import Scan
from kdhpc.types import Json

FORGETS_S = 600.0
"""A controller that starts again may have lost what it did so many seconds before, at most: its
time to save its state and the time that it was down."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What was observed of a run at one moment, and what was decided from it."""

    request: Request
    config: RunConfig
    plan: Plan
    scan: Scan
    situation: Situation
    submissions: tuple[Submission, ...]
    jobs: Mapping[int, Job]
    """Outcomes of submissions, by submission number."""
    queued: tuple[slurm.Queued, ...]
    """Array tasks and gates of this run that are in the queue."""
    running: frozenset[str]
    """Shards whose task is running, also those that wait for their turn inside it."""
    to_release: frozenset[str]
    """Ids of held jobs that a launcher left behind, or that Slurm could not start."""
    held_by_user: frozenset[str]
    """Ids of jobs that somebody has held."""
    decision: Decision
    policy: Policy
    queue_error: str = ""
    """Why the queue is unknown, if Slurm did not answer; then all of this comes from the disk."""

    @property
    def missing(self) -> list[str]:
        """Keys of planned shards without a result."""
        return [key for key in self.plan.shards if key not in self.situation.done]

    @property
    def finished(self) -> bool:
        """Whether every shard of the stages that are asked for has a result."""
        asked_for = set(self.plan.stages_until(self.config.until))
        return not any(self.plan.shards[key].stage in asked_for for key in self.missing)


def observe(
    run: Run,
    config: RunConfig,
    plan: Plan,
    *,
    local_active: frozenset[str] = frozenset(),
    policy: Policy | None = None,
    with_queue: bool = True,
    queue: Callable[[], Sequence[slurm.Queued]] | None = None,
    room: int | None = None,
) -> State:
    """Observe a run with one read of the ledger, one squeue and one scan of the records.

    They are read in this order, so that a shard that ends meanwhile is seen as done, never as lost.

    Args:
        run: the run folder.
        config: config of its last request.
        plan: plan of that config.
        local_active: shards that the local executor is working on.
        policy: limits and packing; by default from the config and the queue.
        with_queue: False to use only what is on disk.
        queue: returns this user's jobs; by default Slurm is asked.
        room: maximum number of jobs to submit, after Slurm refused more.

    Raises:
        ClusterError: if Slurm is asked for the queue and does not answer.
        DamagedError: if a file of the ledger is damaged.
    """
    ledger = Ledger(run.path)
    requests = ledger.requests()
    submissions, jobs = ledger.submissions(), ledger.jobs()
    uses_slurm = with_queue and any(job.job_id for job in jobs.values())
    uses_slurm |= with_queue and requests[-1].executor == "slurm"
    job_names = {name for submission in submissions for name in submission.job_names}
    all_jobs = (queue or slurm.queue)() if uses_slurm else []
    queued = tuple(task for task in all_jobs if task.name in job_names)
    to_release, held_by_user = _held(submissions, jobs, queued, ledger.released_at())
    scan = _only_this_plan(run.scan(), plan)
    done = _done(run, plan, scan)
    counted_failures = _counted(plan, requests, submissions, ledger.failures(), done)
    active = local_active | _active(submissions, jobs, queued)
    situation = Situation(
        done=done,
        active=active,
        failures=counted_failures,
        free_failures=_free(counted_failures, submissions, done),
        damaged={k: v for k, v in scan.damaged.items() if k in plan.shards and k not in active},
        factors=_factors(plan, scan),
        overrides=_overrides(plan, requests),
        stopped=requests[-1].kind == "cancel",
        only=_asked_for_since_cancel(plan, requests),
    )
    if policy is None:
        policy = _policy(config, queued) if uses_slurm else Policy.local(config)
    if room is not None:
        policy = replace(policy, max_tasks=min(policy.max_tasks, room))
    return State(
        request=requests[-1],
        config=config,
        plan=plan,
        scan=scan,
        situation=situation,
        submissions=tuple(submissions),
        jobs=jobs,
        queued=queued,
        running=local_active | _running(submissions, jobs, queued),
        to_release=to_release,
        held_by_user=held_by_user,
        decision=decide(plan, situation, policy),
        policy=policy,
    )


def _only_this_plan(scan: Scan, plan: Plan) -> Scan:
    """Treat records that were made with other settings than the plan's as damaged."""
    others = {
        key: f"{record.data}: made with other settings (recipe {record.recipe[:12]}), which "
        "sweep.py takes if they are typed again"
        for key, record in scan.records.items()
        if key in plan.shards and record.recipe != plan.shards[key].recipe
    }
    records = {key: record for key, record in scan.records.items() if key not in others}
    return Scan(records=records, damaged={**scan.damaged, **others})


def _done(run: Run, plan: Plan, scan: Scan) -> frozenset[str]:
    """Return the shards with a record, to which their stage's fixed name, if any, must refer."""
    done = scan.records.keys() & plan.shards.keys()
    for stage in plan.stages:
        if alias := run.alias_path(stage):
            done -= {
                shard.key
                for shard in plan.stage(stage)
                if shard.key in done and not stands_for(alias, scan.records[shard.key].data)
            }
    return frozenset(done)


def _active(
    submissions: Sequence[Submission], jobs: Mapping[int, Job], queued: Sequence[slurm.Queued]
) -> frozenset[str]:
    # Tasks are found by name, because a controller that lost its newest state reuses job ids.
    present = {(task.name, task.index) for task in queued}
    being_submitted = {
        key
        for submission in submissions
        if submission.number not in jobs and not launcher_gone(submission)
        for key in submission.keys
    }
    return frozenset(being_submitted | _keys_in(present, submissions, jobs))


def _running(
    submissions: Sequence[Submission], jobs: Mapping[int, Job], queued: Sequence[slurm.Queued]
) -> frozenset[str]:
    started = {(task.name, task.index) for task in queued if task.state == "RUNNING"}
    return frozenset(_keys_in(started, submissions, jobs))


def _held(
    submissions: Sequence[Submission],
    jobs: Mapping[int, Job],
    queued: Sequence[slurm.Queued],
    released_at: Mapping[int, float],
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the ids of held jobs: those to release, and those that somebody has held.

    A job that was released is held by somebody, unless the controller has forgotten its release.
    """
    numbers = {
        name: submission.number
        for submission in submissions
        if (job := jobs.get(submission.number)) and job.job_id
        for name in submission.job_names
    }
    to_release: set[str] = set()
    by_user: set[str] = set()
    booted: float | None = None
    for task in queued:
        if task.name in numbers and task.reason == slurm.HELD_BY_USER:
            released = released_at.get(numbers[task.name])
            if released is not None and booted is None:
                booted = slurm.boot_time()
            forgotten = released is None or 0 < (booted or 0.0) - released < FORGETS_S
            (to_release if forgotten else by_user).add(task.job_id)
        elif task.name in numbers and task.reason in slurm.HELD_BY_SLURM:
            to_release.add(task.job_id)
    return frozenset(to_release), frozenset(by_user)


def _keys_in(
    tasks: set[tuple[str, int | None]], submissions: Sequence[Submission], jobs: Mapping[int, Job]
) -> set[str]:
    """Return the shards of tasks, which are given by job name and array index."""
    return {
        key
        for submission in submissions
        if (job := jobs.get(submission.number)) and job.job_id
        for index, keys in enumerate(submission.tasks)
        if (submission.name, index) in tasks
        for key in keys
    }


def _counted(
    plan: Plan,
    requests: Sequence[Request],
    submissions: Sequence[Submission],
    all_failures: Iterable[Failure],
    done: frozenset[str],
) -> dict[str, list[Failure]]:
    """Return the failures of each shard since somebody last asked for it, oldest first."""
    request_of = {submission.number: submission.request for submission in submissions}
    counted: dict[str, list[Failure]] = {}
    for failure in all_failures:
        if failure.key in plan.shards and failure.key not in done:
            last_asked = max((r.number for r in requests if r.covers(failure.key)), default=0)
            if request_of.get(failure.submission, 0) >= last_asked:
                counted.setdefault(failure.key, []).append(failure)
    return counted


def _free(
    counted: Mapping[str, Sequence[Failure]],
    submissions: Sequence[Submission],
    done: frozenset[str],
) -> dict[str, int]:
    """Count the failures of each shard that made progress and therefore cost no attempt.

    Progress is a newer checkpoint of its training, or another published shard of the same task, if
    the task had more shards than processes. Otherwise each shard had a process of its own.
    """
    numbers = {failure.submission for of_shard in counted.values() for failure in of_shard}
    shared_tasks = {
        (submission.number, key): task
        for submission in submissions
        if submission.number in numbers
        for task in submission.tasks
        if len(task) > submission.pack
        for key in task
    }

    def is_free(failure: Failure) -> bool:
        task = shared_tasks.get((failure.submission, failure.key), ())
        progressed = failure.got_further or any(key in done for key in task)
        return progressed and failures.REMEDIES[failure.kind].free_with_progress

    free = {key: sum(map(is_free, of_shard)) for key, of_shard in counted.items()}
    return {key: count for key, count in free.items() if count}


def _factors(plan: Plan, scan: Scan) -> dict[str, float]:
    """Return what the done shards of each stage took by what was estimated; 1 if there are none."""
    took = eta.took(scan.records.values(), plan)
    return {s: math.exp(took[s].log_factor) if s in took else 1.0 for s in plan.stages}


def _overrides(plan: Plan, requests: Iterable[Request]) -> dict[str, Mapping[str, Json]]:
    """Return by shard the resources that reruns asked for since the last sweep."""
    overrides: dict[str, Mapping[str, Json]] = {}
    for request in requests:
        if request.kind == "sweep":
            overrides = {}
        if request.resources:
            for key in plan.shards:
                if request.covers(key):
                    overrides[key] = {**overrides.get(key, {}), **request.resources}
    return overrides


def _asked_for_since_cancel(plan: Plan, requests: Sequence[Request]) -> frozenset[str] | None:
    """Return the shards that rerun asked for after a cancel; None if the whole run may start."""
    asked: set[str] = set()
    for request in reversed(requests):
        if request.kind == "cancel":
            return frozenset(asked)
        if request.kind == "sweep" or (request.stage is None and request.keys is None):
            return None
        asked.update(key for key in plan.shards if request.covers(key))
    return None


def _policy(config: RunConfig, queued: Iterable[slurm.Queued]) -> Policy:
    # A gate that runs this is about to end, so its own job is not counted.
    num_queued = sum(task.job_id != os.environ.get("SLURM_JOB_ID") for task in queued)
    max_array = config.slurm.max_array or slurm.max_array_size()
    return Policy.slurm(config, max_array=max_array, num_queued=num_queued)
