"""Run the launch scripts as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from light import expected

from kdhpc.storage.results import read_results

LIGHT_RESULTS = "3-merge/results.h5"
ROOT = Path(__file__).parents[1]


def launch(
    script: str, *words: str, code: int | None = 0, project: str = str(ROOT), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `launch/<script>.py`; fails unless it ends with `code` (None: any)."""
    found = subprocess.run(
        [sys.executable, f"{project}/launch/{script}.py", *words],
        capture_output=True,
        text=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{project}:{ROOT}/tests", "OMP_NUM_THREADS": "1"}
        | environment,
    )
    assert code is None or found.returncode == code, f"{found.stdout}\n{found.stderr}"
    return found


def need(there: bool, reason: str) -> None:
    """Skip a test on a machine that lacks something; CI must have it."""
    if there:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def status(run: Path, code: int | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(launch("status", str(run), "--json", code=code).stdout)
    return found


def light_result(run: Path) -> list[int]:
    table = read_results(run / LIGHT_RESULTS).tables["all"]["value"]
    found: list[int] = table[:, 0].tolist()
    return found


def assert_light_complete(run: Path, num_shards: int) -> None:
    """Everything is done, once, and right."""
    assert light_result(run) == expected(num_shards)
    for stage in ("1-make", "2-square"):
        assert len(list((run / stage / "arm").glob("*[0-9].json"))) == num_shards
        assert (
            len(list((run / stage / "arm").glob("*.txt"))) >= num_shards
        )  # killed ones leave some
