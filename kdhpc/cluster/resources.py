"""Resources that one array or gate asks Slurm for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kdhpc.cluster import slurm
from kdhpc.cluster.decide import Batch
from kdhpc.config.run import RunConfig, Slurm
from kdhpc.types import Json


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Options of one batch script, all defaults and remedies applied."""

    time_min: float
    mem_gb: float | None
    """Memory of each node."""
    cpus_per_task: int
    gpus_per_node: int = 0
    nodes: int = 1
    ranks_per_node: int = 1
    pack: int = 1
    """Processes of each task that work on shards of one rank at once."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    """Nodes to avoid, separated by commas."""
    dependency: str | None = None
    max_parallel: int = 1
    """Maximum number of tasks of the array that run at once."""
    signal_s: int
    """Seconds before the time limit at which a task is told to stop."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the command."""
    prefix: tuple[str, ...] = ()
    """Words in front of the command, such as a container runtime; a gate has none."""
    scratch: str | None = None
    """Folder on the node's own disk."""
    sbatch: Mapping[str, str | None] = field(default_factory=dict)
    """Options of sbatch that replace those above; None takes one away."""
    srun: tuple[str, ...] = ()
    """Options of srun."""


def array_resources(config: RunConfig, batch: Batch, uses_device: bool) -> Resources:
    """Return the resources of an array: config, then its stage, rerun and remedies change them."""
    limits, changes = config.slurm, batch.changes
    resources = Resources(
        time_min=limits.time_min,
        mem_gb=limits.mem_gb,
        cpus_per_task=limits.cpus_per_task,
        gpus_per_node=limits.gpus_per_node if uses_device else 0,
        nodes=batch.nodes,
        ranks_per_node=batch.ranks_per_node,
        account=limits.account,
        partition=limits.partition,
        qos=limits.qos,
        constraint=limits.constraint,
        exclude=limits.exclude,
        max_parallel=limits.max_parallel,
        signal_s=limits.signal_s,
        setup=limits.setup,
        prefix=limits.prefix,
        scratch=limits.scratch,
        sbatch=limits.sbatch,
        srun=limits.srun,
    )
    if batch.stage in limits.stages:
        resources = _with(resources, vars(limits.stages[batch.stage]))
    asked = dict(changes.asked)
    exclude = (resources.exclude, asked.pop("exclude", None), *changes.avoid)
    resources = _with(resources, asked)
    # What rerun takes away with null, such as memory, is left to the site.
    nothing: dict[str, Any] = {name: None for name, value in asked.items() if value is None}
    resources = replace(resources, **nothing)
    time_min, mem_gb = resources.time_min, resources.mem_gb
    if changes.time_factor > 1:
        limit_min = slurm.time_limit_min(resources.partition)
        time_min = min(time_min * changes.time_factor, limit_min)
    if changes.mem_factor > 1 and mem_gb is not None:
        limit_gb = limits.max_mem_gb or float("inf")
        mem_gb = max(mem_gb, min(mem_gb * changes.mem_factor, limit_gb))
    return replace(
        resources,
        pack=batch.pack,
        time_min=time_min,
        mem_gb=mem_gb,
        cpus_per_task=max(resources.cpus_per_task, config.threads),
        exclude=",".join(filter(None, exclude)) or None,
    )


def gate_resources(limits: Slurm, asked: Mapping[str, Json]) -> Resources:
    """Return the resources of the gate after an array.

    Args:
        limits: settings of the cluster.
        asked: fields of `slurm` that rerun asked for. A gate follows them to another partition or
            account, but keeps its own time, memory and cores.
    """
    resources = Resources(
        time_min=10,
        mem_gb=None if limits.mem_gb is None else 1.0,
        cpus_per_task=1,
        account=limits.account,
        partition=limits.partition,
        qos=limits.qos,
        constraint=limits.constraint,
        exclude=limits.exclude,
        signal_s=30,
        setup=limits.setup,
        scratch=limits.scratch,
        sbatch=limits.sbatch,
        srun=limits.srun,
    )
    kept = {"time_min", "mem_gb", "cpus_per_task", "gpus_per_node", "pack"}
    resources = _with(resources, {k: v for k, v in asked.items() if k not in kept})
    return replace(_with(resources, vars(limits.gate)), pack=1)


def _with(resources: Resources, changes: Mapping[str, Json]) -> Resources:
    """Replace the values that are given, those that are not None; options of sbatch add up."""
    given = {name: value for name, value in changes.items() if value is not None}
    given["sbatch"] = {**resources.sbatch, **given.get("sbatch", {})}
    return replace(resources, **given)
