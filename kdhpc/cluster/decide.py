"""Which shards start now: a pure function of the plan and of what disk and queue say."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kdhpc.cluster.failures import REMEDIES
from kdhpc.cluster.ledger import Failure
from kdhpc.config.run import Slurm
from kdhpc.plan.shards import Plan, Shard
from kdhpc.types import Json

LOCAL_TASK_S = 3.0
"""Work in seconds packed into one local task: its process is there already, and no core should
idle."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What disk and queue say."""

    done: frozenset[str]
    active: frozenset[str]
    """In the queue or running."""
    failures: Mapping[str, Sequence[Failure]] = field(default_factory=dict)
    """By shard, those that count: since somebody last asked for it."""
    free_failures: Mapping[str, int] = field(default_factory=dict)
    """By shard, how many of those had made progress and cost no attempt."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Damaged outputs that nobody has asked to remake."""
    seconds_per_work: Mapping[str, float] = field(default_factory=dict)
    """By stage, measured or estimated."""
    overrides: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """By shard, resources asked for by rerun."""
    stopped: bool = False
    """The last request was to cancel."""
    only: frozenset[str] | None = None
    """After a cancel, only what rerun asked for since starts."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits and packing."""

    task_s: float
    """Work packed into one task."""
    max_array: int
    """Tasks of one array."""
    max_tasks: int
    """Tasks that may be submitted now, over all arrays."""
    per_array: int = 1
    """Queue places that an array needs beside its tasks: the gate."""
    canary: int = 0
    """Tasks of a large stage that are tried first; 0 starts it whole."""
    max_attempts: int = 3
    """Failed attempts of a shard before it waits for somebody."""

    @classmethod
    def unlimited(cls, task_s: float, max_array: int = sys.maxsize) -> "Policy":
        """As if the queue took everything at once: for plans."""
        return cls(task_s=task_s, max_array=max_array, max_tasks=sys.maxsize)

    @classmethod
    def local(cls, limits: Slurm) -> "Policy":
        """For processes of this machine, which start task by task and need no gate."""
        return cls(
            task_s=LOCAL_TASK_S,
            max_array=1,
            max_tasks=sys.maxsize,
            per_array=0,
            max_attempts=limits.max_attempts,
        )

    @classmethod
    def slurm(cls, limits: Slurm, *, max_array: int, num_queued: int) -> "Policy":
        """For a cluster, with so many jobs of the run in the queue already."""
        return cls(
            task_s=limits.task_min * 60,
            max_array=max_array,
            max_tasks=sys.maxsize
            if limits.max_submit is None
            else max(0, limits.max_submit - num_queued),
            canary=limits.canary,
            max_attempts=limits.max_attempts,
        )

    @classmethod
    def looking(cls, limits: Slurm) -> "Policy":
        """For who only looks: nothing may start, so Slurm need not be asked for its limits."""
        return cls(
            task_s=1.0,
            max_array=1,
            max_tasks=0,
            canary=limits.canary,
            max_attempts=limits.max_attempts,
        )


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What the next attempt of a shard gets beyond the config."""

    asked: Mapping[str, Json] = field(default_factory=dict)
    """Fields of `slurm` that rerun gave."""
    time_factor: float = 1.0
    mem_factor: float = 1.0
    avoid: tuple[str, ...] = ()
    """Nodes that failed."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One array to submit."""

    stage: str
    tasks: tuple[tuple[str, ...], ...]
    """Keys of the shards of each task."""
    nodes: int
    ranks_per_node: int
    changes: Changes = Changes()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to submit, and why the rest waits."""

    batches: tuple[Batch, ...]
    blocked: Mapping[str, str]
    """By shard, why it does not start by itself."""


def decide(plan: Plan, situation: Situation, policy: Policy) -> Decision:
    """Group the shards that may start into arrays, earliest stage first.

    A shard may start when the records that it reads exist.
    """
    blocked = _blocked(plan, situation, policy)
    if situation.stopped:
        return Decision(batches=(), blocked=blocked)
    batches: list[Batch] = []
    places = policy.max_tasks
    for stage in plan.stages:
        ready = [
            shard
            for shard in plan.stage(stage)
            if shard.key not in situation.done
            and shard.key not in situation.active
            and shard.key not in blocked
            and (situation.only is None or shard.key in situation.only)
            and all(key in situation.done for key in shard.reads)
        ]
        packed = [
            (group, _pack(group, situation, policy)) for group in _groups(ready, situation, policy)
        ]
        for group, tasks in _canary(packed, plan.stage(stage), situation, policy):
            for start in range(0, len(tasks), policy.max_array):
                wave = tasks[start : start + policy.max_array][: max(0, places - policy.per_array)]
                if not wave:
                    break
                places -= len(wave) + policy.per_array
                batches.append(
                    Batch(
                        stage=stage,
                        tasks=tuple(tuple(shard.key for shard in task) for task in wave),
                        nodes=group[0].arm.nodes,
                        ranks_per_node=group[0].arm.ranks_per_node,
                        changes=_changes(group[0], situation),
                    )
                )
    return Decision(batches=tuple(batches), blocked=blocked)


def _blocked(plan: Plan, situation: Situation, policy: Policy) -> dict[str, str]:
    blocked = dict(situation.damaged)
    for key, failures in situation.failures.items():
        if (
            key in situation.done
            or key in situation.active
            or key not in plan.shards
            or not failures
        ):
            continue
        last = failures[-1]
        remedy = REMEDIES[last.kind]
        spent = len(failures) - situation.free_failures.get(key, 0)
        same = [f for f in failures if f.kind == "EXCEPTION" and f.fingerprint == last.fingerprint]
        if not remedy.retry:
            blocked[key] = f"{last.kind}: {last.message}; {remedy.advice}"
        elif spent >= policy.max_attempts or len(same) >= 2:
            blocked[key] = f"{last.kind} {len(failures)} times: {last.message}; {remedy.advice}"
    return blocked | _same_cause_everywhere(plan, situation, policy, blocked)


def _same_cause_everywhere(
    plan: Plan, situation: Situation, policy: Policy, blocked: Mapping[str, str]
) -> dict[str, str]:
    """When the first shards of a stage all die alike, the others are not started.

    One exception is alike at once; other causes when their own remedies are used up.
    """
    found: dict[str, str] = {}
    by_cause: dict[tuple[str, str], list[Failure]] = {}
    for key, failures in situation.failures.items():
        if key in plan.shards and failures and key not in situation.done:
            last = failures[-1]
            if last.kind == "EXCEPTION" or key in blocked:
                stage = plan.shards[key].stage
                cause = last.fingerprint or last.kind
                by_cause.setdefault((stage, cause), []).append(last)
    for (stage, _), alike in by_cause.items():
        shards = plan.stage(stage)
        if len(alike) < max(2, policy.canary) or any(s.key in situation.done for s in shards):
            continue
        reason = f"the first {len(alike)} shards of {stage} all failed: {alike[0].message}"
        for shard in shards:
            if shard.key not in situation.active and shard.key not in blocked:
                found[shard.key] = f"{reason}; mend it, then rerun.py RUN"
    return found


def _seconds(shard: Shard, situation: Situation) -> float:
    return shard.work * situation.seconds_per_work.get(shard.stage, 0.0)


def _groups(ready: list[Shard], situation: Situation, policy: Policy) -> list[list[Shard]]:
    """Shards that go into arrays together: same ranks and resources.

    An arm that fills a task has arrays, and so a gate, of its own: what waits for it alone does not
    wait for others. Smaller arms share.
    """
    by_arm: dict[str, list[Shard]] = {}
    for shard in ready:
        by_arm.setdefault(shard.arm.name, []).append(shard)
    groups: dict[str, list[Shard]] = {}
    for arm, shards in by_arm.items():
        large = sum(_seconds(shard, situation) for shard in shards) >= policy.task_s
        for shard in shards:
            changes = _changes(shard, situation)
            alike = f"{arm if large else ''}/{shard.arm.nodes}/{shard.arm.ranks_per_node}/{changes}"
            groups.setdefault(alike, []).append(shard)
    return list(groups.values())


def _pack(group: list[Shard], situation: Situation, policy: Policy) -> list[list[Shard]]:
    """Cut shards, in order, into tasks of about `task_s` seconds.

    A shard of several ranks, or one that failed before, gets a task of its own: what kills its
    process must not take others along.
    """
    if group[0].arm.nodes * group[0].arm.ranks_per_node > 1:
        return [[shard] for shard in group]
    tasks: list[list[Shard]] = []
    filled = math.inf
    for shard in group:
        seconds = _seconds(shard, situation)
        if situation.failures.get(shard.key):
            tasks.append([shard])
            filled = math.inf
            continue
        if filled + seconds > policy.task_s:
            tasks.append([])
            filled = 0.0
        tasks[-1].append(shard)
        filled += seconds
    return tasks


Packed = list[tuple[list[Shard], list[list[Shard]]]]
"""Groups of shards with their tasks."""


def _canary(packed: Packed, shards: list[Shard], situation: Situation, policy: Policy) -> Packed:
    """Only the first tasks of a large stage that has not shown yet that it works.

    Stages of long shards, such as trainings, start whole: waiting would cost more than it saves.
    """
    large = sum(len(tasks) for _, tasks in packed) >= 4 * policy.canary
    if not policy.canary or not large or any(shard.key in situation.done for shard in shards):
        return packed
    if max(_seconds(shard, situation) for shard in shards) > 2 * policy.task_s:
        return packed
    if any(shard.key in situation.active for shard in shards):
        return []
    group, tasks = packed[0]
    return [(group, tasks[: policy.canary])]


def _changes(shard: Shard, situation: Situation) -> Changes:
    """What rerun asked for, and the remedies of the failures that count."""
    time_factor = mem_factor = 1.0
    avoid = set()
    for failure in situation.failures.get(shard.key, ()):
        remedy = REMEDIES[failure.kind]
        if failure.kind == "TIMEOUT" and situation.free_failures.get(shard.key, 0):
            continue  # it got further: the same time again is enough
        time_factor *= remedy.time_factor
        mem_factor *= remedy.mem_factor
        if remedy.avoid_node and failure.node:
            avoid.add(failure.node)
    return Changes(
        asked=dict(sorted(situation.overrides.get(shard.key, {}).items())),
        time_factor=time_factor,
        mem_factor=mem_factor,
        avoid=tuple(sorted(avoid)),
    )
