"""The cluster that all scenarios share, and the table of their results."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, need
from real_slurm import DEVCLUSTER, queue, running_cluster, wait_for

from faults.scenario import Row, Scenario, write_table

ROWS: list[Row] = []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    os.environ["FAULTS_DIR"] = str(tmp_path_factory.mktemp("faults"))
    with running_cluster("--min-job-age", "5", "--memory-mb", "1800") as path:
        yield path


@pytest.fixture
def scenario(request: pytest.FixtureRequest, tmp_path: Path, cluster: Path) -> Iterator[Scenario]:
    """Yield a scenario named after its test; afterwards repair the cluster and empty its queue."""
    marker = request.node.get_closest_marker("scenario")
    title = request.node.originalname.removeprefix("test_").replace("_", " ")
    played = Scenario(marker.args[0], title, tmp_path, cluster)
    yield played
    ROWS.extend(played.rows)
    if played.touched_daemons:
        revive(cluster)
    subprocess.run(["scancel", "--me"], check=False)
    wait_for(lambda: not queue(), "an empty queue")
    if played.jobs_forgotten:  # nodes remember jobs whose ids the controller assigns again
        for node in ("n1", "n2", "n3", "n4"):
            subprocess.run([DEVCLUSTER, "kill", str(cluster), node], check=True)
            subprocess.run([DEVCLUSTER, "start", str(cluster), node], check=True)
        resume_nodes()


def revive(cluster: Path) -> None:
    """Start daemons that are dead, continue those that are stopped, and resume every node."""
    for name in ("slurmdbd", "slurmctld", "n1", "n2", "n3", "n4"):
        command = [DEVCLUSTER, "kill", str(cluster), name, "--signal", "CONT"]
        if subprocess.run(command, capture_output=True).returncode:
            subprocess.run([DEVCLUSTER, "start", str(cluster), name], check=True)
    resume_nodes()


def resume_nodes() -> None:
    def states() -> list[str]:
        command = ["sinfo", "-h", "-N", "-p", "main", "-o", "%T"]
        return subprocess.run(command, capture_output=True, text=True).stdout.split()

    words = ["scontrol", "update", "nodename=n[1-4]", "state=resume"]
    subprocess.run(words, capture_output=True)
    usable = {"idle", "mixed", "allocated", "completing"}
    wait_for(lambda: len(states()) == 4 and set(states()) <= usable, "four nodes")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 3 MB at tmp_path/small, as root or by sudo where it asks for no password."""
    path = tmp_path / "small"
    path.mkdir()
    user = os.getuid()
    as_root = ["sudo", "--non-interactive"] if user and shutil.which("sudo") else []
    options = f"size=3m,mode=700,uid={user},gid={os.getgid()}"
    command = [*as_root, "mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    need(mounted.returncode == 0, f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run([*as_root, "umount", "--lazy", str(path)], check=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the table of the scenarios that were played; a process of `-n` sends its rows."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["rows"] = [asdict(row) for row in ROWS]
    elif ROWS:
        write_table(ROWS, ROOT / "build" / "faults.md")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take the rows of a process that has played its part."""
    ROWS.extend(Row(**row) for row in getattr(node, "workeroutput", {}).get("rows", []))
