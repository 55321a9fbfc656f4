"""Let submitit write the text of a batch script."""

from submitit import SlurmExecutor


class ArrayExecutor(SlurmExecutor):  # type: ignore[misc]  # submitit is untyped here
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
