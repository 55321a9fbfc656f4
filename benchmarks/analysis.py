#!/usr/bin/env python
"""Time and memory of the analysis of a run with several seeds, per token, by number of rows.

    python benchmarks/analysis.py [--rows 5000 10000 20000]

Results of 5 seeds and 5 arms of students are made up; every verdict, every curve by prefix and
every table row is computed from them in a process of its own. Reading includes the check of the
file's digest.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tables

from kdhpc.storage.hdf5 import Piece
from kdhpc.storage.results import ScorePieces, read_results, write_results

ANALYSIS = Path(__file__).parents[1] / "analysis"
SEEDS, LENGTH, PROMPT = 5, 64, 3
ARMS = ("direct", "tau1", "tau0.8", "tau0.6", "tau0.5")


def main() -> None:
    """Make results of each size, analyse them in processes of their own, and print a table."""
    parser = tables.options(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 10000, 20000])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(analyse(options.worker)))
        return
    rows: list[dict[str, Any]] = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory(dir=tables.BUILD) as folder:
            path = Path(folder) / "results.h5"
            make(path, num_rows)
            command = [sys.executable, __file__, "--worker", str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            size = path.stat().st_size / 1e6
            rows.append({"rows a side": num_rows, "file MB": size, **json.loads(done.stdout)})
    about = {"seeds": SEEDS, "arms": len(ARMS), "tokens a row": LENGTH}
    tables.save("analysis", "Analysis of a run, per token", rows, facts=about)


def make(path: Path, num_rows: int) -> None:
    """Write made-up results with per-token scores."""
    noise = np.random.default_rng(0)
    tokens = noise.normal(-3.0, 1.0, (num_rows, LENGTH)).astype(np.float32)
    tokens[:, :PROMPT] = np.nan
    counts = np.full(num_rows, LENGTH - PROMPT, np.int32)

    def pieces(shift: float) -> Iterator[Piece]:
        scores = tokens + np.float32(shift)
        yield "log_prob_sum", scores[:, PROMPT:].sum(axis=1, dtype=np.float64)
        yield "num_tokens", counts
        yield "end_log_prob", np.zeros(num_rows)
        yield "token_log_prob", scores

    models, pairs = {}, [("truth", "self")]
    for seed in range(SEEDS):
        for arm in ARMS:
            name = f"student-s{seed}-small-{arm}"
            tau = float(arm.removeprefix("tau")) if arm != "direct" else 1.0
            models[name] = {
                "kind": "student", "seed": seed, "size": "small", "arm": arm, "tau": tau,
            }  # fmt: skip
            pairs += [(name, "truth"), (name, "self"), ("truth", name)]
    parts = (
        ScorePieces(sampler=a, scorer=b, num_rows=num_rows, pieces=pieces(noise.normal(0, 0.1)))
        for a, b in pairs
    )
    write_results(path, recipe="r", provenance={}, scores=parts, models=models)


def analyse(path: Path) -> dict[str, float]:
    """Analyse results; return seconds and the growth of memory by own arrays, in MB."""
    sys.path.insert(0, str(ANALYSIS))
    from precision_recall import rows
    from study import Study
    from verdicts import verdicts

    from kdhpc.science.curves import PREFIXES

    start = time.perf_counter()
    results = read_results(path)
    read = time.perf_counter()
    study = Study(results)
    verdicts(study)
    rows(study)
    middle = time.perf_counter()
    factors = np.linspace(-6.0, 6.0, 25)
    for size in study.sizes:
        for label in study.labels(size):
            for student in study.of(size, label).values():
                for prefix in PREFIXES:
                    study.overlaps(student, prefix, factors)
                    study.coverages(student, prefix, factors)
                    study.total_variation(student, prefix)
    end = time.perf_counter()
    return {
        "reading s": read - start,
        "verdicts and table s": middle - read,
        "curves s": end - middle,
        "anonymous MB": _anonymous_mb(),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def _anonymous_mb() -> float:
    """Return the memory of this process without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1000


if __name__ == "__main__":
    main()
