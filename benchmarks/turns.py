"""Let systems take turns; each is a process that holds its model and works when it is told to.

A worker prints one JSON object when it is ready, and one after each line that it reads. Peers
import this file in environments of their own, so it depends on Python and tables.py only.
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

import tables

Answer = dict[str, Any]


class Worker:
    """A system in processes of its own, on the cores that this process may use."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, processes: int = 1
    ) -> None:
        """Start the processes and wait until they are ready.

        Args:
            command: the program and its arguments.
            env: variables to set in its environment; without OMP_NUM_THREADS, it gets one thread
                per core.
            processes: number of processes that work at once, each on one core if there are
                several.
        """
        cores = sorted(os.sched_getaffinity(0))
        each = [cores] if processes == 1 else [[cores[i % len(cores)]] for i in range(processes)]
        self.processes = [
            subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, own)), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": str(len(own))} | dict(env or {}),
            )
            for own in each
        ]
        first, *_ = [_answer(process) for process in self.processes]
        self.ready = first
        """The answer that the first process gave when it was ready."""

    def turn(self) -> Answer:
        """Let all processes work once.

        Returns:
            The answer of the first, with the seconds until the last one answered and the sum of all
            tokens.
        """
        began = time.perf_counter()
        for process in self.processes:
            print("go", file=process.stdin, flush=True)
        answers = [_answer(process) for process in self.processes]
        seconds = {"seconds": time.perf_counter() - began}
        tokens = [answer["tokens"] for answer in answers if "tokens" in answer]
        return seconds | answers[0] | ({"tokens": sum(tokens)} if tokens else {})

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _answer(process: "subprocess.Popen[str]") -> Answer:
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise SystemExit(f"a worker ended without an answer: {process.args!r}")
    answer: Answer = json.loads(line)
    return answer


def take_turns(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[Answer]]:
    """Let the workers work in the order A B C A B C; return their answers by round."""
    answers: dict[str, list[Answer]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            answers[name].append(worker.turn())
    return answers


def median(answers: Sequence[Answer], key: str = "seconds") -> float:
    """Return the median of one value of the answers."""
    return float(statistics.median(answer[key] for answer in answers))


def begin() -> Callable[[Answer], None]:
    """Make this process a worker: from now on, everything that libraries print goes to stderr.

    It must be called before libraries are loaded.

    Returns:
        A function that gives an answer and returns when the next turn begins. When there is no
        other turn, it ends the process.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(facts: Answer) -> None:
        print(json.dumps(facts), file=answers, flush=True)
        if not sys.stdin.readline():
            os._exit(0)

    return answer


def serve(answer: Callable[[Answer], None], work: Callable[[], Answer], **ready: Any) -> NoReturn:
    """Answer that the worker is ready, then work once per turn."""
    answer(ready)
    while True:
        answer(work())


def peer_options(description: str | None) -> argparse.Namespace:
    """Parse the arguments that sampling.py gives to a peer: the model and what to draw."""
    parser = tables.options(description)
    for name in ("--model", "--dtype"):
        parser.add_argument(name, required=True)
    for name in ("--rows", "--new-tokens", "--prompt-id"):
        parser.add_argument(name, type=int, required=True)
    return parser.parse_args()
