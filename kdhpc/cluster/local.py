"""Run a plan in processes of this machine: the same tasks as on Slurm, a loop for the gates."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from kdhpc.artifacts import RunFolder
from kdhpc.cluster import failures
from kdhpc.cluster.decide import Batch, Policy
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission, launcher_gone
from kdhpc.cluster.observe import LOCAL_TASK_S, State, observe
from kdhpc.cluster.submission import job_name
from kdhpc.config import RunConfig
from kdhpc.shards import Plan


class _Worker:
    """A process that does tasks, one at a time (see `task.serve`)."""

    def __init__(self, run: RunFolder, code: str, environment: Mapping[str, str]) -> None:
        self.run, self.code = run, code
        home = run.path / "code" / code
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kdhpc.cluster.task", str(run.path), "--serve"],
            cwd=home,
            env={**_outside_slurm(), **environment, "PYTHONPATH": _python_path(home)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.answers = cast(IO[bytes], self.process.stdout)
        os.set_blocking(self.answers.fileno(), False)

    def send(self, number: int, log: Path) -> None:
        pipe = cast(IO[bytes], self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # it died; `exit_code` says so
            pipe.write(json.dumps([number, 0, str(log)]).encode() + b"\n")
            pipe.flush()

    def exit_code(self) -> int | None:
        """Of the task that was sent; None while it runs, negative if killed."""
        answer = self.answers.readline()
        return int(answer) if answer else self.process.poll()

    def stop(self) -> None:
        """Ask for an end at the next shard or checkpoint."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Let it go once its task is done."""
        with contextlib.suppress(BrokenPipeError):
            cast(IO[bytes], self.process.stdin).close()
        self.process.wait()
        self.answers.close()


@dataclass
class _Task:
    """A submission under way: one worker a rank."""

    submission: Submission
    workers: list[_Worker]
    codes: dict[int, int]

    def ended(self) -> bool:
        for rank, worker in enumerate(self.workers):
            if rank not in self.codes and (code := worker.exit_code()) is not None:
                self.codes[rank] = code
        if any(self.codes.values()):  # a rank died: end the others, like srun --kill-on-bad-exit
            for rank, worker in enumerate(self.workers):
                if rank not in self.codes:
                    worker.process.kill()
        return len(self.codes) == len(self.workers)


def run_all(
    run: RunFolder,
    config: RunConfig,
    plan: Plan,
    *,
    on_change: Callable[[State, frozenset[str]], None] = lambda state, active: None,
) -> State:
    """Run every shard that can run, then return how the run stands.

    Ctrl-C lets tasks stop at the next shard or checkpoint; typed again, sweep goes on.
    """
    num_workers = config.local_workers or len(os.sched_getaffinity(0))
    ledger = Ledger(run.path)
    jobs = ledger.jobs()
    for submission in ledger.submissions():
        if submission.number not in jobs and launcher_gone(submission):
            ledger.settle(submission.number, Job(job_id=None, note="its launcher died"))
    tasks: list[_Task] = []
    policy = Policy(
        task_s=LOCAL_TASK_S,
        max_array=1,
        max_tasks=10**9,
        per_array=0,
        max_attempts=config.slurm.max_attempts,
    )
    spare: list[_Worker] = []
    try:
        while True:
            for task in [task for task in tasks if task.ended()]:
                tasks.remove(task)
                _finish(task, run, ledger)
                alive = [worker for worker in task.workers if worker.process.poll() is None]
                if len(task.workers) == 1 and alive:
                    spare += alive
                else:
                    for worker in task.workers:
                        worker.close()
            active = frozenset(key for task in tasks for key in task.submission.keys)
            state = observe(run, config, plan, local_active=active, policy=policy, with_queue=False)
            on_change(state, active)
            batches = state.decision.batches
            if not tasks and not batches:
                return state
            for batch in batches[: num_workers - len(tasks)]:
                tasks.append(_start(run, ledger, state, batch, config, spare))
            if not spare and len(tasks) < num_workers:  # one that loads what the next stage needs
                port = _port(-len(ledger.submissions()))
                environment = _environment(config.threads, 0, 1, port)
                spare.append(_Worker(run, state.request.code, environment))
            _wait(tasks)
    except BaseException:
        for task in tasks:
            for worker in task.workers:
                worker.stop()
        while tasks:
            _wait(tasks)
            for task in [task for task in tasks if task.ended()]:
                tasks.remove(task)
                spare += task.workers
                _finish(task, run, ledger)
        raise
    finally:
        for worker in spare:
            worker.stop()
            worker.close()


def _wait(tasks: list[_Task], limit_s: float = 2.0) -> None:
    """Until a worker answers or is gone; at most until the display should say something new."""
    waiting = [
        worker.answers
        for task in tasks
        for rank, worker in enumerate(task.workers)
        if rank not in task.codes
    ]
    select.select(waiting, [], [], limit_s)


def _start(
    run: RunFolder,
    ledger: Ledger,
    state: State,
    batch: Batch,
    config: RunConfig,
    spare: list[_Worker],
) -> _Task:
    number = max((s.number for s in ledger.submissions()), default=0) + 1
    submission = Submission(
        number=number,
        request=state.request.number,
        name=job_name(run, batch.stage, number),
        stage=batch.stage,
        tasks=batch.tasks,
        resources={},
        code=state.request.code,
        time=time.time(),
        host=socket.gethostname(),
        pid=os.getpid(),
    )
    ledger.claim(submission)
    log = ledger.log_path(number, 0)
    log.parent.mkdir(parents=True, exist_ok=True)
    world_size = batch.nodes * batch.ranks_per_node
    if world_size == 1 and spare:
        workers = [spare.pop()]
    else:
        port = _port(number)
        workers = [
            _Worker(run, submission.code, _environment(config.threads, rank, world_size, port))
            for rank in range(world_size)
        ]
    for worker in workers:
        worker.send(number, log)
    return _Task(submission=submission, workers=workers, codes={})


def _port(number: int) -> int:
    """Where the ranks of a task meet; workers of one launcher have different ones."""
    return 10000 + (os.getpid() * 7 + number) % 20000


def _outside_slurm() -> dict[str, str]:
    """This environment without a surrounding job, whose ranks are not ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def _python_path(home: Path) -> str:
    return os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])


def _environment(threads: int, rank: int, world_size: int, port: int) -> dict[str, str]:
    """What slurm/environment.sh and srun set on a cluster."""
    return dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    ) | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _finish(task: _Task, run: RunFolder, ledger: Ledger) -> None:
    """Settle a submission; say what became of shards that left no output and no word."""
    number = task.submission.number
    worst = next((code for code in task.codes.values() if code), 0)
    known = {(failure.submission, failure.key) for failure in ledger.failures()}
    for key in task.submission.keys:
        if run.record_path(key).exists() or (number, key) in known:
            continue
        kind, message = "LOST", f"its process ended with exit code {worst}"
        if worst == failures.STOPPED_EXIT_CODE or worst == -signal.SIGTERM:
            kind, message = "STOPPED", "was told to stop and did"
        elif worst < 0:
            message = f"killed by {signal.Signals(-worst).name} (out of memory, or by somebody)"
        ledger.add_failure(
            Failure(
                key=key,
                kind=kind,
                message=message,
                fingerprint=kind,
                submission=number,
                log=str(ledger.log_path(number, 0)),
                time=time.time(),
            )
        )
    job = Job(job_id=None, note=f"exit code {worst}", launcher_cpu_s=time.process_time())
    ledger.settle(number, job)
