"""How a run stands, from files and one squeue: counts, causes, and when it may be done."""

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdhpc import trainlog
from kdhpc.artifacts import RunFolder
from kdhpc.cluster import runs, slurm
from kdhpc.cluster.decide import Policy
from kdhpc.cluster.failures import REMEDIES
from kdhpc.cluster.ledger import Failure, Ledger
from kdhpc.cluster.observe import State, observe
from kdhpc.config import RunConfig
from kdhpc.errors import ClusterError
from kdhpc.shards import Plan

LOG_LINES = 6
DISK_FULL_BYTES = 2**20
"""A disk with less left counts as full."""


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """Shards of one stage; the counts add up to `planned`."""

    folder: str
    planned: int
    done: int
    running: int
    queued: int
    failed: int
    missing: int
    seconds_left: float
    """Work left, in seconds of one task."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Failures with the same cause, counted once."""

    stage: str
    kind: str
    message: str
    shards: tuple[str, ...]
    advice: str
    log: str
    last_lines: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Status:
    """What status.py shows."""

    run: str
    executor: str
    stages: tuple[StageStatus, ...]
    causes: tuple[Cause, ...]
    damaged: Mapping[str, str]
    waiting: Mapping[str, int]
    """Why queued tasks wait, in Slurm's words, with counts."""
    notes: tuple[str, ...]
    eta_s: float | None
    """Seconds until the end at the present pace; None if unknown or nothing is running."""
    live: tuple[str, ...]
    """What running tasks say of their progress."""
    queue_unknown: bool = False
    """Slurm did not answer: what is shown comes from the disk alone."""

    @property
    def complete(self) -> bool:
        return all(stage.done == stage.planned for stage in self.stages)

    def as_json(self) -> str:
        """The same as JSON."""
        return json.dumps(asdict(self) | {"complete": self.complete}, indent=1)


def look(run: RunFolder) -> tuple[State, Status]:
    """Read a run that this process does not work on; one squeue, one scan of the records.

    Where Slurm does not answer, what the disk says is shown.
    """
    _, config, plan = runs.current(run)
    local = _local_active(run) if runs.is_locked(run) else frozenset[str]()
    # Nothing is submitted from here, so Slurm need not be asked for its limits.
    policy = Policy(
        task_s=1.0,
        max_array=1,
        max_tasks=0,
        canary=config.slurm.canary,
        max_attempts=config.slurm.max_attempts,
    )
    try:
        state = observe(run, config, plan, local_active=local, policy=policy)
    except ClusterError as error:
        state = observe(run, config, plan, local_active=local, policy=policy, with_queue=False)
        notes = (f"the queue is not known: {error}",)
        return state, status_of(
            run, config, plan, state, local_running=local, notes=notes, queue_unknown=True
        )
    return state, status_of(run, config, plan, state, local_running=local)


def _local_active(run: RunFolder) -> frozenset[str]:
    ledger = Ledger(run.path)
    jobs = ledger.jobs()
    return frozenset(key for s in ledger.submissions() if s.number not in jobs for key in s.keys)


def status_of(
    run: RunFolder,
    config: RunConfig,
    plan: Plan,
    state: State,
    *,
    local_running: frozenset[str] = frozenset(),
    notes: tuple[str, ...] = (),
    queue_unknown: bool = False,
) -> Status:
    """Summarise what `observe` found."""
    situation = state.situation
    running = local_running | _running(state)
    failures = {
        key: found[-1]
        for key, found in situation.failures.items()
        if found and key not in situation.active
    }
    stages = []
    for stage in run.pipeline.stages:
        shards = plan.stage(stage.name)
        left = [s for s in shards if s.key not in situation.done]
        is_active = [s.key for s in left if s.key in situation.active]
        num_running = sum(key in running for key in is_active)
        num_failed = sum(
            s.key in failures or s.key in situation.damaged for s in left if s.key not in is_active
        )
        stages.append(
            StageStatus(
                folder=run.pipeline.folder(stage.name),
                planned=len(shards),
                done=len(shards) - len(left),
                running=num_running,
                queued=len(is_active) - num_running,
                failed=num_failed,
                missing=len(left) - len(is_active) - num_failed,
                seconds_left=sum(s.work for s in left) * situation.seconds_per_work[stage.name],
            )
        )
    codes = sorted(
        {record.code for key, record in state.scan.records.items() if key in plan.shards}
    )
    if len(codes) > 1:
        notes += (f"results were made by {len(codes)} versions of the code: {', '.join(codes)}",)
    waiting: dict[str, int] = {}
    for key, reason in state.decision.blocked.items():
        if key not in failures and key not in situation.damaged:
            waiting[reason] = waiting.get(reason, 0) + 1
    notes += tuple(f"{count} shards are not started: {why}" for why, count in waiting.items())
    held = [task.name for task in state.queued if task.reason in slurm.HELD_REASONS]
    if held and not situation.stopped:
        notes += (f"{len(held)} tasks are held by Slurm; sweep.py or rerun.py release them",)
    notes += _forgotten(run, state)
    if situation.stopped:
        notes += ("cancelled; run sweep.py or rerun.py to go on",)
    return Status(
        run=str(run.path),
        executor=state.request.executor,
        stages=tuple(stages),
        causes=_causes(failures, plan),
        damaged=situation.damaged,
        waiting=_waiting(state),
        notes=notes,
        eta_s=_eta(stages, state, running, config),
        live=_live(run, state),
        queue_unknown=queue_unknown,
    )


def _forgotten(run: RunFolder, state: State) -> tuple[str, ...]:
    """What to say when shards could start and nobody is there to start them."""
    situation = state.situation
    names = {submission.name for submission in state.submissions}
    queued = any(task.name.removeprefix("gate-") in names for task in state.queued)
    if situation.active or situation.stopped or queued:
        return ()
    ready = [
        key
        for key, shard in state.plan.shards.items()
        if key not in situation.done
        and key not in state.decision.blocked
        and all(read in situation.done for read in shard.reads)
    ]
    if not ready:
        return ()
    found = [f"{len(ready)} shards could start, the first {ready[0]}, and nothing is queued"]
    if shutil.disk_usage(run.path).free < DISK_FULL_BYTES:
        found.append("DISK_FULL: there is no space left to write down why; free some")
    found.append("run sweep.py again")
    return ("; ".join(found),)


def _running(state: State) -> frozenset[str]:
    started = {(task.name, task.index) for task in state.queued if task.state == "RUNNING"}
    return frozenset(
        key
        for submission in state.submissions
        if (job := state.jobs.get(submission.number)) and job.job_id
        for index, keys in enumerate(submission.tasks)
        if (submission.name, index) in started
        for key in keys
    )


def _waiting(state: State) -> dict[str, int]:
    names = {submission.name for submission in state.submissions}
    found: dict[str, int] = {}
    for task in state.queued:
        if task.name in names and task.state == "PENDING":
            found[task.reason] = found.get(task.reason, 0) + 1
    return found


def _causes(failures: Mapping[str, Failure], plan: Plan) -> tuple[Cause, ...]:
    grouped: dict[tuple[str, str, str], list[Failure]] = {}
    for key, failure in failures.items():
        stage = plan.shards[key].stage
        grouped.setdefault((stage, failure.kind, failure.fingerprint), []).append(failure)
    return tuple(
        Cause(
            stage=stage,
            kind=kind,
            message=alike[0].message,
            shards=tuple(failure.key for failure in alike),
            advice=REMEDIES[kind].advice,
            log=alike[0].log,
            last_lines=_last_lines(Path(alike[0].log)),
        )
        for (stage, kind, _), alike in grouped.items()
    )


def _last_lines(path: Path) -> tuple[str, ...]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ()
    return tuple(line for line in lines if line.strip())[-LOG_LINES:]


def _eta(
    stages: list[StageStatus], state: State, running: frozenset[str], config: RunConfig
) -> float | None:
    left = sum(stage.seconds_left for stage in stages)
    if not left or not running:
        return None
    if state.request.executor == "local":
        return left / (config.local_workers or len(os.sched_getaffinity(0)))
    at_once = sum(task.state == "RUNNING" and task.index is not None for task in state.queued)
    return left / max(1, at_once)


def _live(run: RunFolder, state: State) -> tuple[str, ...]:
    lines = []
    for path in sorted((run.path / "progress").glob("*.json")):
        try:
            found: dict[str, Any] = json.loads(path.read_text())
            age_s = time.time() - path.stat().st_mtime
        except (OSError, ValueError):
            continue
        key = str(found.get("key"))
        if key in state.situation.active and age_s < 120:
            lines.append(f"{key} {float(found.get('fraction', 0)):.0%}{_training(run, key)}")
    return tuple(lines)


def _training(run: RunFolder, key: str) -> str:
    last = _last_lines(run.scratch_path(key) / trainlog.FILE)[-1:]
    try:
        found = json.loads(last[0])
        return (
            f" step {found['step']} of {found['steps']} loss {found['loss']:.4f}"
            f" lr {found['learning_rate']:.2e} norm {found['gradient_norm']:.2f}"
            f" {found['tokens_per_s']:.0f} tokens/s MFU {found['mfu']:.0%}"
        )
    except (IndexError, ValueError, KeyError):
        return ""
