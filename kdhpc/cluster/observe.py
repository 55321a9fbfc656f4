"""How a run stands at one moment: what was submitted, the queue, the records, read in that order.

Published records win over squeue, squeue over sacct, sacct over nothing. Nothing is written here.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kdhpc.cluster import failures, slurm
from kdhpc.cluster.decide import Decision, Policy, Situation, decide
from kdhpc.cluster.ledger import Failure, Job, Ledger, Request, Submission, launcher_gone
from kdhpc.cluster.runs import Run
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Plan
from kdhpc.storage.files import stands_for
from kdhpc.storage.run_folder import Scan
from kdhpc.types import Json


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything about a run at one moment."""

    request: Request
    config: RunConfig
    plan: Plan
    scan: Scan
    situation: Situation
    submissions: tuple[Submission, ...]
    jobs: Mapping[int, Job]
    """By submission number, what became of it."""
    queued: tuple[slurm.Queued, ...]
    """Array tasks and gates of this run in the queue."""
    running: frozenset[str]
    """Shards whose task runs; the others of a task wait inside it."""
    decision: Decision
    policy: Policy
    queue_error: str = ""
    """Why the queue is not known, if Slurm did not answer: then all this comes from the disk."""

    @property
    def missing(self) -> list[str]:
        """Planned shards without a result."""
        return [key for key in self.plan.shards if key not in self.situation.done]


def observe(
    run: Run,
    config: RunConfig,
    plan: Plan,
    *,
    local_active: frozenset[str] = frozenset(),
    policy: Policy | None = None,
    with_queue: bool = True,
    room: int | None = None,
) -> State:
    """Read a run: ledger, one squeue, one scan of the records.

    In this order, so that a shard that ends meanwhile is seen as done, never as lost.

    Args:
        run: its folder.
        config: of its last request.
        plan: of that config.
        local_active: shards that the local executor is working on.
        policy: limits and packing; from the config and the queue if not given.
        with_queue: False to go by the disk alone.
        room: tasks that may be submitted at most, after Slurm refused more.
    """
    ledger = Ledger(run.path)
    requests = ledger.requests()
    submissions, jobs = ledger.submissions(), ledger.jobs()
    uses_slurm = with_queue and any(job.job_id for job in jobs.values())
    uses_slurm |= with_queue and requests[-1].executor == "slurm"
    ours = {name for submission in submissions for name in submission.job_names}
    queued = tuple(task for task in slurm.queue() if task.name in ours) if uses_slurm else ()
    scan = _of_this_plan(run.scan(), plan)
    done = _done(run, plan, scan)
    failures_that_count = _counted(plan, requests, submissions, ledger.failures(), done)
    active = local_active | _active(submissions, jobs, queued)
    situation = Situation(
        done=done,
        active=active,
        failures=failures_that_count,
        free_failures=_free(failures_that_count, submissions, done),
        damaged={k: v for k, v in scan.damaged.items() if k in plan.shards and k not in active},
        seconds_per_work=_seconds_per_work(run, config, plan, scan),
        overrides=_overrides(plan, requests),
        stopped=requests[-1].kind == "cancel",
        only=_asked_for_since_cancel(plan, requests),
    )
    if policy is None:
        policy = _policy(config, queued) if uses_slurm else Policy.local(config.slurm)
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
        decision=decide(plan, situation, policy),
        policy=policy,
    )


def _of_this_plan(scan: Scan, plan: Plan) -> Scan:
    """Records with other settings than the plan's are not taken for good."""
    others = {
        key: f"{record.data}: made with other settings (recipe {record.recipe[:12]})"
        for key, record in scan.records.items()
        if key in plan.shards and record.recipe != plan.shards[key].recipe
    }
    records = {key: record for key, record in scan.records.items() if key not in others}
    return Scan(records=records, damaged={**scan.damaged, **others})


def _done(run: Run, plan: Plan, scan: Scan) -> frozenset[str]:
    """Shards with a record; of stages with a fixed name, those that it stands for."""
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
    # By name: a controller that lost its newest state gives ids out again.
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


def _keys_in(
    tasks: set[tuple[str, int | None]], submissions: Sequence[Submission], jobs: Mapping[int, Job]
) -> set[str]:
    """Shards of tasks, which are given as job name and array index."""
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
    found: Iterable[Failure],
    done: frozenset[str],
) -> dict[str, list[Failure]]:
    """By shard, its failures since somebody last asked for it."""
    request_of = {submission.number: submission.request for submission in submissions}
    counted: dict[str, list[Failure]] = {}
    for failure in found:
        if failure.key in plan.shards and failure.key not in done:
            asked = max((r.number for r in requests if r.covers(failure.key)), default=0)
            if request_of.get(failure.submission, 0) >= asked:
                counted.setdefault(failure.key, []).append(failure)
    return counted


def _free(
    counted: Mapping[str, Sequence[Failure]],
    submissions: Sequence[Submission],
    done: frozenset[str],
) -> dict[str, int]:
    """By shard, how many of its failures had made progress and cost no attempt.

    That is: a newer checkpoint of its training, or another shard that its task published.
    """
    tasks = {
        (submission.number, key): task
        for submission in submissions
        for task in submission.tasks
        for key in task
    }

    def is_free(failure: Failure) -> bool:
        task = tasks.get((failure.submission, failure.key), ())
        progressed = failure.got_further or any(key in done for key in task)
        return progressed and failures.REMEDIES[failure.kind].free_with_progress

    free = {key: sum(map(is_free, found)) for key, found in counted.items()}
    return {key: count for key, count in free.items() if count}


def _seconds_per_work(run: Run, config: RunConfig, plan: Plan, scan: Scan) -> dict[str, float]:
    """By stage, measured where a shard is done, else estimated."""
    rates: dict[str, float] = {}
    for stage in run.pipeline.stages:
        records = [scan.records[s.key] for s in plan.stage(stage.name) if s.key in scan.records]
        work = sum(plan.shards[record.key].work for record in records)
        seconds = sum(record.seconds for record in records)
        rates[stage.name] = seconds / work if work and seconds else 1.0 / stage.rate(config)
    return rates


def _overrides(plan: Plan, requests: Iterable[Request]) -> dict[str, Mapping[str, Json]]:
    """By shard, the resources that the last rerun with some asked for."""
    overrides: dict[str, Mapping[str, Json]] = {}
    for request in requests:
        if request.resources:
            overrides |= {key: request.resources for key in plan.shards if request.covers(key)}
    return overrides


def _asked_for_since_cancel(plan: Plan, requests: Sequence[Request]) -> frozenset[str] | None:
    """Shards that rerun asked for after a cancel; None if the whole run is wanted."""
    wanted: set[str] = set()
    for request in reversed(requests):
        if request.kind == "cancel":
            return frozenset(wanted)
        if request.kind == "sweep" or (request.stage is None and request.keys is None):
            return None
        wanted.update(key for key in plan.shards if request.covers(key))
    return None


def _policy(config: RunConfig, queued: Iterable[slurm.Queued]) -> Policy:
    # The gate that asks is about to end.
    num_queued = sum(task.job_id != os.environ.get("SLURM_JOB_ID") for task in queued)
    max_array = config.slurm.max_array or slurm.max_array_size()
    return Policy.slurm(config.slurm, max_array=max_array, num_queued=num_queued)
