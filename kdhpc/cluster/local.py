"""Run a plan in processes on this machine: the same tasks as on Slurm, and a loop for the gates."""

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

from kdhpc.cluster import failures
from kdhpc.cluster.decide import Batch, Policy
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission, launcher_gone
from kdhpc.cluster.observe import State, observe
from kdhpc.cluster.runs import Run
from kdhpc.cluster.submission import job_name
from kdhpc.config.run import RunConfig
from kdhpc.plan.shards import Plan


class _Worker:
    """A process that runs tasks one at a time (see `task.serve`)."""

    def __init__(self, run: Run, code: str, slot: int, environment: Mapping[str, str]) -> None:
        self.run, self.code, self.slot = run, code, slot
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
        """Start task 0 of a submission in this process."""
        pipe = cast(IO[bytes], self.process.stdin)
        with contextlib.suppress(BrokenPipeError):  # the process died; `exit_code` reports it
            pipe.write(json.dumps([number, 0, str(log)]).encode() + b"\n")
            pipe.flush()

    def exit_code(self) -> int | None:
        """Return the exit code of the last task: None while it runs, negative if killed."""
        answer = self.answers.readline()
        return int(answer) if answer else self.process.poll()

    def stop(self) -> None:
        """Tell the process to stop at the next shard or checkpoint."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Let the process end once its task is done, and wait for that."""
        with contextlib.suppress(BrokenPipeError):
            cast(IO[bytes], self.process.stdin).close()
        self.process.wait()
        self.answers.close()


@dataclass
class _Task:
    """A submission that is running, with one worker for each rank."""

    submission: Submission
    workers: list[_Worker]
    codes: dict[int, int]
    """Exit codes by rank, of the ranks that have ended."""

    def ended(self) -> bool:
        """Collect exit codes, end the other ranks if one failed; return whether all have ended."""
        for rank, worker in enumerate(self.workers):
            if rank not in self.codes and (code := worker.exit_code()) is not None:
                self.codes[rank] = code
        if any(self.codes.values()):  # a rank failed: end the others, like srun --kill-on-bad-exit
            for rank, worker in enumerate(self.workers):
                if rank not in self.codes:
                    worker.process.kill()
        return len(self.codes) == len(self.workers)


def run_all(
    run: Run, config: RunConfig, plan: Plan, *, on_change: Callable[[State], None] = lambda _: None
) -> State:
    """Run every shard that can run.

    Ctrl-C lets running tasks stop at the next shard or checkpoint; another sweep continues there.

    Args:
        run: the run folder.
        config: config of its last request.
        plan: plan of that config.
        on_change: called with the state of the run after every change, and every two seconds.

    Returns:
        The state of the run at the end.
    """
    ledger = Ledger(run.path)
    jobs = ledger.jobs()
    for submission in ledger.submissions():
        if submission.number not in jobs and launcher_gone(submission):
            ledger.settle(submission.number, Job(job_id=None, note="its launcher died"))
    with _Pool(run, config, ledger) as pool:
        while True:
            pool.collect()
            active = frozenset(key for task in pool.tasks for key in task.submission.keys)
            policy = Policy.local(config)
            state = observe(run, config, plan, local_active=active, policy=policy, with_queue=False)
            on_change(state)
            if not pool.tasks and not state.decision.batches:
                return state
            for batch in state.decision.batches:
                if not pool.fits(batch):
                    break
                pool.start(state, batch)
            pool.warm_up(state)
            pool.wait()


class _Pool:
    """Running tasks and spare workers, at most `local_workers` tasks at once.

    On a machine with GPUs, every process has the slot of one GPU, and a training takes as many as
    it has ranks. On CPUs a training counts as one task, so that it runs on any machine.
    """

    def __init__(self, run: Run, config: RunConfig, ledger: Ledger) -> None:
        self.run, self.config, self.ledger = run, config, ledger
        self.num_gpus = num_gpus(config)
        self.size = num_workers(config, self.num_gpus)
        self.broken: set[int] = set()
        """Slots whose GPU has failed."""
        self.killed = False
        """Whether a second Ctrl-C has killed what ran."""
        self.tasks: list[_Task] = []
        self.spare: list[_Worker] = []

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        """Stop running tasks at their next shard or checkpoint, and end all workers.

        Another Ctrl-C meanwhile kills them.
        """
        workers = [worker for task in self.tasks for worker in task.workers]
        try:
            for worker in workers:
                worker.stop()
            if kind is KeyboardInterrupt and self.tasks:
                print(
                    "stopping: what runs now ends at its next shard or checkpoint; Ctrl-C again "
                    "kills it, and what it has not published or saved is made again",
                    file=sys.stderr,
                    flush=True,
                )
            while self.tasks:
                self.wait()
                self.collect()
        except KeyboardInterrupt:
            self.killed = True
            for worker in workers:
                worker.process.kill()
            while self.tasks:
                self.wait()
                self.collect()
        for worker in self.spare:
            worker.process.kill()  # it has no task; to end by itself takes seconds
            worker.close()

    @property
    def num_free(self) -> int:
        """How many more tasks of one rank may run now."""
        used = [worker for task in self.tasks for worker in task.workers]
        size = max(1, self.size - len(self.broken))
        return size - len(used if self.num_gpus else self.tasks)

    def fits(self, batch: Batch) -> bool:
        """Return whether a task of this array can start now; if nothing runs, any can."""
        num_slots = batch.nodes * batch.ranks_per_node if self.num_gpus else 1
        return num_slots <= self.num_free or not self.tasks

    def _free_slots(self, count: int) -> list[int]:
        """Return slots for the processes of a task; spare processes in them are ended."""
        if not self.num_gpus:
            return list(range(count))
        busy = {worker.slot for task in self.tasks for worker in task.workers}
        free = [slot for slot in range(self.size + count) if slot not in busy]
        # The GPUs of broken slots come last; more processes than GPUs share them.
        slots = sorted(free, key=lambda s: (s >= self.size, s in self.broken, s))[:count]
        for worker in [worker for worker in self.spare if worker.slot in slots]:
            self.spare.remove(worker)
            worker.close()
        return slots

    def collect(self) -> None:
        """Settle the tasks that have ended, and keep their workers for the next tasks."""
        for task in [task for task in self.tasks if task.ended()]:
            self.tasks.remove(task)
            _finish(task, self.run, self.ledger, killed=self.killed)
            broken = failures.BROKEN_EXIT_CODE in task.codes.values()
            if broken and self.num_gpus:
                self.broken |= {worker.slot for worker in task.workers}
            if len(task.workers) == 1 and task.workers[0].process.poll() is None and not broken:
                self.spare += task.workers
            else:
                for worker in task.workers:
                    worker.close()

    def start(self, state: State, batch: Batch) -> None:
        """Claim a submission of one task, and send it to a worker for each rank."""
        number = max((s.number for s in self.ledger.submissions()), default=0) + 1
        submission = Submission(
            number=number,
            request=state.request.number,
            name=job_name(self.run, batch.stage, number),
            stage=batch.stage,
            tasks=batch.tasks,
            resources={},
            code=state.request.code,
            time=time.time(),
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        self.ledger.claim(submission)
        log = self.ledger.log_path(number, 0)
        log.parent.mkdir(parents=True, exist_ok=True)
        num_ranks = batch.nodes * batch.ranks_per_node
        if num_ranks == 1 and self.spare:
            workers = [self.spare.pop()]
        else:
            workers = [
                self._worker(submission.code, slot, rank, num_ranks, number)
                for rank, slot in enumerate(self._free_slots(num_ranks))
            ]
        for worker in workers:
            worker.send(number, log)
        self.tasks.append(_Task(submission=submission, workers=workers, codes={}))

    def warm_up(self, state: State) -> None:
        """Start a spare worker if a core is free; it imports modules before it gets a task."""
        if not self.spare and self.num_free > 0:
            number = -len(self.ledger.submissions())  # gives a port that no task uses
            [slot] = self._free_slots(1)
            self.spare.append(self._worker(state.request.code, slot, 0, 1, number))

    def _worker(self, code: str, slot: int, rank: int, num_ranks: int, number: int) -> _Worker:
        environment = _environment(self.config.threads, rank, num_ranks, _port(number))
        gpu = slot % self.num_gpus if self.num_gpus else rank
        return _Worker(self.run, code, slot, environment | {"LOCAL_RANK": str(gpu)})

    def wait(self, limit_s: float = 2.0) -> None:
        """Wait until a worker answers or ends, at most until the display should be updated."""
        pending_answers = [
            worker.answers
            for task in self.tasks
            for rank, worker in enumerate(task.workers)
            if rank not in task.codes
        ]
        select.select(pending_answers, [], [], limit_s)


def num_workers(config: RunConfig, num_gpus: int) -> int:
    """Return how many tasks run at once: as asked for, else one per GPU, else one per core."""
    return config.local_workers or num_gpus or len(os.sched_getaffinity(0))


def num_gpus(config: RunConfig) -> int:
    """Return the number of GPUs for workers; torch is loaded only where there is a driver."""
    if not num_gpu_devices(config):
        return 0
    from kdhpc.models import devices

    return devices.num_gpus()


def num_gpu_devices(config: RunConfig) -> int:
    """Return how many GPUs the drivers show, without torch: for a plan, and to know whether any."""
    if config.device == "cpu":
        return 0
    return len([*Path("/dev").glob("nvidia[0-9]*"), *Path("/dev").glob("kfd")])


def _port(number: int) -> int:
    """Return the port at which the ranks of a task meet; tasks of one launcher differ in it."""
    return 10000 + (os.getpid() * 7 + number) % 20000


def _outside_slurm() -> dict[str, str]:
    """Return the environment without the variables of a surrounding job, whose ranks differ."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}


def _python_path(home: Path) -> str:
    return os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])


def _environment(threads: int, rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the variables that slurm/environment.sh and srun set on a cluster."""
    return dict.fromkeys(
        ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)
    ) | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _finish(task: _Task, run: Run, ledger: Ledger, *, killed: bool) -> None:
    """Settle a submission, and record a failure for its shards without output or failure."""
    number = task.submission.number
    exit_code = next((code for code in task.codes.values() if code), 0)
    known = {(failure.submission, failure.key) for failure in ledger.failures()}
    begun = ledger.last_events(number, 0)
    for key in task.submission.keys:
        if run.record_path(key).exists() or (number, key) in known:
            continue
        if exit_code == failures.BROKEN_EXIT_CODE and key not in begun:
            continue
        kind, message = "LOST", f"its process ended with exit code {exit_code}"
        if exit_code == failures.STOPPED_EXIT_CODE or exit_code == -signal.SIGTERM:
            kind, message = "STOPPED", "was told to stop and did"
        elif killed and exit_code == -signal.SIGKILL:
            kind, message = "STOPPED", "was killed by a second Ctrl-C"
        elif exit_code < 0:
            message = f"killed by {signal.Signals(-exit_code).name} (out of memory, or by somebody)"
        ledger.add_failure(
            Failure(
                key=key,
                kind=kind,
                message=message,
                fingerprint=kind,
                submission=number,
                log=str(ledger.log_path(number, 0)),
                time=time.time(),
                got_further=run.checkpoint_since(key, task.submission.time),
            )
        )
    job = Job(job_id=None, note=f"exit code {exit_code}", launcher_cpu_s=time.process_time())
    ledger.settle(number, job)
