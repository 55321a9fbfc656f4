"""What a run has cost, stage by stage: hours of cores and GPUs, memory, and energy by assumption.

Hours are those of attempts, from their start to their end, times the cores and GPUs that they had.
An attempt that published its shard, or stopped at a checkpoint when it was told to, was useful; any
other was lost.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from kdhpc.cluster import eta, slurm
from kdhpc.cluster.ledger import Ledger, Submission
from kdhpc.cluster.observe import State
from kdhpc.cluster.runs import Run
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Shard

CORE_WATTS = 8.0
"""Assumed power of one busy core with its part of the machine, at the wall."""
GPU_WATTS = 700.0
"""Assumed power of one busy GPU: the limit of an H100's board. It is an upper bound."""
ROOM = 1.5
"""Memory that is suggested, by the most that was used."""
SAME_ATTEMPT_S = 1.0
"""How far apart the times of an attempt in its record and in the ledger may be."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage has cost, and what is left of it."""

    stage: str
    core_hours: float
    """Core-hours of all attempts."""
    lost_core_hours: float
    """Those of attempts that came to nothing."""
    left_core_hours: eta.Range
    gpu_hours: float
    memory_gb: float
    """Most memory of a node that was seen in use, in GB of 10^9 bytes; 0 if it is not known."""
    gpu_memory_gb: float
    """Most memory of one GPU that PyTorch reserved; 0 if it is not known."""
    asked_gb: float | None
    """Memory of each node that the newest task asked Slurm for; None if it asked for none."""

    @property
    def energy_kwh(self) -> float:
        """Energy by assumption."""
        return (self.core_hours * CORE_WATTS + self.gpu_hours * GPU_WATTS) / 1000

    @property
    def suggested_gb(self) -> int | None:
        """Memory to ask for from now on; None if what is asked for fits what was used."""
        enough = max(1, math.ceil(ROOM * self.memory_gb))
        if not self.memory_gb or self.asked_gb is None:
            return None
        fits = self.asked_gb * 0.9 >= self.memory_gb and self.asked_gb < 2 * enough
        return None if fits else enough


@dataclass(frozen=True, kw_only=True)
class Hours:
    """Hours of GPUs, or of cores where tasks have none."""

    unit: Literal["GPU", "core"]
    done: float
    """Those of published shards."""
    left: eta.Range
    """Those of the others, by estimate."""


def hours_of_shards(state: State, factors: Mapping[str, eta.Factor]) -> Hours:
    """Return what published shards have cost, and what the others will.

    This reads no attempts, so those that failed or went on from a checkpoint are not counted.
    """
    plan, own = state.plan, [r for r in state.scan.records.values() if not r.reused_from]
    uses_gpus = state.request.executor == "slurm" and bool(state.config.slurm.gpus_per_node)
    what = 1 if uses_gpus else 0
    held = {stage: _held_by_config(state, stage)[what] for stage in plan.stages}
    done = sum(
        r.seconds * _num_ranks(plan.shards[r.key]) * held[plan.shards[r.key].stage] / 3600
        for r in own
        if r.key in plan.shards
    )
    left = [_left(state, stage, factors[stage], held[stage]) for stage in plan.stages]
    total = eta.Range(
        low=sum(of.low for of in left),
        middle=sum(of.middle for of in left),
        high=sum(of.high for of in left),
    )
    return Hours(unit="GPU" if uses_gpus else "core", done=done, left=total)


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    key: str
    seconds: float
    useful: bool
    submission: Submission


def costs(run: Run, state: State, factors: Mapping[str, eta.Factor]) -> list[StageCost]:
    """Return the costs of every planned stage, in order.

    Args:
        run: the run.
        state: its state.
        factors: how long shards of each stage take by what was estimated.
    """
    spent: dict[str, list[tuple[float, float, bool]]] = {stage: [] for stage in state.plan.stages}
    for attempt in _attempts(run, state):
        shard = state.plan.shards[attempt.key]
        cores, gpus = _held(shard, attempt.submission, state.config)
        hours = attempt.seconds / 3600
        spent[shard.stage].append((hours * cores, hours * gpus, attempt.useful))
    used = _memory(state)
    newest = {submission.stage: submission for submission in state.submissions}
    return [
        StageCost(
            stage=stage,
            core_hours=sum(cores for cores, _, _ in of_stage),
            lost_core_hours=sum(cores for cores, _, useful in of_stage if not useful),
            left_core_hours=_left(state, stage, factors[stage], _held_by_config(state, stage)[0]),
            gpu_hours=sum(gpus for _, gpus, _ in of_stage),
            memory_gb=used.get(stage, (0.0, 0.0))[0],
            gpu_memory_gb=used.get(stage, (0.0, 0.0))[1],
            asked_gb=newest[stage].resources.get("mem_gb") if stage in newest else None,
        )
        for stage, of_stage in spent.items()
    ]


def _attempts(run: Run, state: State) -> Iterator[_Attempt]:
    """Yield every attempt of a planned shard whose end is known, or that goes on."""
    ledger, records = Ledger(run.path), state.scan.records
    failed_at = {(f.submission, f.key): f.time for f in ledger.failures()}
    for submission in state.submissions:
        for index in range(len(submission.tasks)):
            for attempt in ledger.attempts(submission.number, index):
                key, started = attempt.key, attempt.started
                if key not in state.plan.shards:
                    continue
                record = records.get(key)
                own = record is not None and not record.reused_from
                if record and own and abs(record.attempt["started"] - started) < SAME_ATTEMPT_S:
                    ended, useful = started + record.seconds, True
                elif attempt.ended is not None:
                    ended, useful = attempt.ended, attempt.stopped
                elif key in state.situation.active and key in state.running:
                    ended, useful = time.time(), True
                else:  # it died without a word
                    ended, useful = failed_at.get((submission.number, key), started), False
                seconds = max(0.0, ended - started)
                yield _Attempt(key=key, seconds=seconds, useful=useful, submission=submission)


def _held(shard: Shard, submission: Submission, config: RunConfig) -> tuple[float, float]:
    """Return the number of cores and of GPUs that an attempt of a shard had for itself."""
    asked = submission.resources
    cores = _num_ranks(shard) * float(asked.get("cpus_per_task") or config.threads)
    gpus = float(asked.get("gpus_per_node") or 0) * shard.arm.nodes / submission.pack
    return cores, gpus


def _num_ranks(shard: Shard) -> int:
    return shard.arm.nodes * shard.arm.ranks_per_node


def _held_by_config(state: State, stage: str) -> tuple[float, float]:
    """Return the cores and GPUs that the config gives to each rank of a stage."""
    threads = float(state.config.threads)
    if state.request.executor == "local":
        return threads, 0.0
    limits = state.config.slurm
    own = limits.stages.get(stage)
    cores = (own and own.cpus_per_task) or limits.cpus_per_task
    gpus = limits.gpus_per_node if own is None or own.gpus_per_node is None else own.gpus_per_node
    return max(threads, float(cores)), min(1.0, float(gpus))


def _left(state: State, stage: str, factor: eta.Factor, held: float) -> eta.Range:
    """Return the hours of a stage that are left, times what each of its ranks holds."""
    hours = sum(
        shard.work * _num_ranks(shard) * held / 3600
        for shard in state.plan.stage(stage)
        if shard.key not in state.situation.done
    )
    low, middle, high = (hours * factor.at(d) for d in (-eta.QUANTILE, 0.0, eta.QUANTILE))
    return eta.Range(low=low, middle=middle, high=high)


def _memory(state: State) -> dict[str, tuple[float, float]]:
    """Return the most memory of a node, and of a GPU, that tasks of each stage used, in GB.

    It is what records say of their processes, or what accounting says of the tasks, if that is
    more.
    """
    pack = {key: s.pack for s in state.submissions for key in s.keys}
    used: dict[str, tuple[float, float]] = {}

    def note(stage: str, node_gb: float, gpu_gb: float) -> None:
        before = used.get(stage, (0.0, 0.0))
        used[stage] = max(before[0], node_gb), max(before[1], gpu_gb)

    for key, record in state.scan.records.items():
        if (shard := state.plan.shards.get(key)) and not record.reused_from:
            processes = shard.arm.ranks_per_node * pack.get(key, 1)
            facts = record.attempt
            note(
                shard.stage,
                processes * float(facts.get("memory_gb", 0.0)),
                float(facts.get("gpu_memory_gb", 0.0)),
            )
    stage_of = {
        job.job_id: submission.stage
        for submission in state.submissions
        if (job := state.jobs.get(submission.number)) and job.job_id
    }
    for job_id, node_gb in slurm.memory_used(sorted(stage_of)).items():
        if stage_of[job_id] in state.plan.stages:
            note(stage_of[job_id], node_gb, 0.0)
    return used
