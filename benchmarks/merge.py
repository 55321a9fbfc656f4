#!/usr/bin/env python
"""Compare the merge of per-token scores with a copy of the same files.

python benchmarks/merge.py [--sequences 100000] [--length 512] [--turns 5] [--folder build]

The run folder has the paper's sizes with one seed: 15 pairs of sampler and scorer with per-token
scores, and the evaluation sets and models as small files, all with their records. Two systems take
turns, each in a process of its own that has loaded its modules. One is the merge as a task does it:
it checks every byte that it reads, and reads back, syncs and publishes the result. The other is
`shutil.copyfile` of the score shards, synced file by file. When a turn begins, all writes are
flushed and the files are in the page cache. Times are medians; peak memory is the most that a
process held. A second table shows growth with 1 to 16 times as many shards. The exit code is 1 if
the merge has less than 0.7 of the copy's throughput, or holds more than 1 GB.
"""

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import tables

from kdhpc.cluster import runs
from kdhpc.cluster.runs import Run
from kdhpc.experiment import arms
from kdhpc.experiment.stages import merge as merging
from kdhpc.pipeline import LANGUAGE
from kdhpc.storage.files import remove
from kdhpc.storage.score_shards import Scores, write_scores
from kdhpc.storage.token_shards import Samples, write_samples
from kdhpc.storage.work import Work, Written

GROWTH = 16
LEAST_SHARE = 0.7
MOST_BYTES = 1e9


def main() -> int:
    """Make the runs, let merge and copy take turns, and print two tables."""
    parser = tables.options(__doc__)
    parser.add_argument("--sequences", type=int, default=100_000, help="per evaluation set")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=tables.RESULTS.parent)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options.worker[0], Path(options.worker[1]))))
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    per_shard = options.sequences // GROWTH
    grown = []
    for factor in (1, 2, 4, 8, GROWTH):
        path = options.folder / f"merge-{factor}"
        shutil.rmtree(path, ignore_errors=True)
        config, run = make_run(path, factor * per_shard, per_shard, options.length)
        facts = measure(path, options.turns)
        shards = run.pipeline.plan(config).stage(arms.SCORE)
        grown.append({"score shards": len(shards), **facts})
        shutil.rmtree(path)
    about = {
        "pairs": 15,
        "sequences": options.sequences,
        "length": options.length,
        "turns": options.turns,
    }
    last = grown[-1]
    rows = [
        {
            "system": name,
            "seconds": last[f"{name} s"],
            "of them CPU": last[f"{name} CPU s"],
            "GB/s": last["GB"] / last[f"{name} s"],
            "of copying": last["copy s"] / last[f"{name} s"],
            "peak MB": last[f"{name} MB"],
        }
        for name in ("merge", "copy")
    ]
    tables.save("merge", "Merge of per-token scores against a copy of them", rows, facts=about)
    columns = ("score shards", "GB", "merge s", "copy s", "merge CPU s", "copy CPU s", "merge MB")
    lines = [
        {name: row[name] for name in columns}
        | {"CPU s/GB": row["merge CPU s"] / row["GB"], "of copying": row["copy s"] / row["merge s"]}
        for row in grown
    ]
    tables.save("merge_growth", "The merge as shards grow", lines, facts=about)
    return int(
        last["copy s"] / last["merge s"] < LEAST_SHARE or last["merge MB"] * 1e6 > MOST_BYTES
    )


def config_of(folder: Path, sequences: int, per_shard: int, length: int) -> Any:
    """Return the config of a run with one seed and per-token scores."""
    words = [
        "paper",
        "cluster=local",
        "seeds=1",
        "scoring.per_token=true",
        f"scoring.shard_sequences={per_shard}",
        "scoring.batch_rows=1",
        f"sampling.eval_sequences={sequences}",
        "sampling.batch_rows=1",
        f"sampling.shard_sequences={per_shard}",
        "sampling.train_sequences=256",
        f"length={length}",
        f"runs_dir={folder.parent}",
        f"name={folder.name}",
    ]
    return runs.from_words(words)[1]


def make_run(folder: Path, sequences: int, per_shard: int, length: int) -> tuple[Any, Run]:
    """Make a run in which everything but the merge is done; its scores are noise."""
    config = config_of(folder, sequences, per_shard, length)
    plan = LANGUAGE.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor="local")
    work = Work(run, config, plan)
    [merge] = plan.stage(arms.MERGE)
    noise = np.random.default_rng(0)
    token_log_prob = noise.normal(size=(per_shard, length)).astype(np.float32)
    ids = noise.integers(0, 49152, (per_shard, length)).astype(np.uint16)
    sums = token_log_prob.sum(axis=1, dtype=np.float64)
    counts = np.full(per_shard, length, np.int32)
    for key in merge.reads:
        shard = plan.shards[key]
        stats: dict[str, Any] = {}
        if shard.stage == arms.SCORE:
            path = work.new_path(shard, ".h5")
            scores = Scores(log_prob_sum=sums, num_tokens=counts, token_log_prob=token_log_prob)
            write_scores(path, {1.0: scores})
        elif shard.row_range:
            path = work.new_path(shard, ".arrow")
            samples = Samples(ids=ids, length=counts, log_prob_sum=sums, log_prob_tau_sum=sums)
            write_samples(path, samples, {})
        else:
            path = work.new_path(shard)
            path.mkdir()
            (path / "config.json").write_text("{}")
            stats = {"parameters": 0, "steps": 0, "final_loss_nats": 0.0}
        work.publish(shard, Written(path=path, num_rows=shard.num_rows, stats=stats), time.time())
    return config, run


def measure(path: Path, turns: int) -> dict[str, Any]:
    """Let merge and copy take turns in fresh processes; return their medians."""
    answers: dict[str, list[dict[str, float]]] = {"merge": [], "copy": []}
    for _ in range(turns):
        for name, all_turns in answers.items():
            os.sync()
            command = [sys.executable, __file__, "--worker", name, str(path)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            all_turns.append(json.loads(done.stdout.splitlines()[-1]))
    facts: dict[str, Any] = {"GB": answers["copy"][0]["bytes"] / 1e9}
    for name, each in answers.items():
        facts[f"{name} s"] = statistics.median(turn["seconds"] for turn in each)
        facts[f"{name} CPU s"] = statistics.median(turn["cpu_s"] for turn in each)
        facts[f"{name} MB"] = max(turn["peak_bytes"] for turn in each) / 1e6
        seconds = [round(turn["seconds"], 2) for turn in each]
        print(f"{path.name} {name}: {seconds} s", file=sys.stderr, flush=True)
    return facts


def work(name: str, path: Path) -> dict[str, float]:
    """Do one turn and restore the run; return seconds, bytes of the score shards, peak memory."""
    for module in ("h5py", "pyarrow"):
        importlib.import_module(module)
    run = runs.open_run(path)
    _, config, plan = runs.current(run)
    [merge] = plan.stage(arms.MERGE)
    files = [
        file for shard in plan.stage(arms.SCORE)
        for file in run.record_path(shard.key).parent.glob(f"{shard.name}.*.h5")
    ]  # fmt: skip
    num_bytes = sum(file.stat().st_size for file in files)
    begun, cpu = time.perf_counter(), time.process_time()
    if name == "merge":
        task: Work[Any] = Work(run, config, plan)
        task.publish(merge, merging.run(merge, task), time.time())
    else:
        copies = path / "copies"
        copies.mkdir()
        for number, file in enumerate(files):
            shutil.copyfile(file, copies / f"{number}.h5")
            with (copies / f"{number}.h5").open("rb") as copied:
                os.fsync(copied.fileno())
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu
    remove(path / "copies") if name == "copy" else remove(run.stage_dir(arms.MERGE))
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "bytes": num_bytes,
        "peak_bytes": tables.peak_bytes(),
    }


if __name__ == "__main__":
    sys.exit(main())
