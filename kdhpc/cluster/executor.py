"""Text of a batch script, by submitit."""

from submitit import SlurmExecutor


class ArrayExecutor(SlurmExecutor):  # type: ignore[misc]  # submitit is untyped here
    """submitit's script and parameters around a command of ours.

    What differs, and why: the command reads a JSON map, so nothing is pickled and the index is the
    only thing that a task needs; jobs are submitted held, so that their ids are on disk before they
    run; srun restates `--cpus-per-task`, which Slurm does not inherit since 22.05, and ends the
    whole step when one rank dies.
    """

    def script(self, command: str, num_tasks: int | None) -> str:
        """Text of the batch script for an array of `num_tasks` tasks, or one job."""
        if num_tasks is not None:
            self.parameters["map_count"] = num_tasks
        text: str = self._make_submission_file_text(command, "")
        return text
