#!/usr/bin/env python
"""Write the scores of a finished run without those of single tokens, small enough to publish.

    python analysis/archive.py RUN FILE.h5.xz [--samples]

RUN is a run's name or folder, or a file of results. FILE must not exist yet; it has all facts, sums
and counts, and every analysis that needs no token reads it. Sums are rounded to 1/32 nat a
sequence, which moves means over sequences by far less than their errors. End tokens are left out
if they count, as their part of the sums is not needed then, unless a second judge has other tokens
than the students. A name without .xz is not compressed.

--samples   keep the token ids of truth's evaluation set and of the students' at T = 1 too, from
            which analysis/diversity.py says what has collapsed
"""

import argparse
import json
import lzma
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import files
import numpy as np
from numpy.typing import NDArray
from report_run import read_facts
from study import SELF, Study

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.experiment import arms
from kdhpc.pipeline import LANGUAGE
from kdhpc.storage.results import ScorePieces, write_results
from kdhpc.storage.token_shards import read_samples

FRACTION = 32.0
"""Sums are rounded to multiples of one nat divided by this."""
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "lc": 0, "lp": 3, "pb": 3}]
"""Settings of xz for arrays of 8-byte numbers."""
Arrays = Mapping[str, NDArray[Any]]


def main(arguments: list[str]) -> int:
    """Copy results, array by array."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="a run's name or folder, or a file of results")
    parser.add_argument("file", type=Path, help="the file to write")
    parser.add_argument("--samples", action="store_true", help="keep token ids")
    options = parser.parse_args(arguments)
    if options.file.exists():
        # It could be the very file that is read, whose arrays are mapped.
        raise InputError(f"{options.file}: exists already; expected the name of a new file")
    analysis = files.read(argparse.Namespace(run=options.run, out=None), LANGUAGE)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "scores.h5"
        write(plain, analysis, _samples(analysis) if options.samples else {})
        content = plain.read_bytes()
    if options.file.suffix == ".xz":
        content = lzma.compress(content, filters=FILTERS)
    part = options.file.with_name(f".{options.file.name}.part")
    try:
        part.write_bytes(content)
        part.rename(options.file)
    except OSError as error:
        raise InputError(f"{options.file}: cannot be written ({error.strerror})") from error
    print(f"{options.file}: {len(content) / 1e6:.1f} MB")
    return 0


def write(path: Path, analysis: files.Analysis, samples: Mapping[str, Arrays]) -> None:
    """Write what is kept of some results.

    Args:
        path: the file to write.
        analysis: the results.
        samples: arrays `ids` and `length` by the name of the sampler.
    """
    results = analysis.results
    # Judges with other tokens are compared on the texts alone, so the ends are subtracted.
    by_character = any(scores.num_characters is not None for scores in results.scores.values())
    no_ends = Study(results).eos_counts and not by_character
    dropped = {"token_log_prob"} | ({"end_log_prob"} if no_ends else set())
    parts = [
        ScorePieces(
            sampler=sampler,
            scorer=scorer,
            num_rows=len(scores.num_tokens),
            pieces=[
                *((n, _rounded(array)) for n, array in scores.arrays().items() if n not in dropped),
                *(samples.get(sampler, {}).items() if scorer == SELF else ()),
            ],
        )
        for (sampler, scorer), scores in results.scores.items()
    ]
    write_results(
        path,
        scores=parts,
        downstream=results.downstream.items(),
        models=results.models,
        recipe=results.recipe,
        complete=results.complete,
        provenance={**results.provenance, **costs(analysis)},
    )


def costs(analysis: files.Analysis) -> dict[str, str]:
    """Return the seconds of work of each stage, of the run's own shards and of those it reused.

    Returns:
        JSON by the names `seconds_by_stage` and `seconds_reused`; nothing outside of a run folder.
    """
    facts = read_facts(analysis.results, analysis.path)
    seconds: dict[str, dict[str, float]] = {"seconds_by_stage": {}, "seconds_reused": {}}
    for key, record in facts.records.items():
        stages = seconds["seconds_reused" if record.reused_from else "seconds_by_stage"]
        stage = key.partition("/")[0]
        stages[stage] = stages.get(stage, 0.0) + record.seconds
    if not facts.records:
        return {}
    return {
        name: json.dumps({s: round(t, 1) for s, t in of.items()}) for name, of in seconds.items()
    }


def _rounded(array: NDArray[Any]) -> NDArray[Any]:
    return np.round(array * FRACTION) / FRACTION if array.dtype == np.float64 else array


def _samples(analysis: files.Analysis) -> dict[str, Arrays]:
    """Read the token ids of truth's evaluation set and of every student's at temperature 1.

    Raises:
        InputError: if some of them are not in the run folder.
    """
    facts, study = read_facts(analysis.results, analysis.path), Study(analysis.results)
    sets = {"truth": arms.TRUTH_EVAL}
    sets |= {student.name: (arms.SAMPLE_STUDENTS, student.name) for student in study.students}
    kept: dict[str, Arrays] = {}
    for name, arm in sets.items():
        if not (records := facts.all_of(arm)):
            raise InputError(
                f"{analysis.path}: the samples of {name} are not in a run folder around it; "
                "expected a whole run, or no --samples"
            )
        samples = read_samples([record.data for record in records])
        kept[name] = {"ids": samples.ids, "length": samples.length}
    return kept


if __name__ == "__main__":
    command(main)
