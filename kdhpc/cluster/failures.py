"""One table of the classes of failure and what is done about each.

A failed shard is tried again automatically only if that can help. Otherwise it waits for `rerun.py`
or another `sweep.py`, which start a fresh budget of attempts. `python -m kdhpc.cluster.failures`
prints the table for docs/reliability.md.
"""

import hashlib
import re
import traceback
from dataclasses import dataclass

from kdhpc.errors import DamagedError, InputError
from kdhpc.storage.files import DISK_FULL_ERRNOS


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """Whether and how a failed shard is tried again."""

    means: str
    """What happened, for people."""
    retry: bool
    """Whether it is tried again automatically."""
    time_factor: float = 1.0
    mem_factor: float = 1.0
    avoid_node: bool = False
    free_with_progress: bool = False
    """Whether the failure costs no attempt if the shard or its task made progress."""
    advice: str = ""
    """What a person can do when it is not tried again."""


REMEDIES = {
    "TIMEOUT": Remedy(
        means="it reached its time limit",
        retry=True,
        time_factor=1.5,
        free_with_progress=True,
        advice="give it more time: rerun.py RUN slurm.time_min=...",
    ),
    "STOPPED": Remedy(
        means="it was told to stop, and did so between shards or at a checkpoint",
        retry=True,
        free_with_progress=True,
        advice="run sweep.py again",
    ),
    "PREEMPTED": Remedy(
        means="another job preempted it",
        retry=True,
        free_with_progress=True,
        advice="run sweep.py again",
    ),
    "NODE_FAIL": Remedy(
        means="its node went down",
        retry=True,
        avoid_node=True,
        free_with_progress=True,
        advice="rerun.py RUN slurm.exclude=NODE",
    ),
    "OOM": Remedy(
        means="it ran out of the node's memory, as reported by Slurm, Python or torch",
        retry=True,
        mem_factor=1.5,
        advice="give it more memory: rerun.py RUN slurm.mem_gb=...",
    ),
    "GPU_OOM": Remedy(
        means="it ran out of the GPU's memory",
        retry=False,
        advice="use fewer rows (sampling.batch_rows, sampling.trained_batch_rows, "
        "scoring.batch_rows) or a smaller training.micro_batch_sequences, or ask for a GPU with "
        "more memory; then rerun.py RUN",
    ),
    "GPU_BAD": Remedy(
        means="its GPU, the driver, or NCCL's access to the GPU failed",
        retry=True,
        avoid_node=True,
        advice="rerun.py RUN slurm.exclude=NODE, and tell the administrators",
    ),
    "LOST": Remedy(
        means="it was killed, or ended without a message",
        retry=True,
        free_with_progress=True,
        advice="look at its log, then rerun.py RUN",
    ),
    "EXCEPTION": Remedy(
        means="the code raised an exception; two are the same if their types and tracebacks are",
        retry=True,
        advice="look at the traceback, fix the cause, then rerun.py RUN",
    ),
    "DIVERGED": Remedy(
        means="the loss or gradient norm of a training is NaN, or the norm exploded",
        retry=False,
        advice="use a smaller training.learning_rate, or float32; the training then starts anew",
    ),
    "REFUSED": Remedy(
        means="the config asks for something that cannot be done",
        retry=False,
        advice="change what the message names, then rerun.py RUN",
    ),
    "DISK_FULL": Remedy(
        means="the disk is full, or its quota is used up",
        retry=False,
        advice="free some space, then rerun.py RUN",
    ),
    "LAUNCH": Remedy(
        means="Slurm refused it, or it never reached kdhpc's code",
        retry=False,
        advice="check slurm.setup and slurm.partition, then rerun.py RUN",
    ),
    "CANCELLED": Remedy(
        means="a user or an administrator cancelled it with scancel",
        retry=False,
        advice="run sweep.py or rerun.py RUN when you want it again",
    ),
}

SLURM_STATES = {
    "TIMEOUT": "TIMEOUT",
    "DEADLINE": "TIMEOUT",
    "OUT_OF_MEMORY": "OOM",
    "NODE_FAIL": "NODE_FAIL",
    "BOOT_FAIL": "NODE_FAIL",
    "PREEMPTED": "PREEMPTED",
    "CANCELLED": "CANCELLED",
    "REVOKED": "CANCELLED",
}

RANK_GONE = re.compile(
    r"connection (reset|closed) by|broken pipe|ncclRemoteError|ncclSystemError", re.IGNORECASE
)
"""Messages of gloo and NCCL when another rank is gone."""
NO_MEMORY = re.compile(
    r"out of memory|(can't|cannot|couldn't|could not) allocate memory", re.IGNORECASE
)
"""Messages of torch on CPUs, and of the operating system."""
GPU_NO_MEMORY = re.compile(
    r"(CUDA|HIP) out of memory|(CUDA|HIP) error: out of memory|Cuda failure.{0,8}'out of memory'|"
    r"cudaGetDeviceCount.*Error 2: out of memory|_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
"""Messages of torch's allocator, of the CUDA and HIP runtimes, of NCCL, and of their libraries."""
GPU_FAILED = re.compile(
    r"uncorrectable (ECC|NVLink) error|hardware stack error|unspecified launch failure|"
    r"(Cuda failure.{0,8}'|(CUDA|HIP) error: )unknown error|GPU is lost|fallen off the bus|"
    r"no (CUDA|ROCm)-capable device is detected|No (CUDA|HIP) GPUs are available|"
    r"device\(s\) is/are busy or unavailable|(CUDA|HIP) error: initialization error|"
    r"CUDA driver initialization failed|cudaGetDeviceCount\(\)|system not yet initialized|"
    r"driver version is insufficient|NVIDIA driver on your system is too old|"
    r"Found no NVIDIA driver|unsupported display driver|ncclUnhandledCudaError|ncclInternalError",
    re.IGNORECASE,
)
"""Messages of CUDA, HIP, torch and NCCL about a GPU or driver that another node may have in order.

An illegal memory access and a device-side assert are not among them. They name an address or an
index that is wrong, which is an error of the program far more often than of the hardware, so they
are exceptions, and the second one is shown to a person. An unspecified launch failure names nothing
of the program. If it is a bug nevertheless, it ends after `slurm.max_attempts` nodes."""
KILLED = {code: n for n in (9, 15) for code in (f"0:{n}", f"{n}:0", f"{128 + n}:0")}
"""Signal that killed a task, SIGKILL (9) or SIGTERM (15), by the task's ExitCode in sacct, which is
`exit code:signal`. Signal 9 is `0:9` if Slurm reports the signal itself, `9:0` if srun 22.05 ended
with the signal as its exit code, and `137:0` if a later srun ended with 128 + signal."""
STARTED = ": started"
"""End of the line that begins a shard's attempt in the log of its task."""
BROKEN_EXIT_CODE = 76
"""Exit code of a process that does no more, because its GPU failed or was refused to it."""
STOPPED_EXIT_CODE = 75
"""Exit code of a task that was told to stop and did so between shards or at a checkpoint."""


def of_exception(error: BaseException) -> tuple[str, str, str]:
    """Classify an exception.

    Returns:
        Class, message and fingerprint. The fingerprint covers the exception's type and its places
        in the code, not values, so that the same bug in a thousand shards counts as one.
    """
    kind = "EXCEPTION"
    if type(error).__name__ == "OutOfMemoryError" or GPU_NO_MEMORY.search(str(error)):
        kind = "GPU_OOM"  # torch.OutOfMemoryError, which only accelerators raise
    elif isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
        kind = "OOM"
    elif isinstance(error, FloatingPointError):
        kind = "DIVERGED"
    elif RANK_GONE.search(str(error)):
        kind = "LOST"  # the other ranks see a lost connection when one rank is killed
    elif GPU_FAILED.search(str(error)):
        kind = "GPU_BAD"
    elif isinstance(error, InputError):
        kind = "REFUSED"
    elif isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
        kind = "DISK_FULL"
    elif isinstance(error, DamagedError) and isinstance(error.__cause__, OSError):
        kind = "DISK_FULL" if error.__cause__.errno in DISK_FULL_ERRNOS else kind
    elif re.search(r"no space left|quota exceeded|errno = 28", str(error), re.IGNORECASE):
        kind = "DISK_FULL"  # HDF5 and safetensors raise errors of their own
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename.rpartition('/')[2]}:{frame.name}" for frame in frames]
    text = "\n".join([type(error).__name__, *places])
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    return kind, message, hashlib.sha256(text.encode()).hexdigest()[:12]


def breaks_process(error: BaseException) -> bool:
    """Return whether every later use of the GPU in the same process fails too."""
    text = str(error)
    return bool(re.search(r"(CUDA|HIP|NCCL) error", text) or GPU_FAILED.search(text))


def of_slurm(
    state: str, exit_code: str, *, started: bool, cancelled: bool = False
) -> tuple[str, str]:
    """Classify a task that left the queue without output.

    Args:
        state: its state, such as `CANCELLED by 1000`; empty if neither the controller nor
            accounting knows it.
        exit_code: its exit code and signal, such as `0:9`.
        started: whether the task reached kdhpc's own code.
        cancelled: whether cancel.py was typed after the task was submitted.

    Returns:
        Class and message.
    """
    word = re.split(r"[ +]", state)[0]
    if word in SLURM_STATES:
        return SLURM_STATES[word], f"Slurm says {state}"
    if exit_code.startswith(f"{STOPPED_EXIT_CODE}:"):
        return "STOPPED", "was told to stop and did"
    if word == "FAILED" and exit_code in KILLED:
        return "LOST", f"killed by signal {KILLED[exit_code]} (out of memory, or by somebody)"
    if word and not started:
        return "LAUNCH", f"never reached kdhpc's code (Slurm says {state}, exit code {exit_code})"
    if word:
        return "LOST", f"left no output (Slurm says {state}, exit code {exit_code})"
    if cancelled:  # accounting may be late to tell of it, or absent
        return "CANCELLED", "was cancelled by cancel.py"
    return "LOST", "left the queue without output; Slurm says nothing of it"


def as_markdown() -> str:
    """Format the remedies as a Markdown table."""
    lines = [
        "| class | what happened | tried again automatically | next attempt | what you can do |",
        "|---|---|---|---|---|",
    ]
    for kind, remedy in REMEDIES.items():
        retry = "no"
        if remedy.retry:
            retry = "yes; free with progress" if remedy.free_with_progress else "yes"
        changes = [
            f"time x {remedy.time_factor:g}" if remedy.time_factor > 1 else "",
            f"memory x {remedy.mem_factor:g}" if remedy.mem_factor > 1 else "",
            "another node" if remedy.avoid_node else "",
        ]
        change = ", ".join(filter(None, changes)) or ("the same" if remedy.retry else "")
        lines.append(f"| {kind} | {remedy.means} | {retry} | {change} | {remedy.advice} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")
