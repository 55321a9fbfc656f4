"""How a run stands at one moment: what was submitted, the queue, the records, read in that order.

Published records win over squeue, squeue over sacct, sacct over nothing. Nothing is written here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kdhpc.artifacts import RunFolder, Scan, stands_for
from kdhpc.cluster import failures, slurm
from kdhpc.cluster.decide import Decision, Policy, Situation, decide
from kdhpc.cluster.ledger import Failure, Job, Ledger, Request, Submission, launcher_gone
from kdhpc.config import RunConfig
from kdhpc.shards import Plan

LOCAL_TASK_S = 3.0
"""Work packed into one local task: its process is there already, and no core should idle."""


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
    queued: tuple[slurm.Queued, ...]
    decision: Decision
    policy: Policy

    @property
    def missing(self) -> list[str]:
        """Planned shards without a result."""
        return [key for key in self.plan.shards if key not in self.situation.done]


def observe(
    run: RunFolder,
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
        policy: of the local executor; from the config if not given.
        with_queue: False to go by the disk alone.
        room: tasks that may be submitted at most, after Slurm refused more.
    """
    ledger = Ledger(run.path)
    requests = ledger.requests()
    submissions, jobs = ledger.submissions(), ledger.jobs()
    uses_slurm = with_queue and any(job.job_id for job in jobs.values())
    uses_slurm |= with_queue and requests[-1].executor == "slurm"
    queued = tuple(slurm.queue()) if uses_slurm else ()
    scan = _of_this_plan(run.scan(), plan)
    active = local_active | _active(submissions, jobs, queued)
    done = _done(run, plan, scan)
    found = ledger.failures()
    situation = _situation(
        plan, requests, submissions, found, scan, done, active, run.pipeline.stages, config
    )
    policy = policy or _policy(config, queued, submissions, uses_slurm)
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
        decision=decide(run.pipeline, plan, situation, policy),
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


def _done(run: RunFolder, plan: Plan, scan: Scan) -> frozenset[str]:
    """Shards with a record; of stages with a fixed name, those that it stands for."""
    done = scan.records.keys() & plan.shards.keys()
    for stage in run.pipeline.stages:
        if alias := run.alias_path(stage):
            done -= {
                shard.key
                for shard in plan.stage(stage.name)
                if shard.key in done and not stands_for(alias, scan.records[shard.key].data)
            }
    return frozenset(done)


def _active(
    submissions: list[Submission], jobs: Mapping[int, Job], queued: tuple[slurm.Queued, ...]
) -> frozenset[str]:
    # By name: a controller that lost its newest state gives ids out again.
    present = {(task.name, task.index) for task in queued}
    active: set[str] = set()
    for submission in submissions:
        job = jobs.get(submission.number)
        if job is None:
            if not launcher_gone(submission):
                active.update(submission.keys)  # being submitted at this moment
        elif job.job_id:
            for index, keys in enumerate(submission.tasks):
                if (submission.name, index) in present:
                    active.update(keys)
    return frozenset(active)


def _situation(
    plan: Plan,
    requests: list[Request],
    submissions: list[Submission],
    found: list[Failure],
    scan: Scan,
    done: frozenset[str],
    active: frozenset[str],
    stages: tuple[Any, ...],
    config: RunConfig,
) -> Situation:
    """Count only failures since somebody last asked for the shard."""
    request_of = {submission.number: submission.request for submission in submissions}
    counted: dict[str, list[Failure]] = {}
    free: dict[str, int] = {}
    overrides: dict[str, Mapping[str, Any]] = {}
    for failure in found:
        if failure.key not in plan.shards or failure.key in done:
            continue
        asked = max((r.number for r in requests if r.covers(failure.key)), default=0)
        if request_of.get(failure.submission, 0) >= asked:
            counted.setdefault(failure.key, []).append(failure)
            remedy = failures.REMEDIES[failure.kind]
            if remedy.free_with_progress and _progressed(failure, submissions, done):
                free[failure.key] = free.get(failure.key, 0) + 1
    for request in requests:
        if request.resources:
            overrides |= {key: request.resources for key in plan.shards if request.covers(key)}
    rates: dict[str, float] = {}
    for stage in stages:
        records = [scan.records[s.key] for s in plan.stage(stage.name) if s.key in scan.records]
        work = sum(plan.shards[record.key].work for record in records)
        seconds = sum(record.seconds for record in records)
        rates[stage.name] = seconds / work if work and seconds else 1.0 / stage.rate(config)
    return Situation(
        done=done,
        active=active,
        failures=counted,
        free_failures=free,
        damaged={k: v for k, v in scan.damaged.items() if k in plan.shards and k not in active},
        seconds_per_work=rates,
        overrides=overrides,
        stopped=requests[-1].kind == "cancel",
        only=_asked_for_since_cancel(plan, requests),
    )


def _asked_for_since_cancel(plan: Plan, requests: list[Request]) -> frozenset[str] | None:
    """Shards that rerun asked for after a cancel; None if the whole run is wanted."""
    wanted: set[str] = set()
    for request in reversed(requests):
        if request.kind == "cancel":
            return frozenset(wanted)
        if request.kind == "sweep" or (request.stage is None and request.keys is None):
            return None
        wanted.update(key for key in plan.shards if request.covers(key))
    return None


def _progressed(failure: Failure, submissions: list[Submission], done: frozenset[str]) -> bool:
    """Whether the task of a failure published a shard, or its training left a newer checkpoint."""
    submission = next(s for s in submissions if s.number == failure.submission)
    task = next((task for task in submission.tasks if failure.key in task), ())
    return failure.message.endswith(failures.GOT_FURTHER) or any(key in done for key in task)


def _policy(
    config: RunConfig,
    queued: tuple[slurm.Queued, ...],
    submissions: list[Submission],
    uses_slurm: bool,
) -> Policy:
    limits = config.slurm
    if not uses_slurm:
        return Policy(task_s=LOCAL_TASK_S, max_array=10**9, max_tasks=10**9, per_array=0)
    names = {submission.name for submission in submissions}
    mine = sum(
        task.name.removeprefix("gate-") in names
        for task in queued
        if task.job_id != os.environ.get("SLURM_JOB_ID")  # the gate that asks is about to end
    )
    return Policy(
        task_s=limits.task_min * 60,
        max_array=limits.max_array or slurm.max_array_size(),
        max_tasks=10**9 if limits.max_submit is None else max(0, limits.max_submit - mine),
        canary=limits.canary,
        max_attempts=limits.max_attempts,
    )
