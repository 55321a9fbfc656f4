"""Decide which shards start now: a pure function of the plan, the disk and the queue."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from kdhpc.cluster.failures import REMEDIES
from kdhpc.cluster.ledger import Failure
from kdhpc.config.run import RunConfig, Slurm
from kdhpc.plan.shards import Plan, Shard
from kdhpc.types import Json

LOCAL_TASK_S = 3.0
"""Seconds of work in one local task: short, because the process exists already and no core should
idle."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """The facts that a decision depends on."""

    done: frozenset[str]
    """Shards with a result."""
    active: frozenset[str]
    """Shards in the queue, running, or being submitted."""
    failures: Mapping[str, Sequence[Failure]] = field(default_factory=dict)
    """By shard, the failures that count: those since it was last asked for."""
    free_failures: Mapping[str, int] = field(default_factory=dict)
    """By shard, how many of those made progress and therefore cost no attempt."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """By shard, what is wrong with a damaged output that nobody has asked to make again."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """By stage, how long shards take by what was estimated (`Shard.work`); 1 if not given."""
    overrides: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    """By shard, the resources that rerun asked for."""
    stopped: bool = False
    """Whether the last request was to cancel."""
    only: frozenset[str] | None = None
    """After a cancel, the only shards that may start: those that rerun asked for since."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits of arrays and queue, and how much work goes into a task."""

    task_s: float
    """Seconds of work packed into one task."""
    max_array: int
    """Maximum number of tasks in one array."""
    max_tasks: int
    """Maximum number of jobs that may be submitted now, gates included, over all arrays."""
    per_array: int = 1
    """Jobs in the queue that an array needs beside its tasks: 1 for the gate."""
    canary: int = 0
    """Number of tasks of a large stage that are tried first; 0 starts the whole stage."""
    max_attempts: int = 3
    """Failed attempts of a shard before it waits for `rerun.py` or `sweep.py`."""
    pack: int = 1
    """Shards of one rank that a task works on at once."""
    pack_by_stage: Mapping[str, int] = field(default_factory=dict)
    """The same for stages that differ."""
    until: str | None = None
    """Last stage to start."""

    def pack_of(self, shard: Shard, changes: "Changes") -> int:
        """Return how many shards like this one a task works on at once."""
        if shard.arm.nodes * shard.arm.ranks_per_node > 1:
            return 1
        return int(changes.asked.get("pack", self.pack_by_stage.get(shard.stage, self.pack)))

    @classmethod
    def unlimited(cls, config: RunConfig, max_array: int | None) -> "Policy":
        """Plan as if the queue took everything at once.

        Args:
            config: config of the run.
            max_array: maximum number of tasks in one array; None for processes of this machine.
        """
        if max_array is None:
            return cls(task_s=LOCAL_TASK_S, max_array=sys.maxsize, max_tasks=sys.maxsize)
        policy = cls.slurm(config, max_array=max_array, num_queued=0)
        return replace(policy, max_tasks=sys.maxsize, canary=0, until=None)

    @classmethod
    def local(cls, config: RunConfig) -> "Policy":
        """Use processes of this machine, which start task by task and need no gate."""
        return cls(
            task_s=LOCAL_TASK_S,
            max_array=1,
            max_tasks=sys.maxsize,
            per_array=0,
            max_attempts=config.slurm.max_attempts,
            until=config.until,
        )

    @classmethod
    def slurm(cls, config: RunConfig, *, max_array: int, num_queued: int) -> "Policy":
        """Use a cluster, where `num_queued` jobs of the run are in the queue already."""
        limits = config.slurm
        return cls(
            task_s=limits.task_min * 60,
            max_array=max_array,
            max_tasks=sys.maxsize
            if limits.max_submit is None
            else max(0, limits.max_submit - num_queued),
            canary=limits.canary,
            max_attempts=limits.max_attempts,
            pack=limits.pack,
            pack_by_stage=_pack_by_stage(limits),
            until=config.until,
        )

    @classmethod
    def looking(cls, config: RunConfig) -> "Policy":
        """Start nothing, for commands that only look; Slurm need not be asked for its limits."""
        return cls(
            task_s=1.0,
            max_array=1,
            max_tasks=0,
            canary=config.slurm.canary,
            max_attempts=config.slurm.max_attempts,
            until=config.until,
        )


def _pack_by_stage(limits: Slurm) -> dict[str, int]:
    return {name: stage.pack for name, stage in limits.stages.items() if stage.pack is not None}


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Resources in which the next attempt of a shard differs from the config."""

    asked: Mapping[str, Json] = field(default_factory=dict)
    """Fields of `slurm` that rerun asked for."""
    time_factor: float = 1.0
    mem_factor: float = 1.0
    avoid: tuple[str, ...] = ()
    """Nodes that failed, which Slurm should not use."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One array to submit."""

    stage: str
    tasks: tuple[tuple[str, ...], ...]
    """Keys of the shards in each task."""
    nodes: int
    ranks_per_node: int
    pack: int = 1
    """Shards that each task works on at once."""
    changes: Changes = Changes()


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to submit, and why the rest waits."""

    batches: tuple[Batch, ...]
    blocked: Mapping[str, str]
    """By shard, why it does not start without a person."""


def decide(plan: Plan, situation: Situation, policy: Policy) -> Decision:
    """Group the shards that may start into arrays, earliest stage first.

    A shard may start when all records that it reads exist and its stage is asked for.
    """
    blocked = _blocked(plan, situation, policy)
    if situation.stopped:
        return Decision(batches=(), blocked=blocked)
    batches: list[Batch] = []
    num_free = policy.max_tasks
    for stage in plan.stages_until(policy.until):
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
                max_wave = max(0, num_free - policy.per_array)
                wave = tasks[start : start + policy.max_array][:max_wave]
                if not wave:
                    break
                num_free -= len(wave) + policy.per_array
                changes = _changes(group[0], situation)
                batches.append(
                    Batch(
                        stage=stage,
                        tasks=tuple(tuple(shard.key for shard in task) for task in wave),
                        nodes=group[0].arm.nodes,
                        ranks_per_node=group[0].arm.ranks_per_node,
                        pack=min(policy.pack_of(group[0], changes), max(map(len, wave))),
                        changes=changes,
                    )
                )
    return Decision(batches=tuple(batches), blocked=blocked)


def _blocked(plan: Plan, situation: Situation, policy: Policy) -> dict[str, str]:
    """Return the shards that do not start without a person, and why."""
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
        num_spent = len(failures) - situation.free_failures.get(key, 0)
        same = [f for f in failures if f.kind == "EXCEPTION" and f.fingerprint == last.fingerprint]
        if not remedy.retry:
            blocked[key] = f"{last.kind}: {last.message}; {remedy.advice}"
        elif num_spent >= policy.max_attempts or len(same) >= 2:
            blocked[key] = f"{last.kind} {len(failures)} times: {last.message}; {remedy.advice}"
    return blocked | _same_cause_everywhere(plan, situation, policy, blocked)


def _same_cause_everywhere(
    plan: Plan, situation: Situation, policy: Policy, blocked: Mapping[str, str]
) -> dict[str, str]:
    """Block the rest of a stage whose first shards all failed for the same cause.

    An exception counts at once, any other cause only when its own remedies are used up.
    """
    reasons: dict[str, str] = {}
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
                reasons[shard.key] = f"{reason}; fix the cause, then rerun.py RUN"
    return reasons


def _seconds(shard: Shard, situation: Situation) -> float:
    return shard.work * situation.factors.get(shard.stage, 1.0)


def _groups(ready: list[Shard], situation: Situation, policy: Policy) -> list[list[Shard]]:
    """Group the shards that may share an array: those with the same ranks and resources.

    An arm with enough work for a task gets arrays, and therefore gates, of its own, so that shards
    that read only this arm do not wait for others. Smaller arms share arrays.
    """
    by_arm: dict[str, list[Shard]] = {}
    for shard in ready:
        by_arm.setdefault(shard.arm.name, []).append(shard)
    groups: dict[str, list[Shard]] = {}
    for arm, shards in by_arm.items():
        large = sum(_seconds(shard, situation) for shard in shards) >= policy.task_s
        for shard in shards:
            changes = _changes(shard, situation)
            group = f"{arm if large else ''}/{shard.arm.nodes}/{shard.arm.ranks_per_node}/{changes}"
            groups.setdefault(group, []).append(shard)
    return list(groups.values())


def _pack(group: list[Shard], situation: Situation, policy: Policy) -> list[list[Shard]]:
    """Pack shards, in order, into tasks of about `task_s` seconds.

    A shard with several ranks gets a task of its own. A shard that failed before gets a process of
    its own, because what kills the process would end the other shards of the process too.
    """
    if group[0].arm.nodes * group[0].arm.ranks_per_node > 1:
        return [[shard] for shard in group]
    pack = policy.pack_of(group[0], _changes(group[0], situation))
    failed = [shard for shard in group if situation.failures.get(shard.key)]
    tasks = [failed[start : start + pack] for start in range(0, len(failed), pack)]
    filled_s, num_filled = math.inf, pack
    for shard in group:
        if situation.failures.get(shard.key):
            continue
        seconds = _seconds(shard, situation)
        if filled_s + seconds > policy.task_s * pack and num_filled >= pack:
            tasks.append([])
            filled_s, num_filled = 0.0, 0
        tasks[-1].append(shard)
        filled_s += seconds
        num_filled += 1
    return tasks


Packed = list[tuple[list[Shard], list[list[Shard]]]]
"""Groups of shards with their tasks."""


def _canary(packed: Packed, shards: list[Shard], situation: Situation, policy: Policy) -> Packed:
    """Keep only the first tasks of a large stage until one of its shards is done.

    A stage of long shards, such as trainings, starts whole: waiting would cost more than it saves.
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
    """Combine what rerun asked for with the remedies of the failures that count."""
    time_factor = mem_factor = 1.0
    avoid = set()
    for failure in situation.failures.get(shard.key, ()):
        remedy = REMEDIES[failure.kind]
        if failure.kind == "TIMEOUT" and failure.got_further:
            continue  # it continues from a newer checkpoint: the same time again is enough
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
