#!/usr/bin/env python
"""Show the state of a run: counts for each stage, causes of failures, time left.

    python launch/status.py RUN [--watch] [--json]
    python launch/status.py RUN --explain STAGE/ARM/NAME    explain the state of this shard

RUN is a name in runs/ or a path. The exit code is 0 if the run (or that shard) is complete, else 1.
Works without accounting, and without Slurm.
"""

import argparse
import time

from rich.live import Live

from kdhpc.cluster import runs
from kdhpc.cluster.display import command, console, status_view
from kdhpc.cluster.explain import explain
from kdhpc.cluster.status import look, status_of


def main(arguments: list[str]) -> int:
    """Observe the run and show it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument(
        "--watch", action="store_true", help="stay until nothing is queued or running"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--explain", metavar="SHARD", help="explain the state of this shard")
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    state = look(run)
    if options.explain:
        print("\n".join(explain(run, state, options.explain)))
        return 0 if options.explain in state.situation.done else 1
    status = status_of(run, state)
    if options.json:
        print(status.as_json())
    elif options.watch:
        with Live(status_view(status), console=console(), refresh_per_second=1) as live:
            while state.situation.active or state.queued:
                time.sleep(2)
                state = look(run)
                status = status_of(run, state)
                live.update(status_view(status))
    else:
        console().print(status_view(status))
    return 0 if status.complete else 1


if __name__ == "__main__":
    command(main)
