"""Inject faults at chosen points of the real code, into jobs that have this folder on their path.

KDHPC_INJECT is a JSON list of [event, pattern, action, flag]. The action is played when Python
raises the audit event (`os.link`, `open`) for a path that matches the pattern. It is played only
once, because the file `flag` must exist and is then renamed. Actions:

kill-rank-1  the other rank of the job gets SIGKILL
halve        the file loses its second half, then this process gets SIGKILL
told-to-stop every rank gets USR2 through Slurm
"""

import fnmatch
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

RULES = json.loads(os.environ.get("KDHPC_INJECT", "[]"))


def hook(event: str, args: tuple[Any, ...]) -> None:
    if event not in {"os.link", "open"} or not RULES:
        return
    path = str(args[1] if event == "os.link" else args[0])
    for wanted, pattern, action, flag in RULES:
        if event == wanted and fnmatch.fnmatch(path, pattern) and taken(flag):
            play(action, path)


def taken(flag: str) -> bool:
    try:
        os.rename(flag, f"{flag}.taken")
        return True
    except OSError:
        return False


def play(action: str, path: str) -> None:
    if action == "kill-rank-1":
        os.kill(other_rank(), signal.SIGKILL)
    if action == "halve":
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "told-to-stop":
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        subprocess.run(["scancel", "--signal=USR2", job], check=True)


def other_rank() -> int:
    job = f"SLURM_JOB_ID={os.environ['SLURM_JOB_ID']}"
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "environ").read_text(errors="replace").split("\0")
            program = (folder / "cmdline").read_text()
        except OSError:
            continue
        if job in words and "SLURM_PROCID=1" in words and "kdhpc.cluster.task" in program:
            return int(folder.name)
    raise RuntimeError("no other rank")


sys.addaudithook(hook)
