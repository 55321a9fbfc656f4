"""A real Slurm for tests, started and stopped here (`slurm/devcluster`), and runs on it."""

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
PATIENCE_S = 600
"""What never comes must not hang the tests for ever; far more than anything takes."""


def need_slurm() -> None:
    found = shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin")
    need(found is not None, "Slurm is not installed: sudo slurm/devcluster install")


@contextlib.contextmanager
def running_cluster(*options: str) -> Iterator[Path]:
    """Four nodes of one CPU; `sbatch` and its like find them by SLURM_CONF."""
    need_slurm()
    # Socket paths are short: not below pytest's own folder.
    path = Path(f"/tmp/kdhpc-test-{os.getpid()}")  # noqa: S108
    subprocess.run([DEVCLUSTER, "up", str(path), "--max-array", "11", *options], check=True)
    os.environ["SLURM_CONF"] = str(path / "slurm.conf")
    try:
        yield path
    finally:
        subprocess.run([DEVCLUSTER, "down", str(path)], check=True)
        del os.environ["SLURM_CONF"]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.5)


def queue(form: str = "%j") -> list[str]:
    """A line for every job of ours, arrays as one; the controller may be down for a while."""
    command = ["squeue", "--me", "--noheader", f"--format={form}"]
    for _ in range(20):
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode == 0:
            return [line.strip() for line in found.stdout.splitlines()]
        time.sleep(1)
    raise AssertionError(found.stderr)


def wait_for_end(*runs: Path) -> None:
    """Wait until nothing is queued; a job that can never start is an end too."""
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
    """Submit the light pipeline; it takes little memory, so that many tasks fit at once."""
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
    """What became of every submission, by number."""
    return [json.loads(p.read_text()) for p in sorted((run / "submissions").glob("*.job.json"))]


def log_of(run: Path, number: int, task: int) -> str:
    path = run / "logs" / f"{number:04d}" / f"{task}.log"
    return path.read_text() if path.exists() else ""


def assert_submitted_once(run: Path) -> None:
    """No shard stands in two jobs; a submission that was given up in time has none."""
    submitted = [
        key
        for path in (run / "submissions").glob("*[0-9].json")
        if json.loads(path.with_suffix(".job.json").read_text())["job_id"]
        for task in json.loads(path.read_text())["tasks"]
        for key in task
    ]
    assert len(submitted) == len(set(submitted))
