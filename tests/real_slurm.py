"""Start and stop a real Slurm for tests (`slurm/devcluster`), and run pipelines on it."""

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from commands import ROOT, launch, need

DEVCLUSTER = str(ROOT / "slurm" / "devcluster")
SMALL = ["slurm.mem_gb=0.3", "slurm.gate.mem_gb=0.2"]
PATIENCE_S = float(os.environ.get("KDHPC_PATIENCE_S", "600"))
"""Seconds after which a test gives up waiting; far more than anything takes."""


def need_slurm() -> None:
    program = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
    need(program is not None, "Slurm is not installed: sudo slurm/devcluster install")


@contextlib.contextmanager
def running_cluster(*options: str) -> Iterator[Path]:
    """Start four nodes of one CPU each; Slurm's programs find them by SLURM_CONF.

    A cluster inside another hides it for a while.
    """
    need_slurm()
    before = os.environ.get("SLURM_CONF")
    # Socket paths must be short, so the folder is not inside pytest's own.
    path = Path(f"/tmp/kdhpc-test-{os.getpid()}{'-inner' if before else ''}")  # noqa: S108
    subprocess.run([DEVCLUSTER, "up", str(path), "--max-array", "11", *options], check=True)
    os.environ["SLURM_CONF"] = str(path / "slurm.conf")
    try:
        yield path
    finally:
        subprocess.run([DEVCLUSTER, "down", str(path)], check=True)
        del os.environ["SLURM_CONF"]
        if before:
            os.environ["SLURM_CONF"] = before


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.5)


def queue(form: str = "%j") -> list[str]:
    """Return a line for each of our jobs, one for a whole array.

    The controller may be down for a while, so squeue is called up to 20 times.
    """
    command = ["squeue", "--me", "--noheader", f"--format={form}"]
    for _ in range(20):
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode == 0:
            return [line.strip() for line in answer.stdout.splitlines()]
        time.sleep(1)
    raise AssertionError(answer.stderr)


def wait_for_end(*runs: Path) -> None:
    """Wait until nothing is queued; fail if a job is left that can never start."""
    try:
        wait_for(lambda: set(queue("%r")) <= {"DependencyNeverSatisfied"}, "the end")
        assert not queue(), "a job waits for what never comes"
    except AssertionError:
        subprocess.run(["squeue"], check=False)
        for run in runs:
            print(launch("status", str(run), code=None).stdout)
        raise


def sweep_light(
    tmp_path: Path,
    *words: str,
    code: int | None = 0,
    project: str = str(ROOT),
    **environment: str,
) -> Path:
    """Submit the light pipeline with so little memory that many tasks fit at once."""
    where = [f"runs_dir={tmp_path}", f"trouble={tmp_path}/trouble", f"trace={tmp_path}/trace"]
    launch(
        "sweep", "pipeline=light:PIPELINE", "cluster=slurm", "name=light", *SMALL, *where, *words,
        code=code, project=project, **environment,
    )  # fmt: skip
    return tmp_path / "light"


def trouble(tmp_path: Path, shard: str, what: str) -> Path:
    (tmp_path / "trouble").mkdir(exist_ok=True)
    path = tmp_path / "trouble" / shard
    path.write_text(what)
    return path


def jobs_of(run: Path) -> list[dict[str, str]]:
    """Return what became of every submission, in the order of their numbers."""
    return [json.loads(p.read_text()) for p in sorted((run / "submissions").glob("*.job.json"))]


def log_of(run: Path, number: int, task: int) -> str:
    path = run / "logs" / f"{number:04d}" / f"{task}.log"
    return path.read_text() if path.exists() else ""


def assert_submitted_once(run: Path) -> None:
    """Check that no shard is in two jobs; a submission that was given up in time has no job."""
    submitted = [
        key
        for path in (run / "submissions").glob("*[0-9].json")
        if json.loads(path.with_suffix(".job.json").read_text())["job_id"]
        for task in json.loads(path.read_text())["tasks"]
        for key in task
    ]
    assert len(submitted) == len(set(submitted))
