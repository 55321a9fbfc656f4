#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""List or delete the files that a run does not need.

    python launch/clean.py RUN [--yes]

These are data of attempts that did not publish them, checkpoints of finished trainings but those of
keep_epochs, damaged records that were put aside, merges of earlier requests, progress files, and
the logs of a complete run. An earlier request that is typed again is merged again. Nothing is
deleted without --yes, nor while the run is active.
"""

import argparse

from kdhpc.cluster import completion, housekeeping, runs
from kdhpc.cluster.display import command, size
from kdhpc.cluster.status import look, status_of
from kdhpc.storage.files import remove, size_of


def main(arguments: list[str]) -> int:
    """List the files, and delete them if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--runs-dir", help="look for RUN only in this folder")
    parser.add_argument("--yes", action="store_true", help="delete what is listed")
    completion.answer(parser)
    options = parser.parse_args(arguments)
    run = runs.find(options.run, options.runs_dir)
    state = look(run)
    housekeeping.check_at_rest(run, state, "clean it")
    reasons = housekeeping.unneeded(
        run,
        run.scan(),  # the state's scan calls records of other settings damaged
        finished=state.scan.records.keys(),
        complete=status_of(run, state).complete,
        planned=state.plan.shards.keys(),
    )
    for path, reason in reasons.items():
        print(f"{path.relative_to(run.path)}  {reason}")
    total = sum(size_of(path) or 0 for path in reasons)
    if options.yes:
        for path in reasons:
            remove(path)
    print(
        f"{len(reasons)} entries, {size(total)}"
        + ("; deleted" if options.yes else "; --yes deletes")
    )
    return 0


if __name__ == "__main__":
    command(main)
