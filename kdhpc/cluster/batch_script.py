"""Let submitit write the text of a batch script."""

import shlex

from submitit import SlurmExecutor

from kdhpc.cluster.resources import Resources
from kdhpc.cluster.slurm import command_line

RENDEZVOUS = (
    'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
    r"""address=$(scontrol show node "${first:?}" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')""",
    'export MASTER_ADDR="${MASTER_ADDR:-${address:-$first}}"',
)
"""Shell lines that set MASTER_ADDR, if it is not set, to the NodeAddr of the first node, which
every node of a job can reach. They run outside the prefix, because containers have no scontrol."""


def batch_script(*, name: str, command: str, num_tasks: int | None, resources: Resources) -> str:
    """Return the batch script of an array or a gate; the same arguments give the same text.

    Args:
        name: name of the job.
        command: shell text that each task runs.
        num_tasks: number of array elements, numbered from 0; None for a single job.
        resources: options of the script.
    """
    executor = _Executor(folder="logs")
    scratch = (
        [f"export KDHPC_SCRATCH={shlex.quote(resources.scratch)}"] if resources.scratch else []
    )
    parameters = {
        "job_name": name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "time": max(1, round(resources.time_min)),
        "mem": f"{max(1, round(resources.mem_gb * 1024))}M" if resources.mem_gb else None,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node * resources.pack,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "dependency": resources.dependency,
        "array_parallelism": resources.max_parallel,
        "signal_delay_s": resources.signal_s,
        "setup": [*resources.setup, *scratch, *(RENDEZVOUS if resources.nodes > 1 else ())] or None,
        "stderr_to_stdout": True,
        "wckey": None,
        "use_srun": False,  # submitit's srun would give each step logs of its own
        # The log is set on sbatch's command line, because a script cannot quote a path safely.
        # Limits of the login node, or of a gate, are not those of the job.
        "additional_parameters": {
            "output": "/dev/null",
            "propagate": "NONE",
            "requeue": True,
            **_given(resources),
        },
    }
    executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    executor.parameters["wckey"] = None
    srun = command_line(["srun", "--unbuffered", *_srun_options(resources)])
    return _without(executor.script(f"{srun} {command}", num_tasks), resources)


def _srun_options(resources: Resources) -> list[str]:
    """Return the options of srun, those of the user last.

    srun repeats `--cpus-per-task`, which it no longer inherits since Slurm 22.05. If one rank of a
    training dies, it ends the others, but the processes of a packed task do not depend on each
    other. Where a site submits with --export=NONE, srun would pass nothing on.
    """
    ends = ["--kill-on-bad-exit=1"]
    if resources.pack > 1:
        ends = ["--kill-on-bad-exit=0", "--wait=0"]
    cpus = f"--cpus-per-task={resources.cpus_per_task}"
    return [cpus, *ends, "--export=ALL", *resources.srun]


def _given(resources: Resources) -> dict[str, str | bool]:
    """Return the options of sbatch that are given, by the names that submitit uses."""
    return {
        option.replace("-", "_"): value == "true" or value
        for option, value in resources.sbatch.items()
        if value is not None
    }


def _without(text: str, resources: Resources) -> str:
    """Take away the lines of options that are not wanted."""
    taken = [f"#SBATCH --{option}" for option, value in resources.sbatch.items() if value is None]
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if line.strip().partition("=")[0] not in taken)


class _Executor(SlurmExecutor):  # type: ignore[misc]  # submitit is untyped here
    """submitit's batch script and parameters around a command of kdhpc.

    Two things differ from submitit's own use. The command finds its shards in a JSON file by the
    array index, so nothing is pickled. Jobs are submitted held, so that their ids are on disk
    before they run.
    """

    def script(self, command: str, num_tasks: int | None) -> str:
        """Return the batch script of an array of `num_tasks` tasks; of a single job if None."""
        if num_tasks is not None:
            self.parameters["map_count"] = num_tasks
        text: str = self._make_submission_file_text(command, "")
        return text
