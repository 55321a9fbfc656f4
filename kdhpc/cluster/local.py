"""Run a plan in processes of this machine: the same tasks as on Slurm, with a loop for the gates."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kdhpc.artifacts import RunFolder
from kdhpc.cluster import failures
from kdhpc.cluster.advance import LOCAL_TASK_S, State, job_name, observe
from kdhpc.cluster.decide import Batch, Policy
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission
from kdhpc.config import RunConfig
from kdhpc.shards import Plan


@dataclass
class _Task:
    submission: Submission
    processes: list[subprocess.Popen[bytes]]
    log: IO[bytes]

    def ended(self) -> bool:
        codes = [process.poll() for process in self.processes]
        if any(codes):  # one rank died: end the others, like srun --kill-on-bad-exit
            self.stop()
        return all(code is not None for code in codes)

    def stop(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)


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
    workers = config.local_workers or len(os.sched_getaffinity(0))
    ledger = Ledger(run.path)
    tasks: list[_Task] = []
    policy = Policy(
        task_s=LOCAL_TASK_S,
        max_array=1,
        max_tasks=10**9,
        per_array=0,
        max_attempts=config.slurm.max_attempts,
    )
    try:
        while True:
            for task in [task for task in tasks if task.ended()]:
                tasks.remove(task)
                _finish(task, run, ledger)
            active = frozenset(key for task in tasks for key in task.submission.keys)
            state = observe(
                run, config, plan, local_active=active, policy=policy, with_queue=False
            )
            on_change(state, active)
            free = workers - len(tasks)
            batches = state.decision.batches
            if not tasks and not batches:
                return state
            for batch in batches[:free]:
                tasks.append(_start(run, ledger, state, batch, config))
            _wait(tasks)
    except BaseException:
        for task in tasks:
            task.stop()
        for task in tasks:
            for process in task.processes:
                process.wait()
            _finish(task, run, ledger)
        raise


def _wait(tasks: list[_Task], limit_s: float = 0.5) -> None:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not any(task.ended() for task in tasks):
        time.sleep(0.02)


def _start(
    run: RunFolder, ledger: Ledger, state: State, batch: Batch, config: RunConfig
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
    home = run.path / "code" / submission.code
    log_path = ledger.log_path(number, 0)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    log = log_path.open("ab")
    world_size = batch.nodes * batch.ranks_per_node
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kdhpc.cluster.task", str(run.path), str(number), "0"],
            cwd=home,
            env=_environment(home, config, rank, world_size),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]
    return _Task(submission=submission, processes=processes, log=log)


def _environment(home: Path, config: RunConfig, rank: int, world_size: int) -> dict[str, str]:
    """What slurm/environment.sh sets on a cluster."""
    threads = str(config.threads)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    path = [str(home), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment |= dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads
    )
    environment |= {
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if world_size > 1:
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(10000 + os.getpid() % 20000),
        }
    return environment


def _finish(task: _Task, run: RunFolder, ledger: Ledger) -> None:
    """Settle a submission; say what became of shards that left no output and no word."""
    task.log.close()
    number = task.submission.number
    codes = [process.returncode for process in task.processes]
    worst = next((code for code in codes if code), 0)
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
    ledger.settle(number, Job(job_id=None, note=f"exit code {worst}"))
