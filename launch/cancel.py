#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Cancel all queued and running jobs of a run, and nothing else.

    python launch/cancel.py RUN

Published results are kept; sweep.py or rerun.py continue the run later.
"""

import argparse
import sys
import time

from kdhpc.cluster import completion, runs, slurm
from kdhpc.cluster.display import command
from kdhpc.cluster.ledger import Ledger
from kdhpc.cluster.runs import Run
from kdhpc.errors import BusyError, DamagedError

GATES_END_S = 30.0
"""How long a running gate may take to see the request; it may be in the middle of an sbatch."""


def main(arguments: list[str]) -> int:
    """Record that the run is cancelled, then cancel its jobs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", help="look for RUN only in this folder")
    completion.answer(parser)
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    runs.check_not_restored(run, "it has no jobs; cancel the run that was archived")
    _, config, _ = runs.current(run)
    ledger = Ledger(run.path)
    executor = ledger.requests()[-1].executor
    if executor == "local":
        if runs.is_locked(run):
            raise BusyError(f"{run.path}: runs in a process on this machine; press Ctrl-C there")
        if not any(job.job_id for job in ledger.jobs().values()):
            print("nothing is running")
            return 0
    # The request comes first: a gate that runs or starts meanwhile sees it and submits nothing.
    patience_s = GATES_END_S
    try:
        runs.add_request(run, config, kind="cancel", executor=executor)
    except DamagedError as error:
        print(f"warning: not recorded, so a gate may go on: {error}", file=sys.stderr)
        patience_s = 0.0
    num_jobs = cancel_jobs(run, patience_s)
    print(f"cancelled {num_jobs} jobs of {run.path.name}; sweep.py or rerun.py continue later")
    return 0


def cancel_jobs(run: Run, patience_s: float) -> int:
    """Cancel the jobs of a run; gates that run may end by themselves first.

    A gate that is killed while it submits would leave a held job that nobody knows of.

    Args:
        run: the run.
        patience_s: seconds after which gates that still run are cancelled too.

    Returns:
        The number of cancelled jobs.
    """
    cancelled: set[str] = set()
    deadline = time.monotonic() + patience_s
    while True:
        submissions = Ledger(run.path).submissions()
        names = {name for submission in submissions for name in submission.job_names}
        gates = {submission.gate_name for submission in submissions}
        jobs = [task for task in slurm.queue() if task.name in names]
        late = time.monotonic() >= deadline
        at_work = {t.job_id for t in jobs if t.name in gates and t.state == "RUNNING"}
        to_cancel = {t.job_id for t in jobs} - cancelled - (set() if late else at_work)
        slurm.cancel(sorted(to_cancel))
        cancelled |= to_cancel
        if late or not at_work:
            return len(cancelled)
        time.sleep(1)


if __name__ == "__main__":
    command(main)
