"""Summarise the state of a run for people: counts, causes of failures, and the time left."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from kdhpc.cluster import eta, runs, slurm
from kdhpc.cluster.costs import Hours, hours_of_shards
from kdhpc.cluster.decide import Policy
from kdhpc.cluster.failures import REMEDIES
from kdhpc.cluster.ledger import Failure, Ledger
from kdhpc.cluster.logs import own_part, tasks_of
from kdhpc.cluster.observe import State, observe
from kdhpc.cluster.pace import Progress, measure, time_left
from kdhpc.cluster.runs import Run
from kdhpc.errors import ClusterError

LOG_LINES = 6
"""Lines of a log that are shown for each cause."""
DISK_FULL_BYTES = 2**20
"""A disk with fewer free bytes counts as full."""
DAMAGE_ADVICE = "rerun.py RUN --put-aside makes it again"


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """Counts of the shards of one stage; those after `planned` add up to it."""

    folder: str
    planned: int
    done: int
    running: int
    queued: int
    failed: int
    missing: int


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Failures with the same cause, shown as one."""

    stage: str
    kind: str
    message: str
    shards: tuple[str, ...]
    advice: str
    log: str
    """Log of the task in which the first of these shards failed."""
    last_lines: tuple[str, ...]
    """The last lines that the first shard's failed attempt wrote there."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Report of a run for people; status.py shows it."""

    run: str
    executor: str
    stages: tuple[StageStatus, ...]
    causes: tuple[Cause, ...]
    damaged: Mapping[str, str]
    """What is wrong with a shard's record or data, by its key."""
    waiting: Mapping[str, int]
    """Number of waiting tasks, by Slurm's reason."""
    notes: tuple[str, ...]
    """Lines about anything else that a person should know."""
    left_s: eta.Range | None
    """Seconds until the end; None if nothing is running or nothing is left."""
    hours: Hours
    """What published shards have cost, and what the others will."""
    live: tuple[str, ...]
    """Lines about the progress of the shards that tasks are working on."""
    finished: bool = False
    """Whether everything that is asked for is done: all stages, or those up to `until`."""
    logical_digest: str = ""
    """Logical digest of the merged results; empty until every planned shard is done."""
    queue_unknown: bool = False
    """Whether Slurm did not answer, so that everything comes from the disk."""

    @property
    def complete(self) -> bool:
        """Whether every planned shard is done."""
        return all(stage.done == stage.planned for stage in self.stages)

    def as_json(self) -> str:
        """Format the report as JSON."""
        return json.dumps(asdict(self) | {"complete": self.complete}, indent=1)


def look(run: Run, queue: Callable[[], Sequence[slurm.Queued]] = slurm.queue) -> State:
    """Observe a run without working on it, with one squeue and one scan of the records.

    If Slurm does not answer, or the run was restored from an archive, only the disk is used.

    Args:
        run: the run.
        queue: returns this user's jobs.
    """
    _, config, plan = runs.current(run)
    local = _local_active(run) if runs.is_locked(run) else frozenset[str]()
    policy = Policy.looking(config)
    if run.is_restored:  # jobs of the run that was archived have the same names
        return observe(run, config, plan, policy=policy, with_queue=False)
    try:
        return observe(run, config, plan, local_active=local, policy=policy, queue=queue)
    except ClusterError as error:
        state = observe(run, config, plan, local_active=local, policy=policy, with_queue=False)
        return replace(state, queue_error=str(error))


def _local_active(run: Run) -> frozenset[str]:
    ledger = Ledger(run.path)
    jobs = ledger.jobs()
    return frozenset(key for s in ledger.submissions() if s.number not in jobs for key in s.keys)


def status_of(run: Run, state: State) -> Status:
    """Summarise the observed state of a run."""
    situation = state.situation
    failures = {
        key: of_shard[-1]
        for key, of_shard in situation.failures.items()
        if of_shard and key not in situation.active
    }
    stages = tuple(_stage_status(run, state, stage, failures) for stage in state.plan.stages)
    pace = measure(run, state)
    return Status(
        run=str(run.path),
        executor=state.request.executor,
        stages=stages,
        causes=_causes(run, state, failures),
        damaged=situation.damaged,
        waiting=_waiting(state),
        notes=tuple(_notes(run, state, failures)),
        left_s=time_left(state, pace),
        hours=hours_of_shards(run, state, pace.factors),
        live=_live(run, state, pace.progress),
        finished=state.finished,
        logical_digest=_logical_digest(run, state),
        queue_unknown=bool(state.queue_error),
    )


def _stage_status(
    run: Run, state: State, stage: str, failures: Mapping[str, Failure]
) -> StageStatus:
    situation = state.situation
    shards = state.plan.stage(stage)
    left = [shard for shard in shards if shard.key not in situation.done]
    active = [shard.key for shard in left if shard.key in situation.active]
    num_running = sum(key in state.running for key in active)
    broken = failures.keys() | situation.damaged.keys()
    num_failed = sum(s.key in broken for s in left if s.key not in situation.active)
    return StageStatus(
        folder=run.folders[stage],
        planned=len(shards),
        done=len(shards) - len(left),
        running=num_running,
        queued=len(active) - num_running,
        failed=num_failed,
        missing=len(left) - len(active) - num_failed,
    )


def _notes(run: Run, state: State, failures: Mapping[str, Failure]) -> Iterator[str]:
    """Yield lines about anything else that a person should know."""
    situation = state.situation
    if state.queue_error:
        yield f"the queue is unknown: {state.queue_error}"
    if run.is_restored:
        yield f"restored from an archive, which left out data of {len(run.left_out)} shards"
    codes = sorted(
        {record.code for key, record in state.scan.records.items() if key in state.plan.shards}
    )
    if len(codes) > 1:
        yield f"results were made by {len(codes)} versions of the code: {', '.join(codes)}"
    sources = Counter(
        record.reused_from
        for key, record in state.scan.records.items()
        if key in state.plan.shards and record.reused_from
    )
    for place, count in sources.items():
        yield f"{count} shards were taken from {place} (reuse)"
    reasons = Counter(
        reason
        for key, reason in state.decision.blocked.items()
        if key not in failures and key not in situation.damaged
    )
    for reason, count in reasons.items():
        yield f"{count} shards are not started: {reason}"
    yield from _held(state)
    yield from _stalled(run, state)
    if situation.stopped:
        yield "cancelled; run sweep.py or rerun.py to go on"
    if until := state.config.until:
        yield f"until={until}: later stages start when sweep.py is typed without it"


def _held(state: State) -> Iterator[str]:
    """Yield lines about jobs that cannot start until somebody does something."""
    if state.to_release and not state.situation.stopped:
        yield f"{len(state.to_release)} jobs are held; sweep.py or rerun.py release them"
    if state.held_by_user:
        ids = ",".join(sorted(state.held_by_user))
        yield f"held by somebody: scontrol release {ids} lets them go"
    never = Counter(task.reason for task in state.queued if slurm.NEVER_STARTS.match(task.reason))
    for reason, count in never.items():
        yield (
            f"{count} jobs can never start ({reason}): cancel.py RUN, then rerun.py RUN with other "
            "resources, such as slurm.time_min=30 or slurm.partition=NAME"
        )


def _stalled(run: Run, state: State) -> Iterator[str]:
    """Yield a line if shards could start and nothing is queued that would start them."""
    situation = state.situation
    if situation.active or situation.stopped or state.queued or state.queue_error:
        return
    if runs.is_locked(run):  # a local launcher is at work
        return
    asked_for = state.plan.stages_until(state.config.until)
    ready = [
        key
        for key, shard in state.plan.shards.items()
        if shard.stage in asked_for
        and (situation.only is None or key in situation.only)
        and key not in situation.done
        and key not in state.decision.blocked
        and all(read in situation.done for read in shard.reads)
    ]
    if not ready:
        return
    shards = f"{len(ready)} shard{'s' * (len(ready) > 1)}"
    parts = [f"{shards} could start (first: {ready[0]}), but nothing is queued"]
    parts += _gate_that_ended(run, state)
    if shutil.disk_usage(run.path).free < DISK_FULL_BYTES:
        parts.append("DISK_FULL: there is no space left to record why; free some")
    yield "; ".join([*parts, "run sweep.py again"])


def _gate_that_ended(run: Run, state: State) -> Iterator[str]:
    """Yield the last words of the newest gate, which should have started what could start."""
    numbers = [number for number, job in state.jobs.items() if job.gate_id]
    if not numbers:
        return
    log = Ledger(run.path).log_path(max(numbers), 0).with_name("gate.log")
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    if said := [line.strip() for line in lines if line.strip()]:
        yield f"the last gate said: {said[-1]} ({log})"
    else:
        yield f"the last gate said nothing: sacct -j {state.jobs[max(numbers)].gate_id} says why"


def _waiting(state: State) -> dict[str, int]:
    arrays = {submission.name for submission in state.submissions}
    reasons = Counter(
        "not looked at by Slurm yet" if task.reason == "None" else task.reason
        for task in state.queued
        if task.name in arrays and task.state == "PENDING"
    )
    return dict(reasons)  # `asdict` would count the items of a Counter


def _causes(run: Run, state: State, failures: Mapping[str, Failure]) -> tuple[Cause, ...]:
    grouped: dict[tuple[str, str, str], list[Failure]] = {}
    for key, failure in failures.items():
        stage = state.plan.shards[key].stage
        grouped.setdefault((stage, failure.kind, failure.fingerprint), []).append(failure)
    causes = []
    for (stage, kind, _), alike in grouped.items():
        log, last_lines = _log_of(run, state, alike[0])
        cause = Cause(
            stage=stage,
            kind=kind,
            message=alike[0].message,
            shards=tuple(failure.key for failure in alike),
            advice=REMEDIES[kind].advice,
            log=log,
            last_lines=last_lines,
        )
        causes.append(cause)
    return tuple(causes)


def _log_of(run: Run, state: State, failure: Failure) -> tuple[str, tuple[str, ...]]:
    """Return the log in which a shard failed, and the last lines of that attempt."""
    [(number, index)] = [
        (submission.number, index)
        for submission, index in tasks_of(state, failure.key)
        if submission.number == failure.submission
    ]
    path = Ledger(run.path).log_of(number, index, failure.key)
    part = own_part(path, state.plan.shards[failure.key])
    return str(path), part.last_lines(LOG_LINES) if part else ()


def _live(run: Run, state: State, progress: Mapping[str, Progress]) -> tuple[str, ...]:
    lines = []
    for key, note in progress.items():
        stage = run.pipeline.stage(state.plan.shards[key].stage)
        words = (key, f"{note.fraction:.0%}", stage.progress(run.scratch_path(key)))
        lines.append(" ".join(filter(None, words)))
    return tuple(lines)


def _logical_digest(run: Run, state: State) -> str:
    """Return the digest that the merge noted in its record, if the run is complete."""
    if state.missing:
        return ""
    stats = [
        state.scan.records[s.key].stats for s in state.plan.stage(run.pipeline.stages[-1].name)
    ]
    return next((str(s["logical_digest"]) for s in stats if "logical_digest" in s), "")
