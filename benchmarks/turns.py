"""Let systems take turns: each is a process that holds its model and works when it is told to.

A worker prints one JSON object when it is ready, and one after each line that it reads.
"""

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

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it with a thread a core; `ready` holds what it said when it was ready."""
        threads = str(report.conditions()["cores"])
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": threads} | dict(environment or {}),
        )
        self.ready = self._answer()

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
        while line := (self.process.stdout.readline() if self.process.stdout else ""):
            if line.startswith("{"):
                answer: Answer = json.loads(line)
                return answer
        raise SystemExit(f"a system ended: {self.process.args!r}")


def take_turns(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[Answer]]:
    """What every worker answered in every round, A B C A B C."""
    answers: dict[str, list[Answer]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.turn())
    return answers


def median(answers: Sequence[Answer], key: str = "seconds") -> float:
    return float(statistics.median(answer[key] for answer in answers))


def serve(work: Callable[[], Answer], **ready: Any) -> NoReturn:
    """Be a worker: say so, then work once a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    print(json.dumps(ready), file=answers, flush=True)
    while sys.stdin.readline():
        print(json.dumps(work()), file=answers, flush=True)
    os._exit(0)
