#!/usr/bin/env python
"""Time whole commands on the login node, with runs of 625 to 10,000 shards.

python benchmarks/login_node.py [--shards 10000] [--turns 5] [--folder build]

The run folders hold the paper's plan with more or fewer sequences; every shard has its record and a
few bytes of data. Times are medians and include the start of Python; the difference to the CPU
seconds was spent waiting for a core or the disk. The exit code is 1 if `sweep.py paper --dry-run`,
or `status.py` on the largest folder, takes more than a second.
"""

import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tables

from kdhpc.cluster import runs
from kdhpc.experiment import arms
from kdhpc.pipeline import LANGUAGE
from kdhpc.storage.work import Work, Written

LAUNCH = Path(__file__).parents[1] / "launch"
LIMIT_S = 1.0
FACTORS = (16, 8, 4, 2, 1)
ROWS = 512
"""Sequences per shard."""
ARMS = 21
"""Number of arms in the paper's plan that are as large as D: D itself, and 4 taus of 5 seeds."""


def main() -> int:
    """Make the folders, time each command, and print two tables."""
    parser = tables.options(__doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=tables.RESULTS.parent)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    commands = {
        "sweep.py paper --dry-run": ["sweep.py", "paper", "--dry-run"],
        "sweep.py --help": ["sweep.py", "--help"],
    }
    sizes: dict[str, int] = {}
    for factor in FACTORS:
        path = (options.folder / f"shards-{factor}").resolve()
        shutil.rmtree(path, ignore_errors=True)
        num_shards = make_run(path, options.shards // factor)
        name = f"status.py, {num_shards} shards"
        commands[name], sizes[name] = ["status.py", str(path)], num_shards
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.turns):
        for name, (script, *words) in commands.items():
            times[name].append(timed([sys.executable, str(LAUNCH / script), *words]))
    medians = {
        name: [statistics.median(each) for each in zip(*turns, strict=True)]
        for name, turns in times.items()
    }
    about = {"turns": options.turns}
    rows = [
        {"command": f"`{name}`", "seconds": seconds, "CPU seconds": cpu_s}
        for name, (seconds, cpu_s) in medians.items()
    ]
    tables.save("login_node", "Commands on the login node", rows, facts=about)
    growth = [
        {
            "shards": size,
            "seconds": medians[name][0],
            "CPU seconds": medians[name][1],
            "CPU ms a shard": 1000 * medians[name][1] / size,
        }
        for name, size in sizes.items()
    ]
    tables.save("status_growth", "status.py as shards grow", growth, facts=about)
    for factor in FACTORS:
        shutil.rmtree(options.folder / f"shards-{factor}")
    barred = ("sweep.py paper --dry-run", list(sizes)[-1])
    return int(any(medians[name][0] > LIMIT_S for name in barred))


def timed(command: list[str]) -> tuple[float, float]:
    """Return the seconds and CPU seconds of a command, which may cache byte code as usual."""
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun, cpu_s = time.perf_counter(), tables.cpu_of_children()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, env=environment)
    return time.perf_counter() - begun, tables.cpu_of_children() - cpu_s


def make_run(path: Path, num_shards: int) -> int:
    """Make a run of about `num_shards` finished shards, and return their exact number."""
    words = [
        "paper",
        "cluster=local",
        f"sampling.train_sequences={ROWS * (num_shards // (ARMS + 3))}",
        f"sampling.eval_sequences={ROWS * (num_shards // (24 * (ARMS + 3)))}",
        f"sampling.shard_sequences={ROWS}",
        f"scoring.shard_sequences={ROWS}",
        "scoring.batch_rows=1",
        f"runs_dir={path.parent}",
        f"name={path.name}",
    ]
    config: Any = runs.from_words(words)[1]
    plan = LANGUAGE.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor="local")
    work = Work(run, config, plan)
    os.fsync = lambda fd: None  # the run is temporary, so it need not survive a crash
    for shard in plan.shards.values():
        data = work.new_path(shard, ".h5" if shard.stage == arms.MERGE else "")
        data.write_bytes(b"some bytes")
        work.publish(shard, Written(path=data, num_rows=shard.num_rows), time.time() - 60.0)
    return len(plan.shards)


if __name__ == "__main__":
    sys.exit(main())
