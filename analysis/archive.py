#!/usr/bin/env python
"""Write the scores of a finished run without those of single tokens, small enough to publish.

    python analysis/archive.py RUN FILE

RUN is a run's name or folder, or a file of results. FILE must not exist
yet; it has all of its sums, counts and facts, and every analysis that needs no token reads it.
"""

import argparse
from pathlib import Path

import files

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.pipeline import LANGUAGE
from kdhpc.storage.results import ScorePieces, write_results


def main(arguments: list[str]) -> int:
    """Copy results, array by array."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="a run's name or folder, or a file of results")
    parser.add_argument("file", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    if options.file.exists():
        # It could be the very file that is read, whose arrays are mapped.
        raise InputError(f"{options.file}: exists already; expected the name of a new file")
    results = files.read(
        argparse.Namespace(run=options.run, out=options.file.parent), LANGUAGE
    ).results
    parts = [
        ScorePieces(
            sampler=sampler,
            scorer=scorer,
            num_rows=len(scores.num_tokens),
            pieces=[
                (name, array) for name, array in scores.arrays().items() if name != "token_log_prob"
            ],
        )
        for (sampler, scorer), scores in results.scores.items()
    ]
    write_results(
        options.file,
        scores=parts,
        models=results.models,
        recipe=results.recipe,
        complete=results.complete,
        provenance=results.provenance,
    )
    print(options.file)
    return 0


if __name__ == "__main__":
    command(main)
