"""`advance(run)`: the one function that moves a run.

It reads what was submitted, the queue, then the records, in that order; decides (`decide.py`,
pure); and submits what may start now. `sweep.py`, `rerun.py`, the gate after every array, the local
executor and `sweep.py --watch` all call it. State is files: published records win over squeue,
squeue over sacct, sacct over nothing.
"""

import os
import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdhpc.artifacts import RunFolder, Scan, stands_for
from kdhpc.cluster import failures, slurm
from kdhpc.cluster.decide import Batch, Decision, Policy, Situation, decide
from kdhpc.cluster.ledger import Failure, Job, Ledger, Request, Submission, launcher_gone
from kdhpc.config import RunConfig, Slurm
from kdhpc.errors import BusyError, ClusterError
from kdhpc.shards import Plan

LOCAL_TASK_S = 20.0
"""Work packed into one local task: long against its imports, short against an idle core."""


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
    done = frozenset(key for key in plan.shards if _is_done(run, plan, scan, key))
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


def _is_done(run: RunFolder, plan: Plan, scan: Scan, key: str) -> bool:
    if key not in scan.records:
        return False
    alias = run.alias_path(run.pipeline.stage(plan.shards[key].stage))
    return alias is None or stands_for(alias, scan.records[key].data)


def _active(
    submissions: list[Submission], jobs: Mapping[int, Job], queued: tuple[slurm.Queued, ...]
) -> frozenset[str]:
    present = {(task.job_id, task.index) for task in queued}
    active: set[str] = set()
    for submission in submissions:
        job = jobs.get(submission.number)
        if job is None:
            if not launcher_gone(submission):
                active.update(submission.keys)  # being submitted at this moment
        elif job.job_id:
            for index, keys in enumerate(submission.tasks):
                if (job.job_id, index) in present:
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
    return failure.message.endswith("(got further)") or any(key in done for key in task)


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


def advance(run: RunFolder, config: RunConfig, plan: Plan) -> State:
    """Submit to Slurm what may start now, and return the run as it then stands.

    What Slurm refuses is recorded as a failure of its shards, so that the rest goes on.

    Raises:
        BusyError: if other launchers kept claiming submissions before this one could.
        ClusterError: if Slurm does not answer, or refused everything.
    """
    ledger = Ledger(run.path)
    room: int | None = None
    num_submitted, refusals = 0, []
    for _ in range(50):
        state = _look(run, config, plan, ledger, room)
        if not state.decision.batches:
            break
        for batch in state.decision.batches:
            try:
                if not _submit(run, ledger, state, batch):
                    time.sleep(0.2)  # another launcher was first: look again
                    break
                num_submitted += 1
            except slurm.OverLimitError as error:
                if len(batch.tasks) == 1:
                    if num_submitted or _others_queued(state):
                        return state  # a gate that is in the queue goes on when there is room
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


def _look(run: RunFolder, config: RunConfig, plan: Plan, ledger: Ledger, room: int | None) -> State:
    """Observe, after putting right what launchers and tasks that died have left."""
    state = observe(run, config, plan, room=room)
    if _settle_orphans(ledger, state) | _explain_ended(run, ledger, state):
        state = observe(run, config, plan, room=room)
    ours = {i for job in state.jobs.values() for i in (job.job_id, job.gate_id) if i}
    held = {
        task.job_id for task in state.queued if task.job_id in ours and task.reason == "JobHeldUser"
    }
    if held and not state.situation.stopped:
        slurm.release(sorted(held))  # its launcher recorded it, and died before it could
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
    present = {(task.job_id, task.index) for task in state.queued}
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
            if keys and (job.job_id, index) not in present:
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
        for key in keys if kind in {"CANCELLED", "LAUNCH"} or not started else started[-1:]:
            if key not in keys:
                continue  # it died between two shards: nobody's fault
            further = " (got further)" if _checkpoint_since(run, key, submission) else ""
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


def _checkpoint_since(run: RunFolder, key: str, submission: Submission) -> bool:
    found = run.scratch_path(key).glob("*/*.json")
    return any(path.stat().st_mtime > submission.time for path in found)


def final_resources(config: RunConfig, batch: Batch, uses_device: bool) -> dict[str, Any]:
    """Fields of `slurm` for one array: config, stage, what rerun asked for, then remedies."""
    limits, threads = config.slurm, config.threads
    wanted: dict[str, Any] = {
        name: getattr(limits, name)
        for name in (
            "account", "partition", "qos", "constraint", "exclude", "time_min", "mem_gb",
            "cpus_per_task", "gpus_per_node", "max_parallel", "signal_s", "setup", "scratch",
            "prefix",
        )
    }  # fmt: skip
    if not uses_device:
        wanted["gpus_per_node"] = 0
    stage = limits.stages.get(batch.stage)
    if stage is not None:
        wanted |= {name: value for name, value in vars(stage).items() if value is not None}
    changes = dict(batch.changes)
    time_factor, mem_factor = changes.pop("time_factor", 1.0), changes.pop("mem_factor", 1.0)
    avoid = [name for name in (wanted["exclude"], changes.pop("exclude", None)) if name]
    wanted |= changes
    if time_factor > 1:
        limit_min = slurm.time_limit_min(wanted["partition"])
        wanted["time_min"] = min(wanted["time_min"] * time_factor, limit_min)
    if mem_factor > 1:
        limit_gb = limits.max_mem_gb or float("inf")
        wanted["mem_gb"] = max(wanted["mem_gb"], min(wanted["mem_gb"] * mem_factor, limit_gb))
    wanted["cpus_per_task"] = max(wanted["cpus_per_task"], threads)
    wanted["exclude"] = ",".join(avoid) or None
    return wanted | {"nodes": batch.nodes, "ranks_per_node": batch.ranks_per_node}


def gate_resources(limits: Slurm, array_id: str) -> dict[str, Any]:
    """Fields of `slurm` for the gate after an array."""
    given = {name: value for name, value in vars(limits.gate).items() if value is not None}
    plain = {
        "partition": limits.partition, "account": limits.account, "qos": limits.qos,
        "time_min": 10, "mem_gb": 1.0, "cpus_per_task": 1, "setup": limits.setup,
        "scratch": limits.scratch,
    }  # fmt: skip
    return (
        plain
        | given
        | {
            "nodes": 1,
            "ranks_per_node": 1,
            "max_parallel": 1,
            "signal_s": 30,
            "dependency": f"afterany:{array_id}",
        }
    )


def _submit(run: RunFolder, ledger: Ledger, state: State, batch: Batch) -> bool:
    """Claim, submit held, record, release. Returns whether the number was ours."""
    limits = state.config.slurm
    stage = run.pipeline.stage(batch.stage)
    number = max((s.number for s in ledger.submissions()), default=0) + 1
    known = {key for s in ledger.submissions() if s.number > _newest(state) for key in s.keys}
    if known & {key for task in batch.tasks for key in task}:
        return False
    submission = Submission(
        number=number,
        request=state.request.number,
        name=job_name(run, batch.stage, number),
        stage=batch.stage,
        tasks=batch.tasks,
        resources=final_resources(state.config, batch, stage.uses_device),
        code=state.request.code,
        time=time.time(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    if not ledger.claim(submission):
        return False
    if ledger.requests()[-1].number != state.request.number:
        ledger.settle(number, Job(job_id=None, note="something else was asked for meanwhile"))
        return False
    try:
        ids = _sbatch(run, ledger, submission, limits)
    except slurm.OverLimitError as error:
        ledger.settle(number, Job(job_id=None, note=str(error)))
        raise
    except slurm.RefusedError as error:
        ledger.settle(number, Job(job_id=None, note=str(error)))
        for key in submission.keys:
            ledger.add_failure(
                Failure(
                    key=key,
                    kind="LAUNCH",
                    message=str(error),
                    fingerprint="refused",
                    submission=number,
                    time=time.time(),
                )
            )
        raise
    if not ledger.settle(number, Job(job_id=ids[0], gate_id=ids[1] if ids[1:] else None)):
        slurm.cancel(ids)
        return False
    slurm.release(ids)
    return True


def _newest(state: State) -> int:
    return max((s.number for s in state.submissions), default=0)


def _sbatch(run: RunFolder, ledger: Ledger, submission: Submission, limits: Slurm) -> list[str]:
    """Submit the array and its gate, both held. Returns their ids."""
    folder = ledger.log_path(submission.number, 0).parent
    folder.mkdir(parents=True, exist_ok=True)
    text = array_script(run, submission)
    path = run.path / "submissions" / f"{submission.number:04d}.sh"
    path.write_text(text)
    ids = [slurm.submit_held(path, submission.name, folder / "%a.log")]
    if limits.advance_from == "gate":
        name = f"gate-{submission.name}"
        text = slurm.script(
            name=name,
            command=_command(
                run, submission.code, ["kdhpc.cluster.gate", str(run.path)], limits.prefix
            ),
            num_tasks=None,
            resources=gate_resources(limits, ids[0]),
        )
        path = path.with_suffix(".gate.sh")
        path.write_text(text)
        try:
            ids.append(slurm.submit_held(path, name, folder / "gate.log"))
        except ClusterError:
            slurm.cancel(ids)
            raise
    return ids


def array_script(run: RunFolder, submission: Submission) -> str:
    """Batch script of a submission."""
    return slurm.script(
        name=submission.name,
        command=_command(
            run,
            submission.code,
            ["kdhpc.cluster.task", str(run.path), str(submission.number)],
            submission.resources["prefix"],
        ),
        num_tasks=len(submission.tasks),
        resources=submission.resources,
    )


def _command(run: RunFolder, code: str, words: list[str], prefix: Sequence[str]) -> str:
    """Shell text that runs a module of the code snapshot with this Python."""
    home = run.path / "code" / code
    start = [str(home / "slurm" / "environment.sh"), str(home), sys.executable, "-m", *words]
    return slurm.command_line([*prefix, "bash", *start])


def job_name(run: RunFolder, stage: str, number: int) -> str:
    """`score.paper.3f9a-0007`: stage first (squeue shows few letters), unique in the cluster."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", run.path.name)
    return f"{stage}.{name}.{run.identity}-{number:04d}"
