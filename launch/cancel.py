#!/usr/bin/env python
"""Cancel all queued and running jobs of a run, and nothing else.

    python launch/cancel.py RUN

Published results are kept; sweep.py or rerun.py continue the run later.
"""

import argparse
import sys

from kdhpc.cluster import runs, slurm
from kdhpc.cluster.display import command
from kdhpc.cluster.ledger import Ledger
from kdhpc.errors import BusyError, DamagedError


def main(arguments: list[str]) -> int:
    """Record that the run is cancelled, then cancel its jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", help="look for RUN only in this folder")
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    _, config, _ = runs.current(run)
    ledger = Ledger(run.path)
    executor = ledger.requests()[-1].executor
    if executor == "local":
        if runs.is_locked(run):
            raise BusyError(f"{run.path}: runs in a process on this machine; press Ctrl-C there")
        if not any(job.job_id for job in ledger.jobs().values()):
            print("nothing is running")
            return 0
    # The request comes first, so that a gate that starts meanwhile sees it and submits nothing.
    try:
        runs.add_request(run, config, kind="cancel", executor=executor)
    except DamagedError as error:
        print(f"warning: not recorded, so a gate may go on: {error}", file=sys.stderr)
    job_names = {name for submission in ledger.submissions() for name in submission.job_names}
    job_ids = {task.job_id for task in slurm.queue() if task.name in job_names}
    slurm.cancel(sorted(job_ids))
    print(f"cancelled {len(job_ids)} jobs of {run.path.name}; sweep.py or rerun.py continue later")
    return 0


if __name__ == "__main__":
    command(main)
