"""What people see in a terminal: tables that fit, and at once what Ctrl-C does."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, launch
from light import PIPELINE
from rich.console import Console

from kdhpc.cluster import runs
from kdhpc.cluster.costs import Hours, StageCost
from kdhpc.cluster.display import costs_view, status_view
from kdhpc.cluster.eta import Range
from kdhpc.cluster.runs import Run
from kdhpc.cluster.status import Cause, StageStatus, Status

LIGHT = ["pipeline=light:PIPELINE", "name=light", "cluster=local", "local_workers=1"]


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run in local processes, one of whose shards takes ten minutes."""
    (tmp_path / "trouble").mkdir()
    (tmp_path / "trouble" / "square-00001").write_text("sleep 600")
    launcher = subprocess.Popen(
        # A shell that runs the tests in the background makes them ignore interrupts.
        ["env", "--default-signal=INT", sys.executable, ROOT / "launch" / "sweep.py", *LIGHT,
         f"runs_dir={tmp_path}", f"trouble={tmp_path}/trouble"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )  # fmt: skip
    while not (tmp_path / "light/2-square/arm/00000.json").exists():
        assert launcher.poll() is None
        time.sleep(0.05)
    yield launcher
    launcher.kill()
    launcher.wait()


def test_ctrl_c_says_at_once_what_happens_and_a_second_one_does_it_now(
    process: subprocess.Popen[str], tmp_path: Path
) -> None:
    assert process.stderr is not None
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline().startswith("stopping: what runs now ends at its next shard")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "the same command goes on from what is published" in process.communicate()[1]
    assert process.returncode == 1
    command = ["pgrep", "-f", f"kdhpc.cluster.task {tmp_path}/light"]
    assert not subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert not (tmp_path / "light/2-square/arm/00001.json").exists()
    (tmp_path / "trouble" / "square-00001").unlink()
    words = [*LIGHT, f"runs_dir={tmp_path}", f"trouble={tmp_path}/trouble"]
    assert launch("sweep", *words).stdout.endswith("light: complete\n")


def test_a_complete_run_has_nothing_to_do(tmp_path: Path) -> None:
    words = [*LIGHT, f"runs_dir={tmp_path}"]
    assert "nothing to do" not in launch("sweep", *words).stdout
    requests = list((tmp_path / "light" / "requests").iterdir())
    again = launch("sweep", *words).stdout
    assert again.endswith("nothing to do: all 13 shards are done\n")
    assert list((tmp_path / "light" / "requests").iterdir()) == requests
    plan = launch("sweep", *words, "--dry-run").stdout
    assert "not in the table: 13 shards that are done" in plan
    assert "not in the table: 12" in launch("sweep", *words, "num_shards=7", "--dry-run").stdout
    (tmp_path / "light" / "3-merge" / "results.h5").unlink()
    assert "nothing to do" not in launch("sweep", *words).stdout
    assert (tmp_path / "light" / "3-merge" / "results.h5").exists()
    assert "nothing to do" not in launch("sweep", *words, "num_shards=7").stdout
    only_made = [*words, "num_shards=7", "until=make"]
    launch("sweep", *only_made)
    assert "nothing to do: all 7 shards are done" in launch("sweep", *only_made).stdout
    run = Run(tmp_path / "light", PIPELINE)
    runs.add_request(run, runs.current(run)[1], kind="cancel", executor="local")
    assert "nothing to do" not in launch("sweep", *only_made).stdout


@pytest.mark.parametrize("width", [80, 200])
def test_tables_fit_the_terminal(width: int) -> None:
    stages = [
        StageStatus(
            folder=f"{number}-sample-students", planned=10_000, done=1234, running=1000,
            queued=5000, failed=1, missing=2765,
        )
        for number in range(1, 9)
    ]  # fmt: skip
    cause = Cause(
        stage="score", kind="EXCEPTION", message="a sentence that goes on " * 9, advice="rerun",
        shards=("score/student-s0-small-tau0.8-under-truth/00000",) * 2,
        log="", last_lines=("x" * 300,),
    )  # fmt: skip
    status = Status(
        run="/a/long/path" * 12, executor="slurm", stages=tuple(stages), causes=(cause,),
        damaged={}, waiting={"Priority": 5000}, notes=(), left_s=Range(low=60, middle=90, high=9e4),
        live=("y" * 300,),
        hours=Hours(unit="GPU", done=12.0, left=Range(low=100, middle=150, high=20000)),
    )  # fmt: skip
    cost = StageCost(
        stage="sample-students", core_hours=12345.6, lost_core_hours=1234.5,
        left_core_hours=Range(low=12345, middle=1e5, high=123456), gpu_hours=12345,
        memory_gb=123.4, gpu_memory_gb=78.9, asked_gb=512,
    )  # fmt: skip
    file = io.StringIO()
    console = Console(file=file, width=width)
    console.print(status_view(status))
    console.print(costs_view([cost]))
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in file.getvalue()
    assert any("1234/10000" in line and "2765" in line for line in lines)
    assert any("12345 to 123456" in line.replace(",", "") and "512" in line for line in lines)


def test_a_run_of_a_cluster_that_does_not_answer_goes_on_here_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none"))  # no cluster of another test answers
    words = ["pipeline=light:PIPELINE", "name=light", f"runs_dir={tmp_path}"]
    launch("sweep", *words, "cluster=local", "until=make")
    run = Run(tmp_path / "light", PIPELINE)
    runs.add_request(run, runs.current(run)[1], kind="sweep", executor="slurm")
    refused = launch("sweep", *words, code=2).stderr
    assert "runs on Slurm, which does not answer here" in refused
    assert "cluster=local" in refused
    assert not (tmp_path / "light" / "2-square").exists()
    assert launch("sweep", *words, "cluster=local").stdout.endswith("light: complete\n")


def test_a_plan_says_if_its_times_are_those_of_gpus() -> None:
    local = launch("sweep", "paper", "cluster=local", "--dry-run").stdout
    assert "TIMES ARE THOSE OF GPUs (slurm.gpus_per_node), and this machine shows none" in local
    assert "TIMES" not in launch("sweep", "demo", "cluster=local", "--dry-run").stdout
