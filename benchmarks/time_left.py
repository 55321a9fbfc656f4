#!/usr/bin/env python
"""Compare what status.py says is left of a run with what was left.

python benchmarks/time_left.py [WORD ...] [--every 10] [--also CHECKOUT]

A run (`tiny` by default, or the WORDs of sweep.py) is started in local processes, and status.py is
asked for the time left every few seconds; with --also, by the code of another checkout of kdhpc
too, which must be able to read the run. For each quarter of the run the table has the median of
what was said, divided by what was left; 1 is perfect. It also has how often the end was inside the
range that was said (four of five are promised), and how wide that range was, its high end divided
by its low end.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Said:
    """What status.py said was left, in seconds, and when."""

    time: float
    low: float
    middle: float
    high: float


def main() -> int:
    """Run, ask, and print the table."""
    parser = tables.options(__doc__)
    parser.add_argument("words", nargs="*", default=["tiny"])
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two questions")
    parser.add_argument("--also", type=Path, help="folder of another checkout")
    options = parser.parse_intermixed_args()
    checkouts = {"this": HERE} | ({"other": options.also.resolve()} if options.also else {})
    said: dict[str, list[Said]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as runs_dir:
        words = [*options.words, f"runs_dir={runs_dir}", "name=timed", "cluster=local"]
        command = [sys.executable, HERE / "launch" / "sweep.py", *words]
        started = time.time()
        run = subprocess.Popen(command, cwd=HERE, env=environment(HERE), stdout=subprocess.DEVNULL)
        while run.poll() is None:
            time.sleep(options.every)
            for name, checkout in checkouts.items():
                if (answer := ask(checkout, Path(runs_dir) / "timed")) is not None:
                    said[name].append(answer)
        if run.returncode:
            sys.exit(f"the run ended with exit code {run.returncode}")
        ended = newest(Path(runs_dir) / "timed")
    rows = [row for name, of in said.items() for row in by_quarter(name, of, started, ended)]
    facts = {"run": " ".join(options.words), "seconds": round(ended - started, 1)}
    tables.save("time_left", "Time left, said divided by true", rows, facts=facts)
    return 0


def environment(checkout: Path) -> dict[str, str]:
    """Return the environment in which the code of a checkout is imported."""
    return os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def ask(checkout: Path, run: Path) -> Said | None:
    """Ask status.py how much is left; None if it does not say."""
    answer = subprocess.run(
        [sys.executable, checkout / "launch" / "status.py", run, "--json"],
        cwd=checkout,
        env=environment(checkout),
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        status: dict[str, Any] = json.loads(answer.stdout)
    except ValueError:
        return None
    left = status.get("left_s", status.get("eta_s"))
    if left is None:
        return None
    if isinstance(left, float):  # a checkout before there were ranges
        left = {"low": left, "middle": left, "high": left}
    return Said(time.time(), left["low"], left["middle"], left["high"])


def newest(run: Path) -> float:
    """Return when the last shard was published, in seconds since the epoch."""
    return max(path.stat().st_mtime for path in run.glob("*-*/*/*.json"))


def by_quarter(
    name: str, said: Sequence[Said], started: float, ended: float
) -> list[dict[str, Any]]:
    """Compare what was said in each quarter of a run with what was left."""
    rows = []
    for quarter in range(4):
        first = started + quarter * (ended - started) / 4
        last = started + (quarter + 1) * (ended - started) / 4
        own = [answer for answer in said if first <= answer.time < last]
        if own:
            left = [ended - answer.time for answer in own]
            pairs = list(zip(own, left, strict=True))
            inside = sum(answer.low <= true <= answer.high for answer, true in pairs)
            row = {
                "checkout": name,
                "quarter": quarter + 1,
                "said / true": statistics.median(a.middle / true for a, true in pairs),
                "farthest": max(
                    (a.middle / true for a, true in pairs), key=lambda r: max(r, 1 / r)
                ),
                "inside": f"{inside} of {len(own)}",
                "high / low": statistics.median(a.high / a.low for a in own),
            }
            rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
