"""Talk to Slurm: submit held arrays through submitit, ask for the queue once, look up lost answers.

Nothing here decides. Every call to a Slurm program goes through `_run`, with a time limit and
without the `SLURM_*` variables of a surrounding job, which sbatch would inherit.
"""

import functools
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdhpc.errors import ClusterError

if TYPE_CHECKING:
    from kdhpc.cluster.resources import Resources

ANSWER_LIMIT_S = 60.0
"""How long a lost submission is looked for before it counts as never made."""
LOST_ANSWERS = ("socket timed out", "unable to contact", "connection refused", "communication")
OVER_LIMIT = (
    "qosmaxsubmit",
    "assocmaxsubmit",
    "maxsubmitjob",
    "job violates accounting/qos policy",
)
ENDED = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
"""States without a process; COMPLETING still has one, or is about to be requeued."""
HELD_REASONS = {"JobHeldUser", "launch failed requeued held", "launch_failed_requeued_held"}
"""Of jobs that wait for a release: their launcher died before it could, or Slurm could not start
them, as after a restart of the controller, and gave up."""
GONE = re.compile(r"already finished|invalid job id", re.IGNORECASE)
"""What Slurm says of a job that has ended, and of one that it has forgotten."""
NOT_YET_KNOWN = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "RESIZING")


class RefusedError(ClusterError):
    """Slurm will not take this script, now or later."""


class OverLimitError(ClusterError):
    """The array is larger than what this user may have in the queue."""


class LostAnswerError(ClusterError):
    """sbatch failed, and whether it made a job is not known."""


@dataclass(frozen=True, kw_only=True)
class Queued:
    """One task in the queue."""

    job_id: str
    """Of the whole array."""
    index: int | None
    state: str
    reason: str
    name: str


def available() -> bool:
    """Whether `sbatch` is here and a controller answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return _run(["scontrol", "ping"], limit_s=10).returncode == 0
    except ClusterError:
        return False


def queue() -> list[Queued]:
    """This user's tasks, array elements one by one, with a single squeue.

    Raises:
        ClusterError: if the controller does not answer.
    """
    found = _run(["squeue", "--me", "--noheader", "--array", "--format=%A|%F|%K|%T|%r|%j"])
    if found.returncode:
        raise ClusterError(f"squeue failed: {_last_line(found.stderr)}; try again later")
    tasks = []
    for line in found.stdout.splitlines():
        job_id, array_id, index, state, reason, name = line.strip().split("|", 5)
        if state in ENDED:
            continue
        number = int(index) if index.isdigit() else None
        tasks.append(
            Queued(
                job_id=array_id if number is not None else job_id,
                index=number,
                state=state,
                reason=reason,
                name=name,
            )
        )
    return tasks


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What accounting says of a task, its last try."""

    state: str
    exit_code: str
    node: str


def accounting(job_ids: Sequence[str]) -> dict[tuple[str, int], Ended]:
    """What accounting says of the tasks of arrays; empty where there is no accounting."""
    if not job_ids:
        return {}
    try:
        found = _run(
            [
                "sacct",
                "--allocations",
                "--duplicates",
                "--noheader",
                "--parsable2",
                "--format=JobID,State,ExitCode,NodeList",
                f"--jobs={','.join(job_ids)}",
            ]
        )
    except ClusterError:
        return {}
    ended = {}
    for line in found.stdout.splitlines():
        fields = line.split("|")
        match = re.fullmatch(r"(\d+)_\[?([\d,-]+)(?:%\d+)?\]?", fields[0])
        if match is None or len(fields) != 4 or fields[1].startswith(NOT_YET_KNOWN):
            continue
        for part in match[2].split(","):  # elements that never started stand in one line
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                # Later lines of one task are later tries.
                ended[match[1], index] = Ended(state=fields[1], exit_code=fields[2], node=fields[3])
    return ended


@functools.cache
def max_array_size() -> int:
    """The cluster's MaxArraySize: one more than the largest index."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout)
    return int(match[1]) if match else 1001


@functools.cache
def partitions() -> dict[str, float]:
    """Names of the partitions and their time limits in minutes; the default one also as ''."""
    found = {}
    for line in _run(["scontrol", "--oneliner", "show", "partition"]).stdout.splitlines():
        name = re.search(r"PartitionName=(\S+)", line)
        limit = re.search(r"MaxTime=(\S+)", line)
        if name:
            found[name[1]] = _minutes(limit[1]) if limit else float("inf")
            if " Default=YES" in line:
                found[""] = found[name[1]]
    return found


def time_limit_min(partition: str | None) -> float:
    """Time limit in minutes of a partition, of several (`a,b`), or of the default one."""
    there = partitions()
    return max(there.get(name, float("inf")) for name in (partition or "").split(","))


def _minutes(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60


def script(*, name: str, command: str, num_tasks: int | None, resources: "Resources") -> str:
    """Batch script of an array or a gate, the same text for the same arguments.

    Args:
        name: of the job.
        command: shell words of what each task runs.
        num_tasks: elements 0..n-1; None for a single job.
        resources: its options.
    """
    from kdhpc.cluster.executor import ArrayExecutor  # submitit is not for who only looks

    executor = ArrayExecutor(folder="logs")
    scratch = (
        [f"export KDHPC_SCRATCH={shlex.quote(resources.scratch)}"] if resources.scratch else []
    )
    wanted = {
        "job_name": name,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "exclude": resources.exclude,
        "time": max(1, round(resources.time_min)),
        "mem": f"{max(1, round(resources.mem_gb * 1024))}M",
        "nodes": resources.nodes,
        "ntasks_per_node": resources.ranks_per_node,
        "cpus_per_task": resources.cpus_per_task,
        "gpus_per_node": resources.gpus_per_node or None,
        "dependency": resources.dependency,
        "array_parallelism": resources.max_parallel,
        "signal_delay_s": resources.signal_s,
        "setup": [*resources.setup, *scratch] or None,
        "stderr_to_stdout": True,
        "wckey": None,
        "srun_args": [
            f"--cpus-per-task={resources.cpus_per_task}",
            "--kill-on-bad-exit=1",
        ],
        # sbatch's command line names the log: in a script, quotes in a path do not survive.
        "additional_parameters": {"output": "/dev/null", "requeue": True},
    }
    executor._internal_update_parameters(**{k: v for k, v in wanted.items() if v is not None})
    executor.parameters["wckey"] = None
    text = executor.script(command, num_tasks)
    # submitit names the step's log after ids; ours is the batch log itself, one file a task.
    return re.sub(r"^(srun --unbuffered) --output \S+", r"\1", text, flags=re.MULTILINE)


def submit_held(path: Path, name: str, log: Path) -> str:
    """Submit a script held. Returns the job id.

    Args:
        path: of the script.
        name: of the job.
        log: of each task; `%a` in its file name stands for the array index.

    Raises:
        OverLimitError: if the user's limits do not allow so many tasks.
        RefusedError: with Slurm's own words.
        LostAnswerError: if it is not known whether there is a job.
    """
    output = f"{str(log.parent).replace('%', '%%')}/{log.name}"
    found = _run(["sbatch", "--parsable", "--hold", f"--output={output}", str(path)], limit_s=120)
    if found.returncode == 0:
        return found.stdout.strip().split(";")[0]
    message = _last_line(found.stderr)
    if any(text in found.stderr.lower() for text in OVER_LIMIT):
        raise OverLimitError(f"sbatch refused {path.name}: {message}")
    if any(text in found.stderr.lower() for text in LOST_ANSWERS):
        job_id = find(name)
        if job_id:
            return job_id
        raise LostAnswerError(f"sbatch did not answer ({message}); run sweep.py again later")
    raise RefusedError(f"sbatch refused {path}: {message}")


def find(name: str, limit_s: float = ANSWER_LIMIT_S) -> str | None:
    """Id of a job by its unique name, looked for in queue and accounting; None if there is none."""
    deadline = time.monotonic() + limit_s
    while True:
        for command in (
            ["squeue", "--me", "--noheader", f"--name={name}", "--format=%F"],
            ["sacct", "-X", "--noheader", "--parsable2", f"--name={name}", "--format=JobID"],
        ):
            try:
                found = _run(command)
            except ClusterError:
                continue
            if found.returncode == 0 and found.stdout.strip():
                return found.stdout.split()[0].split("_")[0]
        if time.monotonic() > deadline:
            return None
        time.sleep(2)


def release(job_ids: Sequence[str]) -> None:
    """Let held jobs run; what another launcher released may have ended since, and is no error."""
    found = _run(["scontrol", "release", ",".join(job_ids)])
    said = found.stderr.splitlines() or ["it did not say why"]
    refused = [line for line in said if not GONE.search(line)]
    if found.returncode and refused:
        raise ClusterError(f"scontrol release failed: {refused[-1].strip()}")


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that are gone already are no error."""
    if job_ids:
        _run(["scancel", "--quiet", *job_ids])


def check_script(text: str) -> str | None:
    """What Slurm says against a script, without creating anything; None if nothing."""
    found = _run(["sbatch", "--test-only"], text=text)
    return None if found.returncode == 0 else _last_line(found.stderr)


def first_node_address(node_list: str) -> str:
    """NodeAddr of the first node of a list, which every node of the job can reach."""
    first = _run(["scontrol", "show", "hostnames", node_list]).stdout.split()[0]
    match = re.search(r"NodeAddr=(\S+)", _run(["scontrol", "show", "node", first]).stdout)
    return match[1] if match else first


def command_line(words: Sequence[str]) -> str:
    """Shell text of words, quoted."""
    return " ".join(shlex.quote(word) for word in words)


def _run(
    command: Sequence[str], *, limit_s: float = 60, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_")) or name == "SLURM_CONF"
    }
    environment["SLURM_BITSTR_LEN"] = "0"  # or sacct cuts long lists of elements
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            timeout=limit_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise ClusterError(
            f"{command[0]}: not found; load Slurm's module, or use cluster=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{command[0]} did not answer in {limit_s:.0f} s") from error


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"
