"""Let systems take turns: each is a process that holds its model and works when it is told to.

A worker prints one JSON object when it is ready, and one after each line that it reads. Peers
import this file too, in environments of their own: it needs Python and report.py only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import report

Answer = dict[str, Any]


class Worker:
    """A system in its own process, on the cores this process may use."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        """Start it, with a thread a core unless `env` says otherwise, and wait until it is ready.

        Args:
            command: the program and its words.
            env: what to set in its environment.
        """
        threads = str(report.conditions()["cores"])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads} | dict(env or {}),
        )
        self.ready = self._answer()
        """What it said when it was ready."""

    def turn(self) -> Answer:
        """Let it work once; `seconds` is added to its answer."""
        began = time.perf_counter()
        print("go", file=self.process.stdin, flush=True)
        answer = self._answer()
        return {"seconds": time.perf_counter() - began} | answer

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> Answer:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a system ended: {self.process.args!r}")
        answer: Answer = json.loads(line)
        return answer


def take_turns(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[Answer]]:
    """What every worker answered in every round, A B C A B C."""
    answers: dict[str, list[Answer]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.turn())
    return answers


def median(answers: Sequence[Answer], key: str = "seconds") -> float:
    return float(statistics.median(answer[key] for answer in answers))


def begin() -> Callable[[Answer], None]:
    """Be a worker from here on; before libraries are loaded, since what they print goes to stderr.

    Returns:
        What gives an answer and comes back when the next turn begins; after the last it does not.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(facts: Answer) -> None:
        print(json.dumps(facts), file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)

    return answer


def serve(answer: Callable[[Answer], None], work: Callable[[], Answer], **ready: Any) -> NoReturn:
    """Say that all is ready, then work once a turn."""
    answer(ready)
    while True:
        answer(work())


def peer_options(description: str | None) -> argparse.Namespace:
    """What sampling.py tells a peer: where the model lies, and what to draw."""
    parser = report.options(description)
    for name in ("--model", "--dtype"):
        parser.add_argument(name, required=True)
    for name in ("--rows", "--new-tokens", "--prompt-id"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()
