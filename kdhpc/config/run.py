"""What every run has, whatever its pipeline, and the cluster."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from kdhpc.config.bounds import AtLeastTwo, Count, Positive, Whole, Word, out_of_bounds, refuse
from kdhpc.config.model import Device


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What one task of a stage asks of Slurm; what is not given comes from `slurm` itself."""

    partition: Word | None = None
    """Partition."""
    time_min: Count | None = None
    """Time limit in minutes."""
    mem_gb: Positive | None = None
    """Memory a node."""
    cpus_per_task: Count | None = None
    """Cores a process."""
    gpus_per_node: Whole | None = None
    """GPUs a node."""


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Your cluster. Nothing here changes results, so all of it may change between two launches."""

    account: Word | None = None
    """Account to charge."""
    partition: Word | None = None
    """Partition; Slurm's default if not given."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Node features."""
    exclude: Word | None = None
    """Nodes to avoid."""
    time_min: Count = 60
    """Time limit of a task in minutes."""
    mem_gb: Positive = 4.0
    """Memory a node."""
    cpus_per_task: Count = 1
    """Cores a process; at least `threads`."""
    gpus_per_node: Whole = 0
    """GPUs a node for stages that use a device."""
    gpu_mem_gb: Positive | None = None
    """Memory of one GPU; --dry-run then says which `sampling.batch_rows` fits."""
    stages: dict[str, StageResources] = field(default_factory=dict)
    """By stage name, what differs from the above."""
    gate: StageResources = field(default_factory=lambda: StageResources(time_min=10, mem_gb=1.0))
    """The small job after each array that submits what has become ready."""
    max_parallel: Count = 64
    """Tasks of one array that run at once."""
    max_array: Count | None = None
    """Tasks of one array; the cluster's MaxArraySize if not given."""
    max_mem_gb: Positive | None = None
    """Memory that a shard that ran out of it may be given at most; no limit if not given."""
    max_submit: AtLeastTwo | None = None
    """Jobs of this run in the queue, array tasks counted singly: at least a task and its gate; no
    limit if not given."""
    task_min: Positive = 10.0
    """Work packed into one task, in minutes, by measured or estimated speed."""
    canary: Whole = 2
    """Tasks of a large stage that are tried first; if they fail alike, the rest is not started."""
    max_attempts: Count = 3
    """Failed attempts of a shard before it waits for `rerun.py`."""
    signal_s: Whole = 60
    """Seconds before the time limit at which a task is told to stop."""
    setup: tuple[str, ...] = ()
    """Shell lines before the work: modules, conda."""
    prefix: tuple[str, ...] = ()
    """Words before the command, such as [apptainer, exec, --nv, image.sif]."""
    scratch: str | None = None
    """Node-local folder for copies of models and just-in-time caches; if not given, models are read
    where they are and caches go to the system's temporary folder."""
    advance_from: Literal["gate", "login"] = "gate"
    """`login` where compute nodes may not submit: keep `sweep.py --watch` running there instead."""
    mail_user: str | None = None
    """Address for a mail when the run ends or stops."""
    on_end: str | None = None
    """Program called with (run folder, `complete` or `stopped`) when the run ends or stops."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every run has, whatever its pipeline."""

    pipeline: str = "language"
    """`language`, `mixture`, or `module:NAME` of a `Pipeline` elsewhere."""
    name: str = "run"
    """Folder of the run inside `runs_dir`."""
    seed: int = 0
    """Of all random numbers of the run."""
    runs_dir: str = "runs"
    """Where runs are kept; on a cluster, a file system that all nodes share."""
    cluster: str = "auto"
    """`local`, `slurm`, a name in configs/cluster/, or `auto`: Slurm where `sbatch` works."""
    executor: Literal["auto", "local", "slurm"] = "auto"
    """What runs the tasks; set by the cluster's YAML."""
    small: bool = False
    """Whether the run may start on this machine by itself where there is no Slurm."""
    local_workers: Whole = 0
    """Tasks at once on this machine; 0 means one a core."""
    threads: Count = 1
    """Threads a process, under every executor. Part of the result: sums round differently."""
    device: Device = "auto"
    """Where models run; `auto` takes a GPU if the task sees one."""
    slurm: Slurm = field(default_factory=Slurm)
    """Your cluster."""


MAX_NAME_BYTES = 200
"""Of a run's folder: 255 for a file name, less what is added in the queue."""


def run_problems(config: RunConfig) -> Iterator[str]:
    """What is wrong with what every run has."""
    yield from out_of_bounds(config, RunConfig)
    name = config.name
    if not name or name in {".", ".."} or "/" in name or "\0" in name or name.startswith("-"):
        yield (
            f"name={name!r}: expected the name of one folder inside {config.runs_dir}, without '/'"
        )
    if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
        yield f"name={name!r}: expected at most {MAX_NAME_BYTES} bytes"


def check_run(config: RunConfig) -> None:
    """Check what every run has.

    Raises:
        InputError: naming the key, its value, what is expected.
    """
    refuse(run_problems(config))
