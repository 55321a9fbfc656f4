#!/usr/bin/env python
"""Show how a run stands: counts a stage, causes of failures, time left.

    python launch/status.py RUN [--watch] [--json]

RUN is a name in runs/ or a path. Exit code 0 if the run is complete, else 1. Works without
accounting, and without Slurm.
"""

import argparse
import time

from rich.live import Live

from kdhpc.cluster import runs
from kdhpc.cluster.display import command, console, status_view
from kdhpc.cluster.status import look


def main(arguments: list[str]) -> int:
    """Read and show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--watch", action="store_true", help="stay until nothing runs")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    state, status = look(run)
    if options.json:
        print(status.as_json())
    elif options.watch:
        with Live(status_view(status), console=console(), refresh_per_second=1) as live:
            while state.situation.active:
                time.sleep(2)
                state, status = look(run)
                live.update(status_view(status))
    else:
        console().print(status_view(status))
    return 0 if status.complete else 1


if __name__ == "__main__":
    command(main)
