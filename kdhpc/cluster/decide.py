"""Which shards start now: a pure function of the plan and of what disk and queue say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdhpc.cluster.failures import REMEDIES
from kdhpc.cluster.ledger import Failure
from kdhpc.shards import Pipeline, Plan, Shard


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
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
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
    max_attempts: int = 3


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One array to submit."""

    stage: str
    tasks: tuple[tuple[str, ...], ...]
    nodes: int
    ranks_per_node: int
    changes: Mapping[str, Any]
    """Resources beyond the config: `time_factor`, `mem_factor`, `exclude`, and asked-for fields."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to submit, and why the rest waits."""

    batches: tuple[Batch, ...]
    blocked: Mapping[str, str]
    """By shard, why it does not start by itself."""


def decide(pipeline: Pipeline, plan: Plan, situation: Situation, policy: Policy) -> Decision:
    """Group the shards that may start into arrays, earliest stage first.

    A shard may start when the records that it reads exist.
    """
    blocked = _blocked(plan, situation, policy)
    if situation.stopped:
        return Decision(batches=(), blocked=blocked)
    batches: list[Batch] = []
    places = policy.max_tasks
    for stage in pipeline.stages:
        ready = [
            shard
            for shard in plan.stage(stage.name)
            if shard.key not in situation.done
            and shard.key not in situation.active
            and shard.key not in blocked
            and (situation.only is None or shard.key in situation.only)
            and all(key in situation.done for key in shard.reads)
        ]
        packed = [
            (group, _pack(group, situation, policy)) for group in _groups(ready, situation, policy)
        ]
        for group, tasks in _canary(packed, plan.stage(stage.name), situation, policy):
            for start in range(0, len(tasks), policy.max_array):
                wave = tasks[start : start + policy.max_array][: max(0, places - policy.per_array)]
                if not wave:
                    break
                places -= len(wave) + policy.per_array
                batches.append(
                    Batch(
                        stage=stage.name,
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
            changes = sorted(_changes(shard, situation).items())
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


def _changes(shard: Shard, situation: Situation) -> dict[str, Any]:
    """What the next attempt of a shard gets beyond the config."""
    changes = dict(situation.overrides.get(shard.key, {}))
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
    if time_factor > 1:
        changes["time_factor"] = time_factor
    if mem_factor > 1:
        changes["mem_factor"] = mem_factor
    if avoid:
        changes["exclude"] = ",".join(sorted(avoid))
    return changes
