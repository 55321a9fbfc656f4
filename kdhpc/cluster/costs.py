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


def hours_of_shards(run: Run, state: State, factors: Mapping[str, eta.Factor]) -> Hours:
    """Return what published shards have cost, and what the others that are asked for will.

    This reads no attempts, so those that failed or went on from a checkpoint are not counted.
    """
    plan, records = state.plan, state.scan.records
    stages = plan.stages_until(state.config.until)
    shares = {stage: _share(run, state, stage) for stage in plan.stages}
    uses_gpus = any(share.gpus_per_node for share in shares.values())
    done, left = 0.0, dict.fromkeys(stages, 0.0)
    for key, shard in plan.shards.items():
        cores, gpus = shares[shard.stage].of(shard)
        held = gpus if uses_gpus else cores
        if key in records and not records[key].reused_from:
            done += records[key].seconds * held / 3600
        if key not in state.situation.done and shard.stage in left:
            left[shard.stage] += shard.work * held / 3600
    return Hours(unit="GPU" if uses_gpus else "core", done=done, left=_range(left, factors))


def _range(hours: Mapping[str, float], factors: Mapping[str, eta.Factor]) -> eta.Range:
    """Correct estimated hours of stages by their factors, and add them up."""
    low, middle, high = (
        sum(value * factors[stage].at(deviations) for stage, value in hours.items())
        for deviations in (-eta.QUANTILE, 0.0, eta.QUANTILE)
    )
    return eta.Range(low=low, middle=middle, high=high)


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What the config gives to each shard of a stage that is worked on."""

    cores_per_rank: float
    gpus_per_node: float
    pack: int

    def of(self, shard: Shard) -> tuple[float, float]:
        """Return the number of cores and of GPUs that a shard has for itself."""
        num_ranks = shard.arm.nodes * shard.arm.ranks_per_node
        pack = self.pack if num_ranks == 1 else 1  # a shard of several ranks has a task of its own
        return num_ranks * self.cores_per_rank, shard.arm.nodes * self.gpus_per_node / pack


def _share(run: Run, state: State, stage: str) -> _Share:
    config, limits = state.config, state.config.slurm
    if state.request.executor == "local":
        return _Share(cores_per_rank=config.threads, gpus_per_node=0, pack=1)
    own = limits.stages.get(stage)
    cores = (own and own.cpus_per_task) or limits.cpus_per_task
    gpus = limits.gpus_per_node if own is None or own.gpus_per_node is None else own.gpus_per_node
    return _Share(
        cores_per_rank=max(config.threads, cores),
        gpus_per_node=gpus if run.pipeline.stage(stage).uses_device else 0,
        pack=(own and own.pack) or limits.pack,
    )


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
    used = _memory(run, state)
    newest = {submission.stage: submission for submission in state.submissions}
    return [
        StageCost(
            stage=stage,
            core_hours=sum(cores for cores, _, _ in of_stage),
            lost_core_hours=sum(cores for cores, _, useful in of_stage if not useful),
            left_core_hours=_left_core_hours(run, state, stage, factors[stage]),
            gpu_hours=sum(gpus for _, gpus, _ in of_stage),
            memory_gb=used.get(stage, (0.0, 0.0))[0],
            gpu_memory_gb=used.get(stage, (0.0, 0.0))[1],
            asked_gb=newest[stage].resources.get("mem_gb") if stage in newest else None,
        )
        for stage, of_stage in spent.items()
    ]


def _attempts(run: Run, state: State) -> Iterator[_Attempt]:
    """Yield every attempt of a planned shard.

    One that died without a word ended when its failure was recorded; if another attempt of the same
    task followed, nobody knows when, and it counts as nothing.
    """
    ledger, records = Ledger(run.path), state.scan.records
    failed_at = {(f.submission, f.key): f.time for f in ledger.failures()}
    newest = {key: submission.number for submission in state.submissions for key in submission.keys}
    for submission in state.submissions:
        for index in range(len(submission.tasks)):
            attempts = ledger.attempts(submission.number, index)
            last = {attempt.key: attempt for attempt in attempts}
            for attempt in attempts:
                key, started = attempt.key, attempt.started
                if key not in state.plan.shards:
                    continue
                record = records.get(key)
                own = record is not None and not record.reused_from
                if record and own and abs(record.attempt["started"] - started) < SAME_ATTEMPT_S:
                    ended, useful = started + record.seconds, True
                elif attempt.ended is not None:
                    ended, useful = attempt.ended, attempt.stopped
                elif (
                    key in state.situation.active & state.running
                    and newest[key] == submission.number
                    and attempt is last[key]
                ):
                    ended, useful = time.time(), True
                elif attempt is last[key]:
                    ended, useful = failed_at.get((submission.number, key), started), False
                else:
                    ended, useful = started, False
                seconds = max(0.0, ended - started)
                yield _Attempt(key=key, seconds=seconds, useful=useful, submission=submission)


def _held(shard: Shard, submission: Submission, config: RunConfig) -> tuple[float, float]:
    """Return the number of cores and of GPUs that an attempt of a shard had for itself."""
    asked = submission.resources
    share = _Share(
        cores_per_rank=float(asked.get("cpus_per_task") or config.threads),
        gpus_per_node=float(asked.get("gpus_per_node") or 0),
        pack=submission.pack,
    )
    return share.of(shard)


def _left_core_hours(run: Run, state: State, stage: str, factor: eta.Factor) -> eta.Range:
    """Return the core-hours of the shards of a stage that are not done."""
    share = _share(run, state, stage)
    left = [s for s in state.plan.stage(stage) if s.key not in state.situation.done]
    hours = sum(shard.work * share.of(shard)[0] for shard in left) / 3600
    return _range({stage: hours}, {stage: factor})


def _memory(run: Run, state: State) -> dict[str, tuple[float, float]]:
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
    # The jobs of a restored run are those of another cluster.
    job_ids = [] if run.is_restored else sorted(stage_of)
    for job_id, node_gb in slurm.memory_used(job_ids).items():
        if stage_of[job_id] in state.plan.stages:
            note(stage_of[job_id], node_gb, 0.0)
    return used
