"""Config that every run has, whatever its pipeline, and the cluster's settings."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from kdhpc.config.bounds import AtLeastTwo, Count, Positive, Whole, Word, out_of_bounds, refuse
from kdhpc.config.model import Device


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """Resources that a task requests from Slurm; fields not given take the values of `slurm`."""

    account: Word | None = None
    """Account to charge."""
    partition: Word | None = None
    """Slurm partition."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Node features."""
    exclude: Word | None = None
    """Nodes to avoid."""
    time_min: Count | None = None
    """Time limit of a task, in minutes or as sbatch has it."""
    mem_gb: Positive | None = None
    """Memory per node, in GB."""
    cpus_per_task: Count | None = None
    """Number of cores per process."""
    gpus_per_node: Whole | None = None
    """Number of GPUs per node."""
    pack: Count | None = None
    """Number of shards of one rank that a task works on at once."""
    sbatch: dict[str, Word | None] = field(default_factory=dict)
    """Options of sbatch, in addition to those of `slurm.sbatch`; see there."""
    srun: tuple[Word, ...] | None = None
    """Options of srun, instead of those of `slurm.srun`."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Settings of your cluster.

    Nothing here changes results, so all of it may change between two launches.
    """

    account: Word | None = None
    """Account to charge; Slurm's default if not given."""
    partition: Word | None = None
    """Partition to submit to; Slurm's default if not given."""
    qos: Word | None = None
    """Quality of service to request; Slurm's default if not given."""
    constraint: Word | None = None
    """Node features to request, as for `sbatch --constraint`."""
    exclude: Word | None = None
    """Nodes to avoid, as for `sbatch --exclude`."""
    time_min: Count = 60
    """Time limit of a task, in minutes or as sbatch has it: 90, 1:30:00 and 0-1:30 are the same."""
    mem_gb: Positive | None = 4.0
    """Memory per node, in GB; null leaves it to the site."""
    cpus_per_task: Count = 1
    """Number of cores per process; at least `threads`."""
    gpus_per_node: Whole = 0
    """Number of GPUs per node, for stages that use a device."""
    gpu_mem_gb: Positive | None = None
    """Memory of one GPU, in GB; with it, --dry-run prints how many rows of sampling fit."""
    pack: Count = 1
    """Number of shards of one rank that a task works on at once, each in a process with
    `cpus_per_task` cores and a GPU of its own. Where whole nodes are allocated or billed, it is
    their number of GPUs. Memory and GPUs stay those of the node."""
    sbatch: dict[str, Word | None] = field(default_factory=dict)
    """Any option of sbatch for all jobs, gates too, such as {reservation: NAME, gres: "gpu:a:1"};
    `true` gives an option without a value, and null takes one away that kdhpc would give."""
    srun: tuple[Word, ...] = ()
    """Any options of srun, such as [--gpu-bind=none]."""
    stages: dict[str, StageResources] = field(default_factory=dict)
    """Resources by stage name; they override the fields above."""
    gate: StageResources = field(default_factory=lambda: StageResources(time_min=10))
    """Resources of the gate, the small job after each array that submits what has become ready. It
    gets 1 GB of memory, if `mem_gb` is given at all."""
    max_parallel: Count = 64
    """Largest number of tasks of one array that run at once."""
    max_array: Count | None = None
    """Largest number of tasks in one array; the cluster's MaxArraySize if not given."""
    max_mem_gb: Positive | None = None
    """Largest memory in GB that a shard is given after it ran out of memory; no limit if not
    given."""
    max_submit: AtLeastTwo | None = None
    """Largest number of jobs of this run in the queue, each array task counted as one. It is at
    least 2, a task and its gate; no limit if not given."""
    task_min: Positive = 10.0
    """Minutes of work that are packed into one task, by measured or estimated speed."""
    canary: Whole = 2
    """Number of tasks of a large stage that are tried first. If they all fail the same way, the
    rest is not started."""
    max_attempts: Count = 3
    """Number of failed attempts after which a shard waits for `rerun.py`."""
    signal_s: Whole = 60
    """Seconds before the time limit at which a task is told to stop."""
    setup: tuple[str, ...] = ()
    """Shell lines to run before the work, such as those that load modules or activate conda."""
    prefix: tuple[str, ...] = ()
    """Words to put before the command of a task, such as [apptainer, exec, --nv, image.sif]. Gates
    run without them, with the Python of the launch."""
    scratch: str | None = None
    """Node-local folder for copies of models and for just-in-time caches. If it is not given,
    models are read where they are and caches go to the system's temporary folder."""
    advance_from: Literal["gate", "login"] = "gate"
    """What submits arrays that have become ready. Choose `login` if compute nodes may not submit,
    and keep `sweep.py --watch` running on the login node."""
    mail_user: str | None = None
    """Address that gets a mail when the run ends or stops; nobody does if it is not given."""
    on_end: str | None = None
    """Program to call when the run ends or stops; its arguments are the run folder and `complete`
    or `stopped`."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config that every run has, whatever its pipeline."""

    pipeline: str = "language"
    """Pipeline to run: `language`, `mixture`, or `module:NAME` for a `Pipeline` elsewhere."""
    name: str = "run"
    """Name of the run's folder inside `runs_dir`."""
    seed: int = 0
    """Seed of all random numbers of the run."""
    runs_dir: str = "runs"
    """Folder that holds the runs; on a cluster it must be on a file system that all nodes share."""
    cluster: str = "auto"
    """Name of a YAML file in configs/cluster/, such as `local`, `slurm` or `sites/lumi`, or `auto`,
    which chooses Slurm if `sbatch` works."""
    executor: Literal["auto", "local", "slurm"] = "auto"
    """What runs the tasks; the cluster's YAML sets it."""
    until: str | None = None
    """Last stage to run. Later stages are planned, and start when a launch no longer has this."""
    reuse: str | None = None
    """Another run, by name or folder, whose published shards with the same recipes are taken into
    this run by hard links, when it is submitted. Both runs must be on one file system."""
    small: bool = False
    """Whether the run may start on this machine without being asked to if there is no Slurm."""
    local_workers: Whole = 0
    """Number of tasks that run at once on this machine; 0 means one per GPU, or one per core where
    there is no GPU or `device` is `cpu`."""
    threads: Count = 1
    """Number of threads per process, under every executor. It is part of the recipe because sums
    round differently."""
    device: Device = "auto"
    """Device that models run on; `auto` takes a GPU if the task sees one."""
    slurm: Slurm = field(default_factory=Slurm)
    """Settings of your cluster."""


OWN_OPTIONS = {
    "array", "dependency", "error", "hold", "job-name", "open-mode", "output", "parsable", "wrap",
}  # fmt: skip
"""Options of sbatch that kdhpc depends on."""
MAX_NAME_BYTES = 200
"""Longest name of a run's folder in bytes: 255 for a file name, less what the queue adds."""


def run_problems(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the config that every run has."""
    yield from out_of_bounds(config, RunConfig)
    name = config.name
    if not name or name in {".", ".."} or "/" in name or "\0" in name or name.startswith("-"):
        yield (
            f"name={name!r}: expected the name of one folder inside {config.runs_dir}, without '/'"
        )
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        yield f"name={name!r}: expected at most {MAX_NAME_BYTES} bytes"
    yield from _sbatch_problems(config.slurm)
    yield from _pack_problems(config.slurm)


def _sbatch_problems(slurm: Slurm) -> Iterator[str]:
    """Yield what is wrong with the names of options of sbatch."""
    owners = {"slurm": slurm.sbatch, "slurm.gate": slurm.gate.sbatch}
    owners |= {f"slurm.stages.{name}": stage.sbatch for name, stage in slurm.stages.items()}
    for owner, options in owners.items():
        for name in options:
            if name in OWN_OPTIONS:
                yield f"{owner}.sbatch.{name}: kdhpc sets this option itself; expected another one"
            elif not re.fullmatch(r"[a-z][a-z-]*", name):
                yield (
                    f"{owner}.sbatch.{name}: expected the long name of an option without its "
                    "hyphens, such as reservation"
                )


def _pack_problems(slurm: Slurm) -> Iterator[str]:
    """Yield where more processes than GPUs would share a node with several GPUs."""
    packs = {"slurm": (slurm.pack, slurm.gpus_per_node)}
    for name, stage in slurm.stages.items():
        gpus = slurm.gpus_per_node if stage.gpus_per_node is None else stage.gpus_per_node
        packs[f"slurm.stages.{name}"] = stage.pack or 1, gpus
    for key, (pack, gpus) in packs.items():
        if pack > gpus > 1:
            yield f"{key}.pack={pack}: expected at most gpus_per_node={gpus}, one for each process"


def check_run(config: RunConfig) -> None:
    """Check the config that every run has.

    Raises:
        InputError: if a value is not possible; names the key, its value and what was expected.
    """
    refuse(run_problems(config))
