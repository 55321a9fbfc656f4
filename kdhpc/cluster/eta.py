"""How long what is left of a run will take, as a range.

A shard's `work` is an estimate in seconds. What it takes instead is learnt from three sources: runs
that ended before in the same place, shards of this run that are done, and the progress inside those
that are running. Each stage has a factor, what it takes by what was estimated. Its logarithm is
normal around that of the whole machine, so that the first stages say something of the later ones,
with a spread that becomes smaller with each shard. What is left is then played through, with as
many shards at once as there are places, by a low and by a high quantile of the factors.
"""

import heapq
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kdhpc.plan.shards import Plan
from kdhpc.storage.run_folder import Record

SPREAD_UNKNOWN = 0.6
"""Standard deviation of the logarithm of a machine's factor of which nothing is known."""
SPREAD_KNOWN = 0.3
"""The same if earlier runs are known: another size of model, another load."""
SPREAD_OF_STAGES = 0.4
"""That of a stage around its machine."""
SPREAD_OF_STAGES_KNOWN = 0.2
"""That of a stage around its machine, next to earlier runs that had the stage."""
SPREAD_OF_SHARDS = 0.3
"""That of one shard around its stage."""
SPREAD_LEFT = 0.15
"""What stays however many shards are done, because other users come and go."""
QUANTILE = 1.28
"""Standard deviations on both sides of the middle: four of five runs end inside the range."""


@dataclass(frozen=True, kw_only=True)
class Took:
    """How long some work of a stage took."""

    seconds: float
    estimated_s: float
    num_shards: float
    """Number of shards, with fractions of those that are running."""

    def __add__(self, other: "Took") -> "Took":
        return Took(
            seconds=self.seconds + other.seconds,
            estimated_s=self.estimated_s + other.estimated_s,
            num_shards=self.num_shards + other.num_shards,
        )

    @property
    def log_factor(self) -> float:
        """Logarithm of what it took by what was estimated."""
        return math.log(self.seconds / self.estimated_s)


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What a stage takes by what was estimated: the logarithm is normal."""

    log_mean: float
    spread: float

    def at(self, deviations: float) -> float:
        """Return the factor so many standard deviations above its median."""
        return math.exp(self.log_mean + deviations * self.spread)


@dataclass(frozen=True, kw_only=True)
class Range:
    """A time in seconds, with a low and a high end that it is between in four of five cases."""

    low: float
    middle: float
    high: float

    def later(self, seconds: float) -> "Range":
        """Return the range moved by some seconds."""
        return Range(low=self.low + seconds, middle=self.middle + seconds, high=self.high + seconds)


@dataclass(frozen=True, kw_only=True)
class History:
    """What earlier runs of this pipeline on this cluster took."""

    log_factors: Mapping[str, float] = field(default_factory=dict)
    """Mean logarithm of the factor of each stage that they had."""
    num_at_once: int = 0
    """Most shards that one of them worked on at once."""


def took(records: Iterable[Record], plan: Plan) -> dict[str, Took]:
    """Return what the shards of each stage took that this run has made itself."""
    sums: dict[str, Took] = {}
    for record in records:
        shard = plan.shards.get(record.key)
        if shard and not record.reused_from and record.seconds > 0 and shard.work > 0:
            of_shard = Took(seconds=record.seconds, estimated_s=shard.work, num_shards=1)
            sums[shard.stage] = sums[shard.stage] + of_shard if shard.stage in sums else of_shard
    return sums


def factors(
    stages: Iterable[str], took_by_stage: Mapping[str, Took], history: History
) -> dict[str, Factor]:
    """Return the factor of each stage, from what is known of it and of the other stages.

    This is the posterior of a normal model with two levels, a machine and its stages, in closed
    form but for one simplification: stages see each other through the machine only.

    Args:
        stages: names of the stages.
        took_by_stage: what has been done in this run, by stage.
        history: what earlier runs took.
    """
    before = history.log_factors
    usual = sum(before.values()) / len(before) if before else 0.0
    spread = {s: SPREAD_OF_STAGES_KNOWN if s in before else SPREAD_OF_STAGES for s in stages}
    seen = {s: t for s, t in took_by_stage.items() if s in spread}
    # Precision-weighted mean of how far the machine is from what it usually is.
    machine_spread = SPREAD_KNOWN if before else SPREAD_UNKNOWN
    precision, weighted = machine_spread**-2, 0.0
    for stage, of_stage in seen.items():
        weight = 1 / (spread[stage] ** 2 + SPREAD_OF_SHARDS**2 / of_stage.num_shards)
        precision += weight
        weighted += weight * (of_stage.log_factor - before.get(stage, usual))
    machine = weighted / precision
    result = {}
    for stage, own_spread in spread.items():
        mean, trust = before.get(stage, usual) + machine, 0.0
        if stage in seen:
            noise = SPREAD_OF_SHARDS**2 / seen[stage].num_shards
            trust = own_spread**2 / (own_spread**2 + noise)
            mean += trust * (seen[stage].log_factor - mean)
        variance = (1 - trust) ** 2 / precision + (1 - trust) * own_spread**2
        result[stage] = Factor(log_mean=mean, spread=math.hypot(math.sqrt(variance), SPREAD_LEFT))
    return result


def seconds_left(
    plan: Plan,
    keys: Iterable[str],
    factors: Mapping[str, Factor],
    done: Mapping[str, float],
    *,
    num_places: int,
    task_s: float,
    start_s: float,
) -> Range:
    """Return how long it takes until all of some shards are done.

    Args:
        plan: plan of the run.
        keys: keys of the shards that are left, in the order in which they are started.
        factors: factor of each stage.
        done: fraction that is done, by the key of each shard that is being worked on.
        num_places: how many shards are worked on at once.
        task_s: seconds of work that a task is filled with, shard after shard.
        start_s: seconds before a shard starts once it can.
    """
    stage_of = {key: plan.shards[key].stage for key in keys}
    needed = {
        key: [read for read in plan.shards[key].reads if read in stage_of] for key in stage_of
    }

    def until_end(deviations: float) -> float:
        factor = {stage: of_stage.at(deviations) for stage, of_stage in factors.items()}
        seconds = {
            key: plan.shards[key].work * factor[stage] * (1 - done.get(key, 0.0))
            for key, stage in stage_of.items()
        }
        totals = dict.fromkeys(stage_of.values(), 0.0)
        for key, stage in stage_of.items():
            totals[stage] += seconds[key]
        # Small shards share tasks, so a stage has no more of these than it fills.
        most = {stage: max(1, math.ceil(total / task_s)) for stage, total in totals.items()}
        first = [
            *(key for key in done if key in seconds),
            *(key for key in seconds if key not in done),
        ]
        return _play(
            {key: (stage_of[key], seconds[key]) for key in first}, needed, most, num_places, start_s
        )

    return Range(low=until_end(-QUANTILE), middle=until_end(0.0), high=until_end(QUANTILE))


def _play(
    jobs: Mapping[str, tuple[str, float]],
    needed: Mapping[str, Sequence[str]],
    most: Mapping[str, int],
    num_places: int,
    start_s: float,
) -> float:
    """Start each job as soon as it can, and return when the last one ends, in seconds.

    Args:
        jobs: stage and seconds of each, in the order in which they start if several can.
        needed: jobs that have to end before a job can start.
        most: most jobs of a stage at once.
        num_places: most jobs at once.
        start_s: seconds from the end of the last needed job until the start.
    """
    num_waited_for = {key: len(of_key) for key, of_key in needed.items()}
    readers: dict[str, list[str]] = {}
    for key, of_key in needed.items():
        for read in of_key:
            readers.setdefault(read, []).append(key)
    ready = {stage: deque[str]() for stage in most}
    for key, (stage, _) in jobs.items():
        if not num_waited_for[key]:
            ready[stage].append(key)
    at_work = dict.fromkeys(most, 0)
    num_free = num_places
    events: list[tuple[float, bool, str]] = []  # when, whether a job ends or else may start, which
    now = 0.0
    while True:
        for stage, waiting in ready.items():
            while waiting and num_free and at_work[stage] < most[stage]:
                key = waiting.popleft()
                at_work[stage] += 1
                num_free -= 1
                heapq.heappush(events, (now + jobs[key][1], True, key))
        if not events:
            return now
        now, ends, key = heapq.heappop(events)
        stage = jobs[key][0]
        if not ends:
            ready[stage].append(key)
            continue
        at_work[stage] -= 1
        num_free += 1
        for reader in readers.get(key, ()):
            num_waited_for[reader] -= 1
            if not num_waited_for[reader]:
                heapq.heappush(events, (now + start_s, False, reader))
