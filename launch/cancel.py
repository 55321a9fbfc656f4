#!/usr/bin/env python
"""Cancel everything of a run that is queued or running, and nothing else.

    python launch/cancel.py RUN

Published results stay; sweep.py or rerun.py go on later.
"""

import argparse

from kdhpc.cluster import runs, slurm
from kdhpc.cluster.display import command
from kdhpc.cluster.ledger import Ledger
from kdhpc.errors import BusyError


def main(arguments: list[str]) -> int:
    """Say that the run is cancelled, then cancel its jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", default="runs")
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    _, config, _ = runs.current(run)
    ledger = Ledger(run.path)
    executor = ledger.requests()[-1].executor
    if executor == "local":
        if runs.is_locked(run):
            raise BusyError(f"{run.path}: runs in a process here; press Ctrl-C there")
        print("nothing is running")
        return 0
    # The request first: a gate that starts meanwhile sees it and submits nothing.
    runs.add_request(run, config, kind="cancel", executor=executor)
    names = {name for submission in ledger.submissions() for name in submission.job_names}
    jobs = {task.job_id for task in slurm.queue() if task.name in names}
    slurm.cancel(sorted(jobs))
    print(f"cancelled {len(jobs)} jobs of {run.path.name}; sweep.py or rerun.py go on later")
    return 0


if __name__ == "__main__":
    command(main)
