#!/usr/bin/env python
"""Read every published file of a run again and compare it with its digest.

    python launch/verify.py RUN [--put-aside]

Exit code 0 if every byte is as published, else 1 with the names of the others. Nothing is changed;
with --put-aside the records of damaged shards are renamed, so that sweep.py makes those again.
"""

import argparse

from rich.progress import track

from kdhpc.cluster import runs
from kdhpc.cluster.display import command, console
from kdhpc.errors import DamagedError
from kdhpc.storage.run_folder import verify


def main(arguments: list[str]) -> int:
    """Verify all records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument(
        "--put-aside", action="store_true", help="let the next sweep.py remake what is damaged"
    )
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    scan = run.scan()
    problems = dict(scan.damaged)
    for record in track(list(scan.records.values()), "reading", console=console()):
        try:
            verify(record)
        except DamagedError as error:
            problems[record.key] = str(error)
    for problem in problems.values():
        print(problem)
    for key in problems if options.put_aside else ():
        run.quarantine(key)
    print(f"{len(scan.records) + len(scan.damaged)} records, {len(problems)} damaged")
    if problems:
        done = (
            "put aside; sweep.py" if options.put_aside else "verify.py --put-aside, then sweep.py"
        )
        print(f"{done} makes them again")
    return 1 if problems else 0


if __name__ == "__main__":
    command(main)
