#!/usr/bin/env python
# PYTHON_ARGCOMPLETE_OK
"""List all known runs, archive and restore one, compare two.

    python launch/runs.py [list] [--runs-dir DIR] [--json]
    python launch/runs.py archive RUN [FILE]
    python launch/runs.py restore FILE [--runs-dir DIR] [--name NAME]
    python launch/runs.py compare A B

list     a line for each run in runs/, and wherever runs_dir has put others
archive  one file, NAME.kdhpc.tar.gz, with all that analysis reads and all records, without models,
         training sets and single scores; analysis/ reads it as it reads a run
restore  a run folder again, which can be read and verified, and makes no more shards
compare  configs, versions and numbers of two runs, archives or files of results. The exit code is
         0 if the results are equal but for where they come from, else 1
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.cluster import archive, completion, housekeeping, places, runs
from kdhpc.cluster.display import command, comparison_view, console, runs_view, size
from kdhpc.cluster.overview import overviews
from kdhpc.cluster.status import look
from kdhpc.errors import DamagedError, InputError

if TYPE_CHECKING:
    from kdhpc.storage.results import Results


def main(arguments: list[str]) -> int:
    """Do one of the four."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="list|archive|restore|compare")
    listing = commands.add_parser("list", help="a line for each known run")
    listing.add_argument("--runs-dir", help="list only the runs in this folder")
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(do=list_runs)
    archiving = commands.add_parser("archive", help="write a run into one file")
    archiving.add_argument("run")
    archiving.add_argument("file", nargs="?", type=Path, help=f"default: NAME{archive.SUFFIX}")
    archiving.add_argument("--runs-dir", help="look for RUN only in this folder")
    archiving.set_defaults(do=archive_run)
    restoring = commands.add_parser("restore", help="make a run folder of such a file")
    restoring.add_argument("file", type=Path)
    restoring.add_argument("--runs-dir", default=places.DEFAULT_DIR, help="folder to restore into")
    restoring.add_argument("--name", help="name of the restored run")
    restoring.set_defaults(do=restore)
    comparing = commands.add_parser("compare", help="what differs between two runs")
    for name in ("a", "b"):
        comparing.add_argument(name, help="a run, an archive, or a file of results")
    comparing.set_defaults(do=compare)
    completion.answer(parser)
    if not arguments or (arguments[0][:1] == "-" and arguments[0] not in {"-h", "--help"}):
        arguments = ["list", *arguments]
    options = parser.parse_args(arguments)
    code: int = options.do(options)
    return code


def list_runs(options: argparse.Namespace) -> int:
    """Print a line for each run."""
    found = overviews(places.folders(options.runs_dir))
    if options.json:
        print(json.dumps([asdict(run) for run in found], indent=1))
    elif found:
        console().print(runs_view(found))
    else:
        where = options.runs_dir or f"{places.DEFAULT_DIR}/ or noted elsewhere"
        print(f"no runs in {where}; sweep.py makes one")
    return 0


def archive_run(options: argparse.Namespace) -> int:
    """Write the archive of a run that is at rest."""
    run = runs.find(options.run, options.runs_dir)
    file = options.file or Path(f"{run.path.name}{archive.SUFFIX}")
    archive.check_new(file)
    state = look(run)
    housekeeping.check_at_rest(run, state, "archive it")
    made = archive.archive(run, state, file)
    print(
        f"{file}: {made.num_files} files, {size(made.num_bytes)}; without data of "
        f"{made.num_left_out} shards"
    )
    if state.missing:
        print(f"{len(state.missing)} of {len(state.plan.shards)} shards are missing in the run")
    return 0


def restore(options: argparse.Namespace) -> int:
    """Make a run folder of an archive."""
    print(archive.restore(options.file, options.runs_dir, options.name))
    return 0


def compare(options: argparse.Namespace) -> int:
    """Print what differs; return 0 if the results are equal."""
    from kdhpc.storage import comparison
    from kdhpc.storage.results import logical_digest

    paths = [results_path(word) for word in (options.a, options.b)]
    try:
        first, second = map(_read, paths)
        digests = [logical_digest(path) for path in paths]
    except DamagedError as error:
        raise InputError(str(error)) from error
    out = console()
    parts = {
        "config": comparison.configs(first, second),
        "made with": comparison.provenance(first, second),
        "models": comparison.models(first, second),
    }
    for title, lines in parts.items():
        print(f"{title}:" if lines else f"{title}: equal")
        for line in lines:
            print(f"  {line}")
    out.print(comparison_view(list(comparison.pairs(first, second))))
    is_equal = digests[0] == digests[1]
    print(f"logical digests: {digests[0]}" + ("" if is_equal else f"\n{digests[1]:>81}"))
    print("the results are equal" if is_equal else "the results differ")
    return 0 if is_equal else 1


def _read(path: Path) -> "Results":
    from kdhpc.storage.results import read_results

    results = read_results(path)
    if not results.complete:
        print(f"warning: {path}: some planned shards are missing from it", file=sys.stderr)
    return results


def results_path(word: str) -> Path:
    """Return the file of the results of a run or an archive, or the file that was named.

    Raises:
        InputError: if there is no such run or file, or the run has no results.
    """
    path = Path(word)
    if path.is_file() and not word.endswith(archive.SUFFIX):
        return path
    if word.endswith(archive.SUFFIX):
        run = runs.open_run(archive.unpack_until_exit(path))
    else:
        run = runs.find(word)
    results = run.alias_path(run.pipeline.stages[-1].name)
    if results is None or not results.is_file():
        raise InputError(
            f"{word}: has no results; expected a run that has merged them, so let "
            "launch/sweep.py finish it"
        )
    return results


if __name__ == "__main__":
    command(main)
