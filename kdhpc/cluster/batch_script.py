"""Let submitit write the text of a batch script."""

import re
import shlex

from submitit import SlurmExecutor

from kdhpc.cluster.resources import Resources


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
        "ntasks_per_node": resources.ranks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "dependency": resources.dependency,
        "array_parallelism": resources.max_parallel,
        "signal_delay_s": resources.signal_s,
        "setup": [*resources.setup, *scratch] or None,
        "stderr_to_stdout": True,
        "wckey": None,
        "srun_args": [
            f"--cpus-per-task={resources.cpus_per_task}",
            "--kill-on-bad-exit=1",
            "--export=ALL",  # where a site submits with --export=NONE, srun would pass nothing on
            *resources.srun,
        ],
        # The log is set on sbatch's command line, because a script cannot quote a path safely.
        "additional_parameters": {"output": "/dev/null", "requeue": True, **_given(resources)},
    }
    executor._internal_update_parameters(**{k: v for k, v in parameters.items() if v is not None})
    executor.parameters["wckey"] = None
    text = _without(executor.script(command, num_tasks), resources)
    # submitit gives the step a log of its own; without it, all output of a task goes to one log.
    return re.sub(r"^(srun --unbuffered) --output \S+", r"\1", text, flags=re.MULTILINE)


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

    Three things differ from submitit's own use. The command finds its shards in a JSON file by the
    array index, so nothing is pickled. Jobs are submitted held, so that their ids are on disk
    before they run. srun repeats `--cpus-per-task`, which it no longer inherits since Slurm 22.05,
    and ends the whole step when one rank dies.
    """

    def script(self, command: str, num_tasks: int | None) -> str:
        """Return the batch script of an array of `num_tasks` tasks; of a single job if None."""
        if num_tasks is not None:
            self.parameters["map_count"] = num_tasks
        text: str = self._make_submission_file_text(command, "")
        return text
