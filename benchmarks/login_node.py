#!/usr/bin/env python
"""Time what a person waits for on the login node, as whole commands, and print medians.

python benchmarks/login_node.py [--runs 5]
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = Path(__file__).parents[1] / "launch"
LIMIT_S = 1.0


def main() -> int:
    """Time each command; exit code 1 if a median is over the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    commands = {
        "sweep.py paper --dry-run": ["sweep.py", "paper", "--dry-run"],
        "sweep.py --help": ["sweep.py", "--help"],
    }
    finished = sorted(Path("runs").glob("*/run.json"))
    if finished:
        commands[f"status.py {finished[0].parent.name}"] = ["status.py", str(finished[0].parent)]
    slow = False
    print("| command | median s | limit s |\n|---|---|---|")
    for name, (script, *words) in commands.items():
        seconds = []
        for _ in range(options.runs):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, str(LAUNCH / script), *words],
                stdout=subprocess.DEVNULL,
                check=False,
            )
            seconds.append(time.perf_counter() - began)
        median = statistics.median(seconds)
        slow |= median > LIMIT_S
        print(f"| `{name}` | {median:.2f} | {LIMIT_S:.0f} |")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
