"""Talk to Slurm: submit held arrays, read queue and accounting, find jobs whose answer was lost.

Nothing here decides. Every call of a Slurm program goes through `_run`, which sets a time limit and
removes the variables of a surrounding job, such as a gate, because sbatch would pass them on.
"""

import contextlib
import functools
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdhpc.errors import ClusterError

_ANSWER_LIMIT_S = 60.0
"""How long a submission whose answer was lost is looked for before it counts as never made."""
_LOST_ANSWERS = ("socket timed out", "unable to contact", "connection refused", "communication")
_LIMIT_REASON = re.compile(r"\b(?:QOS|Assoc|Max)\w*(?:Limit|PerUser|PerAccount)\w*", re.IGNORECASE)
"""Name of the limit that a request exceeds, which sbatch prints before its last line."""
_POLICY_VIOLATED = "job violates accounting/qos policy"
"""What sbatch says of every limit, of a full queue and of a request that can never run."""
_CONTROLLER_FULL = ("resource temporarily unavailable", "temporarily unable to accept")
"""What sbatch says while the whole cluster has as many jobs as it may."""
_QUEUE_FORMAT = "%A|%F|%K|%T|%r|%j"
"""Fields of squeue: job id, id of the array, index, state, reason, name."""
_ENDED_FORMAT = "ArrayJobID:20,ArrayTaskID:20,State:20,exit_code:20,Name:200,NodeList:1000"
"""Fields of tasks that have ended, in columns of fixed widths; only this form has exit codes."""
_ENDED = {
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "NODE_FAIL", "BOOT_FAIL",
    "OUT_OF_MEMORY", "PREEMPTED",
}  # fmt: skip
"""States without a process; a COMPLETING job still has one, or is about to be requeued."""
HELD_BY_USER = "JobHeldUser"
"""Reason of a job that was submitted held and not released yet, or that somebody has held since."""
HELD_BY_SLURM = {
    "launch failed requeued held",
    "launch_failed_requeued_held",
    "user env retrieval failed requeued held",  # since Slurm 25.05
}
"""Reasons of jobs that Slurm could not start, for example after a restart of the controller."""
NEVER_STARTS = re.compile(
    r"PartitionConfig|Partition(Time|Node)Limit|BadConstraints|Invalid(Account|QOS)"
    r"|DependencyNeverSatisfied|(QOS|Assoc)Max\w*PerJob(Limit)?|(QOS|Assoc)MaxWall\w*"
    r"|launch failure limit exceeded"  # since Slurm 23.11, after five failed starts in a row
)
"""Reasons of jobs that wait for what no other job's end can bring."""
_GONE = re.compile(r"already finished|invalid job id|no error", re.IGNORECASE)
"""Messages of Slurm about a job that has ended, about one that it has forgotten, and about an array
element that was released although scontrol 22.05 counts it as failed."""
_NOT_YET_KNOWN = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED", "RESIZING")
"""First words of states that do not tell how a task ended: it has not, or it is tried again."""


class RefusedError(ClusterError):
    """Slurm refuses this script, now and later."""


class OverLimitError(ClusterError):
    """The array would exceed the number of jobs that this user may have in the queue."""


class LostAnswerError(ClusterError):
    """sbatch failed, and it is unknown whether it made a job."""


@dataclass(frozen=True, kw_only=True)
class Queued:
    """One task or single job in the queue."""

    job_id: str
    """Job id of the whole array."""
    index: int | None
    """Array index; None if the job is not an array element."""
    state: str
    reason: str
    name: str

    @property
    def is_task(self) -> bool:
        """Whether it is an array element."""
        return self.index is not None


def available() -> bool:
    """Return whether `sbatch` is installed and a controller answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return _run(["scontrol", "ping"], limit_s=10).returncode == 0
    except ClusterError:
        return False


def queue() -> list[Queued]:
    """List this user's jobs, one entry for each array element, with a single squeue.

    Raises:
        ClusterError: if the controller does not answer.
    """
    answer = _run(["squeue", "--me", "--all", "--noheader", "--array", f"--format={_QUEUE_FORMAT}"])
    if answer.returncode:
        raise ClusterError(f"squeue failed: {_all_lines(answer.stderr)}; try again later")
    tasks = []
    for line in answer.stdout.split("\n"):
        # A site may print news, and names of other jobs may hold line breaks: neither is a task.
        fields = line.strip().split("|", 5)
        if len(fields) < 6 or not fields[0].isdigit() or not fields[1].isdigit():
            continue
        job_id, array_id, index, state, reason, name = fields
        if state in _ENDED:
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
    """How the last try of a task ended."""

    state: str
    exit_code: str
    node: str


def remembered(names: Collection[str]) -> dict[tuple[str, int], Ended]:
    """Ask the controller how the tasks of arrays ended, with a single squeue.

    It knows at once, but forgets after minutes (`MinJobAge`). Accounting keeps what it hears, and
    on a busy cluster hears of it late.

    Args:
        names: names of arrays.

    Returns:
        The end of each task that has ended and is not forgotten, by job id and array index; empty
        if the controller does not answer.
    """
    if not names:
        return {}
    command = ["squeue", "--me", "--all", "--noheader", "--array", "--states=all"]
    try:
        answer = _run([*command, f"--Format={_ENDED_FORMAT}"])
    except ClusterError:
        return {}
    ended = {}
    for line in answer.stdout.split("\n"):
        # Names of other jobs may hold blanks and line breaks; those of kdhpc's arrays do not.
        job_id, index, state, status, name, node = [*line.split(), *[""] * 6][:6]
        if job_id.isdigit() and index.isdigit() and name in names and state in _ENDED:
            ended[job_id, int(index)] = Ended(state=state, exit_code=_exit_code(status), node=node)
    return ended


def _exit_code(status: str) -> str:
    """Convert a status as wait() gives it, `768`, to the form of sacct, `3:0`."""
    if not status.isdigit():
        return status
    return f"{int(status) >> 8}:{int(status) & 127}"


def accounting(job_ids: Sequence[str]) -> dict[tuple[str, int], Ended]:
    """Ask accounting how the tasks of arrays ended.

    Args:
        job_ids: job ids of arrays.

    Returns:
        The end of each task that has ended, by job id and array index; empty without accounting.
    """
    if not job_ids:
        return {}
    try:
        answer = _run(
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
    for line in answer.stdout.splitlines():
        fields = line.split("|")
        match = re.fullmatch(r"(\d+)_\[?([\d,-]+)(?:%\d+)?\]?", fields[0])
        if match is None or len(fields) != 4 or fields[1].startswith(_NOT_YET_KNOWN):
            continue
        for part in match[2].split(","):  # one line lists all elements that never started
            first, _, last = part.partition("-")
            for index in range(int(first), int(last or first) + 1):
                # If a task has several lines, the last one is its last try.
                ended[match[1], index] = Ended(state=fields[1], exit_code=fields[2], node=fields[3])
    return ended


def memory_used(job_ids: Sequence[str]) -> dict[str, float]:
    """Ask accounting for the most memory that a process of each job used.

    Args:
        job_ids: job ids of arrays.

    Returns:
        Memory in GB by job id; empty without accounting, and without a job that it has sampled.
    """
    if not job_ids:
        return {}
    words = ["sacct", "--noheader", "--parsable2", "--units=K", "--format=JobID,MaxRSS"]
    try:
        answer = _run([*words, f"--jobs={','.join(job_ids)}"])
    except ClusterError:
        return {}
    used: dict[str, float] = {}
    for line in answer.stdout.splitlines():
        if match := re.fullmatch(r"(\d+)[_.][^|]*\|([\d.]+)K", line):
            used[match[1]] = max(used.get(match[1], 0.0), float(match[2]) * 1024 / 1e9)
    return used


@functools.cache
def max_array_size() -> int:
    """Return the cluster's MaxArraySize, which is the largest array index plus one."""
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", _run(["scontrol", "show", "config"]).stdout)
    return int(match[1]) if match else 1001


def boot_time() -> float:
    """Return when the controller started, as a Unix time; 0 if it does not say."""
    match = re.search(r"BOOT_TIME\s*=\s*(\S+)", _run(["scontrol", "show", "config"]).stdout)
    with contextlib.suppress(ValueError):
        return time.mktime(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S")) if match else 0.0
    return 0.0


@functools.cache
def partitions() -> dict[str, float]:
    """Return the time limit in minutes of every partition, of the default one also under ''."""
    limits = {}
    command = ["scontrol", "--all", "--oneliner", "show", "partition"]  # hidden ones too
    for line in _run(command).stdout.splitlines():
        name = re.search(r"PartitionName=(\S+)", line)
        limit = re.search(r"MaxTime=(\S+)", line)
        if name:
            limits[name[1]] = _minutes(limit[1]) if limit else float("inf")
            if " Default=YES" in line:
                limits[""] = limits[name[1]]
    return limits


def time_limit_min(partition: str | None) -> float:
    """Return the time limit in minutes of a partition, of several (`a,b`), or of the default."""
    limits = partitions()
    return max(limits.get(name, float("inf")) for name in (partition or "").split(","))


def _minutes(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60


def submit_held(path: Path, name: str, log: Path) -> str:
    """Submit a script held. Returns the job id.

    Args:
        path: path of the script.
        name: name of the job, by which it is found if the answer is lost.
        log: path of each task's log; `%a` in its file name is replaced by the array index.

    Raises:
        OverLimitError: if the user's limits do not allow so many tasks.
        RefusedError: if Slurm refuses the script; the message quotes it.
        LostAnswerError: if it is unknown whether a job was made.
    """
    output = f"{str(log.parent).replace('%', '%%')}/{log.name}"
    answer = _run(["sbatch", "--parsable", "--hold", f"--output={output}", str(path)], limit_s=120)
    if answer.returncode == 0 and (job_ids := _JOB_ID_LINE.findall(answer.stdout)):
        return str(job_ids[-1])
    message = _all_lines(answer.stderr)
    if is_over_limit(answer.stderr):
        raise OverLimitError(f"sbatch refused {path.name}: {message}")
    if answer.returncode == 0 or any(text in answer.stderr.lower() for text in _LOST_ANSWERS):
        job_id = find(name)
        if job_id:
            return job_id
        raise LostAnswerError(f"sbatch did not answer ({message}); run sweep.py again later")
    raise RefusedError(f"sbatch refused {path}: {message}")


_JOB_ID_LINE = re.compile(r"^(\d+)(?:;\S*)?\s*$", re.MULTILINE)
"""The line of `sbatch --parsable` that holds the job id; a site may print others."""


def is_over_limit(message: str) -> bool:
    """Return whether sbatch refused a request only because the user has too many jobs queued.

    Such a request is accepted later. A request for more time or more nodes than a limit allows, of
    which sbatch's last line says the same, never is.
    """
    if reason := _LIMIT_REASON.search(message):
        return "submit" in reason[0].lower()
    return any(text in message.lower() for text in (_POLICY_VIOLATED, *_CONTROLLER_FULL))


_FOUND_ID = re.compile(r"^(\d+)(?:_\S+)?\s*$", re.MULTILINE)
"""A line that holds a job id and nothing else."""


def find(name: str, limit_s: float = _ANSWER_LIMIT_S) -> str | None:
    """Find the id of a job by its unique name in queue and accounting; None after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while True:
        for command in (
            ["squeue", "--me", "--all", "--noheader", f"--name={name}", "--format=%F"],
            ["sacct", "-X", "--noheader", "--parsable2", f"--name={name}", "--format=JobID"],
        ):
            try:
                answer = _run(command)
            except ClusterError:
                continue
            if answer.returncode == 0 and (ids := _FOUND_ID.findall(answer.stdout)):
                return str(ids[0])
        if time.monotonic() > deadline:
            return None
        time.sleep(2)


def release(job_ids: Sequence[str]) -> None:
    """Let held jobs run. Jobs that another launcher released and that have ended are no error."""
    answer = _run(["scontrol", "release", ",".join(job_ids)])
    complaints = answer.stderr.splitlines() or ["it did not say why"]
    refused = [line for line in complaints if not _GONE.search(line)]
    if answer.returncode and refused:
        raise ClusterError(f"scontrol release failed: {refused[-1].strip()}; run sweep.py again")


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs. Jobs that have ended are no error."""
    if job_ids:
        _run(["scancel", "--quiet", *job_ids])


def check_script(text: str) -> str | None:
    """Ask Slurm whether it could start the jobs of a script; no job is made.

    For a job that is submitted held, sbatch itself checks less. That no node fits may be because
    nodes are down or drained, so it is an objection only while all nodes are in use.

    Returns:
        Slurm's objection; empty if it has none, and None if it did not say, because its controller
        does not answer, the queue is full, or nodes are missing.
    """
    try:
        answer = _run(["sbatch", "--test-only"], text=text)
    except ClusterError:
        return None
    if answer.returncode == 0:
        return ""
    lost = any(text in answer.stderr.lower() for text in _LOST_ANSWERS)
    if lost or is_over_limit(answer.stderr):
        return None
    if "not available" in answer.stderr and _nodes_are_missing():
        return None
    return _all_lines(answer.stderr)


def _nodes_are_missing() -> bool:
    """Return whether Slurm starts no jobs on any of its nodes, or does not say."""
    try:
        answer = _run(["sinfo", "--all", "--noheader", "--format=%T"])
    except ClusterError:
        return True
    states = answer.stdout.lower().split()
    return not states or any(
        not state.startswith(_STATES_IN_USE) or state.endswith("*") for state in states
    )


_STATES_IN_USE = ("idle", "mix", "alloc", "comp", "plan", "resv", "reserved")
"""First letters of the states of nodes in use; a `*` at the end says that the node is silent."""


def ignored_variables() -> list[str]:
    """Return the names of the environment variables that sbatch would read and kdhpc removes."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


def command_line(words: Sequence[str]) -> str:
    """Quote words and join them to shell text."""
    return " ".join(shlex.quote(word) for word in words)


_OF_A_JOB = {
    "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
    "TMPDIR", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KDHPC_SCRATCH",
    "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "SUBMITIT_EXECUTOR",
}  # fmt: skip
"""Variables that Slurm, a batch script or slurm/environment.sh set for one job."""


def _run(
    command: Sequence[str], *, limit_s: float = 60, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    of_this_job = _OF_A_JOB if "SLURM_JOB_ID" in os.environ else set()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF"
        or not (name.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SACCT_")) or name in of_this_job)
    }
    environment["SLURM_BITSTR_LEN"] = "0"  # otherwise sacct cuts long lists of array elements
    try:
        return subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # names of other jobs may be any bytes
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
        raise ClusterError(
            f"{command[0]} did not answer in {limit_s:.0f} s; try again later"
        ) from error


def _all_lines(text: str) -> str:
    """Join everything that a program said to one line; the first lines often hold the cause."""
    lines = [_PROGRAM.sub("", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(lines) or "no message"


_PROGRAM = re.compile(r"^\w+: (?:error: )?")
"""Name of the program at the start of its messages."""
