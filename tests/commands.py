"""Run the launch scripts as a user does."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from light import expected

from kdhpc.cluster.ledger import Ledger, Submission
from kdhpc.cluster.runs import Run
from kdhpc.storage.results import read_results

LIGHT_RESULTS = "3-merge/results.h5"
ROOT = Path(__file__).parents[1]


def launch(
    script: str, *words: str, code: int | None = 0, project: str = str(ROOT), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `launch/<script>.py`; fail unless its exit code is `code` (None: any)."""
    finished = subprocess.run(
        [sys.executable, f"{project}/launch/{script}.py", *words],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{project}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
        | environment,
    )
    assert code is None or finished.returncode == code, f"{finished.stdout}\n{finished.stderr}"
    return finished


def begin(run: Run, number: int, keys: list[str]) -> subprocess.Popen[bytes]:
    """Start a task of light shards in the name of this process, a launcher that is alive."""
    ledger = Ledger(run.path)
    submission = Submission(
        number=number, request=1, name=f"make.light-{number}", stage="make", tasks=(tuple(keys),),
        resources={}, code="", time=time.time(), host=socket.gethostname(), pid=os.getpid(),
    )  # fmt: skip
    assert ledger.claim(submission)
    log = ledger.log_path(number, 0)
    log.parent.mkdir()
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "kdhpc.cluster.task", str(run.path), str(number)],
            stdout=file,
            stderr=file,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
                "SLURM_ARRAY_TASK_ID": "0",
            },
        )


def need(there: bool, reason: str) -> None:
    """Skip a test on a machine that lacks what the test needs; in CI, fail instead."""
    if there:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def status(run: Path, code: int | None = None) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(launch("status", str(run), "--json", code=code).stdout)
    return report


def light_result(run: Path) -> list[int]:
    table = read_results(run / LIGHT_RESULTS).tables["all"]["value"]
    values: list[int] = table[:, 0].tolist()
    return values


def assert_light_complete(run: Path, num_shards: int) -> None:
    """Check that every shard is done exactly once, with the right result."""
    assert light_result(run) == expected(num_shards)
    for stage in ("1-make", "2-square"):
        assert len(list((run / stage / "arm").glob("*[0-9].json"))) == num_shards
        # Killed attempts leave files behind.
        assert len(list((run / stage / "arm").glob("*.txt"))) >= num_shards
