#!/usr/bin/env python
"""Account for the core-seconds of a finished local run, from its records.

python benchmarks/core_seconds.py [RUN] [--cores 2]

Without RUN, the demo is run first, in build/. A record says when its process was started, when the
attempt began, when everything was imported and loaded (ready), and when it ended; an entry of the
ledger says how much CPU time the launcher had used. Core-seconds are the number of cores (those of
this process, unless given) times the time from the first request to the last record. Useful time is
the time from ready to the end of a shard: computing, writing, reading back and publishing. The exit
code is 1 if it is less than 0.75 of all core-seconds.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import tables

from kdhpc.cluster import runs
from kdhpc.cluster.ledger import Ledger
from kdhpc.storage.run_folder import Record

BAR = 0.75
LAUNCH = Path(__file__).parents[1] / "launch"


def main() -> int:
    """Print the table of a run."""
    parser = tables.options(__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print one line of JSON, save nothing")
    options = parser.parse_args()
    path = options.run or run_demo(tables.BUILD / "runs" / "core-seconds")
    spent, span = account(path.resolve(), options.cores)
    if options.json:
        print(json.dumps({"spent": spent, "span": span}))
        return 0
    all_s = span * options.cores
    useful = sum(seconds for name, seconds in spent.items() if name.startswith("useful"))
    rows = [
        {"core-seconds": name, "seconds": seconds, "share": seconds / all_s}
        for name, seconds in spent.items()
    ]
    rows.append({"core-seconds": "all useful work", "seconds": useful, "share": useful / all_s})
    about = {"cores of the run": options.cores, "seconds from first to last": span}
    tables.save("core_seconds", f"Core-seconds of {path.name}", rows, facts=about)
    return int(useful / all_s < BAR)


def run_demo(path: Path) -> Path:
    """Run the demo from scratch in a folder of its own."""
    shutil.rmtree(path, ignore_errors=True)
    words = ["demo", "cluster=local", f"name={path.name}", f"runs_dir={path.parent}"]
    subprocess.run([sys.executable, str(LAUNCH / "sweep.py"), *words], check=True)
    return path


def account(path: Path, cores: int) -> tuple[dict[str, float], float]:
    """Return core-seconds by use, and the seconds from the first request to the last record."""
    run = runs.open_run(path)
    ledger = Ledger(path)
    records = sorted(run.scan().records.values(), key=lambda record: record.attempt["started"])
    processes: dict[tuple[str, int, float], list[Record]] = defaultdict(list)
    spent: dict[str, float] = {
        f"useful: {stage.name}": 0.0 for stage in run.pipeline.stages
    } | dict.fromkeys(("start of processes", "imports, models, inputs", "between shards"), 0.0)
    for record in records:
        facts = record.attempt
        spent[f"useful: {record.key.split('/')[0]}"] += end(record) - facts["ready"]
        spent["imports, models, inputs"] += facts["ready"] - facts["started"]
        processes[facts["host"], facts["pid"], facts["process_started"]].append(record)
    for (_, _, begun), mine in processes.items():
        spent["start of processes"] += mine[0].attempt["started"] - begun
        for before, after in itertools.pairwise(mine):
            spent["between shards"] += max(0.0, after.attempt["started"] - end(before))
    launches: dict[int, float] = defaultdict(float)
    pids = {submission.number: submission.pid for submission in ledger.submissions()}
    for number, job in ledger.jobs().items():
        launches[pids[number]] = max(launches[pids[number]], job.launcher_cpu_s)
    span = max(end(record) for record in records) - ledger.requests()[0].time
    rest = span * cores - sum(spent.values())
    # The launcher works in the gaps, or shares a core with a worker.
    spent["launcher"] = min(rest, sum(launches.values()))
    spent["idle"] = rest - spent["launcher"]
    return spent, span


def end(record: Record) -> float:
    """Return the time when the attempt of a record ended, in seconds since the epoch."""
    return float(record.attempt["started"]) + record.seconds


if __name__ == "__main__":
    sys.exit(main())
