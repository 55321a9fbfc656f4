"""Run a task inside a job: `python -m kdhpc.cluster.task RUN SUBMISSION`.

A task runs its shards one after the other and publishes each. Every start of a shard is an attempt;
a published shard is skipped. SIGUSR2 and SIGTERM only set a flag, which stages check.

A packed task (`slurm.pack`) is several such processes on one node, each with a log of its own. They
share the task's shards and know nothing else of each other.

The local executor keeps the process for further tasks (`task RUN --serve`), so that torch is
imported once per worker and not once per task.
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from kdhpc.cluster import failures, runs
from kdhpc.cluster.ledger import AttemptEvent, Failure, Ledger, Submission
from kdhpc.cluster.runs import Run
from kdhpc.config import presets
from kdhpc.config.run import RunConfig
from kdhpc.errors import ClusterError, KdhpcError
from kdhpc.plan.shards import Plan, Shard
from kdhpc.storage.files import disk_errors
from kdhpc.storage.work import Work, forget_memory

PROGRESS_EVERY_S = 2.0


class _StopFlag:
    """A flag that is set by the signals that Slurm sends before it kills a task."""

    def __init__(self) -> None:
        self.is_set = False
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        print(f"told to stop by {signal.Signals(number).name}", flush=True)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a process is in its submission."""

    submission: Submission
    task: int
    """Index of the task in its array."""
    process: int | None = None
    """Index of the process in a packed task; None in any other."""


def find_place(submission: Submission, task: int) -> _Place:
    """Return where this process is; in a packed task, also make it the only rank of its work."""
    if submission.pack == 1 or "SLURM_LOCALID" not in os.environ:
        return _Place(submission=submission, task=task)
    process = os.environ["SLURM_LOCALID"]
    os.environ |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "LOCAL_RANK": process}
    return _Place(submission=submission, task=task, process=int(process))


def shards_of(place: _Place, run: Run, ledger: Ledger) -> Iterator[str]:
    """Yield the shards that this process works on, one at a time.

    The processes of a packed task share its shards: each takes the next that none has taken, so
    that all are busy to the end, whatever becomes of one of them.
    """
    submission = place.submission
    keys = submission.tasks[place.task]
    if place.process is None:
        yield from keys
        return
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    for index, key in enumerate(keys):
        taken = ledger.claim_shard(submission.number, place.task, start, index)
        if taken is None:  # the disk is full: share by index
            taken = index % submission.pack == place.process
        if taken:
            yield key
            if run.record_path(key).exists():
                ledger.forget_claim(submission.number, place.task, start, index)


def find_rank() -> tuple[int, int]:
    """Return rank and world size, as srun or the local executor set them.

    Under srun, also set the other variables that ranks need. LOCAL_RANK is the index of this
    process on its node. MASTER_ADDR and MASTER_PORT are where the ranks meet; if they are set, by
    the batch script or by a site's own setup lines, they stay.

    Raises:
        ClusterError: if there are several nodes and nothing says at which address they meet.
    """
    rank = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))
    world_size = int(os.environ.get("SLURM_NTASKS", os.environ.get("WORLD_SIZE", "1")))
    if "SLURM_PROCID" not in os.environ:
        return rank, world_size
    if world_size == 1:
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
        return rank, world_size
    os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
    if not os.environ.get("MASTER_ADDR"):
        if os.environ.get("SLURM_JOB_NUM_NODES") != "1":
            raise ClusterError(
                f"rank {rank} of {world_size}: MASTER_ADDR is not set; expected the batch script "
                "to ask scontrol for the address of the first node; export it in slurm.setup"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if not os.environ.get("MASTER_PORT"):
        # The port is below the ephemeral range, and differs for a requeued attempt.
        seed = int(os.environ["SLURM_JOB_ID"]) * 7 + int(os.environ.get("SLURM_RESTART_COUNT", 0))
        os.environ["MASTER_PORT"] = str(10000 + seed % 20000)
    return rank, world_size


def _progress_writer(path: Path) -> Callable[[str], Callable[[float], None]]:
    """Return a function that makes, for a shard's key, the function that writes its progress."""
    last_written = [0.0]

    def for_shard(key: str) -> Callable[[float], None]:
        first: list[float] = []

        def write(fraction: float) -> None:
            if not first:
                first[:] = [round(fraction, 4), round(time.time(), 3)]
            if time.monotonic() - last_written[0] < PROGRESS_EVERY_S:
                return
            last_written[0] = time.monotonic()
            temporary = path.with_suffix(".tmp")
            note = {"key": key, "fraction": round(fraction, 4), "first": first}
            with contextlib.suppress(OSError):  # a failure to show progress must not stop work
                temporary.write_text(json.dumps(note))
                os.replace(temporary, path)

        return write

    return for_shard


def run_task(path: Path, number: int, index: int) -> int:
    """Run one task.

    Args:
        path: the run folder.
        number: number of the submission.
        index: index of the task in its array.

    Returns:
        The exit code: 0, 1 if a shard failed, 75 if the task stopped when told to, 76 if the GPU
        cannot be used any more.
    """
    ledger = Ledger(path)
    place = find_place(ledger.submission(number), index)
    submission = place.submission
    run, config, plan = _load_request(path, submission.request)
    rank, world_size = find_rank()
    stop = _StopFlag()
    log = ledger.log_path(number, index, place.process)
    if place.process is not None:
        _print_to(log)
    progress = _progress_writer(path / "progress" / f"{number:04d}-{log.stem}.json")
    work = Work(
        run,
        config,
        plan,
        code=submission.code,
        should_stop=lambda: stop.is_set,
        rank=rank,
        world_size=world_size,
    )
    code = 0
    for key in shards_of(place, run, ledger):
        if stop.is_set:
            return failures.STOPPED_EXIT_CODE
        if run.record_path(key).exists():
            work.point_names(plan.shards[key])
            print(f"{key}: already published", flush=True)
            continue
        if rank == 0:
            work.progress = progress(key)
        result = _attempt(run, plan.shards[key], work, ledger, place)
        code = result or code
        if result in {failures.STOPPED_EXIT_CODE, failures.BROKEN_EXIT_CODE}:
            return result
    return code


@functools.lru_cache(maxsize=1)
def _load_request(path: Path, number: int) -> tuple[Run, RunConfig, Plan]:
    """Return run, config and plan of a request; they are cached because a request never changes."""
    run = runs.open_run(path)
    request = Ledger(path).request(number)
    config = presets.build(run.pipeline.config, dict(request.config))
    return run, config, run.pipeline.plan(config)


def _attempt(
    run: Run,
    shard: Shard,
    work: Work[RunConfig],
    ledger: Ledger,
    place: _Place,
) -> int:
    """Run one shard and publish it, or record why it failed. Returns an exit code."""
    started = time.time()
    number = place.submission.number

    def note(event: AttemptEvent) -> None:
        if work.rank == 0:
            ledger.note_attempt(number, place.task, shard.key, event, place.process)

    run.check_there()
    forget_memory()
    print(f"{shard.key}{failures.STARTED}", flush=True)
    note("started")
    try:
        with disk_errors(run.path):
            written = run.pipeline.stage(shard.stage).run(shard, work)
            if written is None:
                if work.rank > 0:
                    return 0
                print(f"{shard.key}: stopped; the next attempt continues from here", flush=True)
                note("stopped")
                return failures.STOPPED_EXIT_CODE
            won = work.publish(shard, written, started)
    except Exception as error:
        run.check_there()
        traceback.print_exc()
        work.discard()
        kind, message, fingerprint = failures.of_exception(error)
        failure = Failure(
            key=shard.key,
            kind=kind,
            message=message,
            fingerprint=fingerprint,
            submission=number,
            log=str(ledger.log_path(number, place.task, place.process)),
            node=os.environ.get("SLURMD_NODENAME", ""),
            time=time.time(),
            got_further=kind == "LOST" and run.checkpoint_since(shard.key, started),
        )
        with contextlib.suppress(OSError):  # on a full disk, the log line must suffice
            ledger.add_failure(failure)
        print(f"{shard.key}: failed: {message}", flush=True)
        note("ended")
        # What one process of a packed task is refused, such as its GPU, it would be refused again.
        broken = kind == "REFUSED" and place.process is not None
        broken |= failures.breaks_process(error)
        return failures.BROKEN_EXIT_CODE if broken else 1
    outcome = "published" if won else "another attempt published first"
    print(f"{shard.key}: {outcome} after {time.time() - started:.1f} s", flush=True)
    note("ended")
    return 0


def serve(path: Path) -> None:
    """Run tasks as they come on standard input, each a line of JSON: [submission, task, log].

    The answer to each is a line with the exit code. Everything else that is printed goes to the
    task's log. The modules that tasks need are imported at once, because a worker is started before
    there is a task for it.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        _print_to(path / "logs" / "workers.log")
        pipeline = runs.open_run(path).pipeline
        for name in dict.fromkeys(name for stage in pipeline.stages for name in stage.modules):
            with contextlib.suppress(Exception):  # a task that needs the module will report it
                importlib.import_module(name)
        for line in sys.stdin:
            number, index, log_path = json.loads(line)
            _print_to(log_path)
            code = run_task(path, number, index)
            sys.stdout.flush()
            print(code, file=answers, flush=True)


def _print_to(path: str | Path) -> None:
    """Append standard output and standard error of this process to a file from now on."""
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def main() -> None:
    """Run the command line of a job step."""
    path = Path(sys.argv[1])
    if sys.argv[2] == "--serve":
        serve(path)
        return
    code = run_task(path, int(sys.argv[2]), int(os.environ["SLURM_ARRAY_TASK_ID"]))
    end_process(code)


def end_process(code: int) -> NoReturn:
    """End this process at once, with everything that it printed.

    Threads of torch.distributed would otherwise end with the library's own variables, in any order.
    Now and then that aborts a rank that is done, and srun then ends the others, also one that still
    saves the model.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except KdhpcError as error:
        sys.exit(f"error: {error}")
