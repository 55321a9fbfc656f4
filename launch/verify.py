#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""Read every published file of a run again and compare it with its digest.

    python launch/verify.py RUN [--put-aside]

The exit code is 0 if every byte is as published; otherwise it is 1, and the damaged files are
named. Nothing is changed, except that --put-aside renames the records of damaged shards, so that
sweep.py makes those shards again.
"""

import argparse

from rich.progress import track

from kdhpc.cluster import completion, runs
from kdhpc.cluster.display import command, console
from kdhpc.errors import DamagedError
from kdhpc.storage.run_folder import verify


def main(arguments: list[str]) -> int:
    """Verify the data of all records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", help="look for RUN only in this folder")
    parser.add_argument(
        "--put-aside", action="store_true", help="let the next sweep.py make damaged shards again"
    )
    completion.answer(parser)
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    if options.put_aside:
        runs.check_not_restored(run, "nothing would make a shard again; restore it again")
    scan = run.scan()
    problems = dict(scan.damaged)
    here = [record for key, record in scan.records.items() if key not in run.left_out]
    for record in track(here, "reading", console=console()):
        try:
            verify(record)
        except DamagedError as error:
            problems[record.key] = str(error)
    for problem in problems.values():
        print(problem)
    for key in problems if options.put_aside else ():
        run.quarantine(key)
    print(f"{len(scan.records) + len(scan.damaged)} records, {len(problems)} damaged")
    if run.is_restored:
        num_missing = len(scan.records) - len(here)
        print(f"data of {num_missing} of them was not in the archive that the run is from")
        if problems:
            print("delete the run, and restore it again")
    elif problems:
        print(
            "the damaged records were put aside; sweep.py makes the shards again"
            if options.put_aside
            else "run verify.py --put-aside, then sweep.py, to make them again"
        )
    return 1 if problems else 0


if __name__ == "__main__":
    command(main)
