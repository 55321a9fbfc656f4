#!/usr/bin/env python
"""Read every published file of a run again and compare it with its digest.

    python launch/verify.py RUN

Exit code 0 if every byte is as published, else 1 with the names of the others.
"""

import argparse

from rich.progress import track

from kdhpc.artifacts import verify
from kdhpc.cluster import runs
from kdhpc.cluster.display import command, console
from kdhpc.errors import DamagedError


def main(arguments: list[str]) -> int:
    """Verify all records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", default="runs")
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    scan = run.scan()
    problems = list(scan.damaged.values())
    for record in track(list(scan.records.values()), "reading", console=console()):
        try:
            verify(record)
        except DamagedError as error:
            problems.append(str(error))
    for problem in problems:
        print(problem)
    print(f"{len(scan.records) + len(scan.damaged)} records, {len(problems)} damaged")
    return 1 if problems else 0


if __name__ == "__main__":
    command(main)
