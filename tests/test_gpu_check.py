"""The check of a GPU runs on a CPU with toy models; on a GPU nothing of it has been run yet."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdhpc import gpu_check
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.experiment.inputs import _with_speeds
from kdhpc.gpu_check import CHECKS, Speed, limit, paper_cases, require, toy_cases

CPU = torch.device("cpu")


def test_every_check_passes_on_a_cpu_and_the_report_has_what_was_found(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "kdhpc.gpu_check", "--device", "cpu", "--out", str(out)]
    command += ["--vllm", sys.executable]  # has no vLLM
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=env)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(CHECKS)} checks, 0 failed" in finished.stdout
    assert "toy vLLM: not measured: CheckError: " in finished.stdout
    assert "No module named 'vllm'" in finished.stdout
    report = json.loads(out.read_text())
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    speeds = {speed["what"]: speed for speed in report["speeds"]}
    assert set(speeds) == {"sampling", "scoring", "training", "transformers' generate"}
    assert all(speed["tokens_per_s"] > 0 for speed in speeds.values())
    assert 0 < speeds["scoring"]["share"] < 1.5
    assert speeds["transformers' generate"]["share"] is None
    words = ["tiny", f"throughput_from={out}"]
    config = _with_speeds(presets.build(LanguageConfig, presets.compose(words)))
    assert set(config.speeds) == {"toy sampling", "toy scoring", "toy training"}


def test_a_check_that_fails_is_a_line_and_names_what_is_done_instead() -> None:
    def fails(device: torch.device) -> str:
        require(device.type == "meta", "it is\na CPU")
        return "well"

    check = gpu_check._checked("name", fails, "nothing", CPU)
    assert (check.passed, check.found) == (False, "CheckError: it is a CPU")
    assert check.otherwise == "nothing"
    assert gpu_check._checked("name", fails, "nothing", torch.device("meta")).passed


@pytest.mark.parametrize("case", [*paper_cases(), *toy_cases()], ids=lambda case: case.name)
def test_limits_are_below_those_of_products_alone(case: gpu_check.Case) -> None:
    """With an endless bandwidth sampling is limited by its products, else it is slower."""
    about = {"tflop_per_s_bfloat16": 989.0, "tflop_per_s_float32": 60.0, "gb_per_s": 3350.0}
    sampling = limit(case, "sampling", about)
    assert sampling < limit(case, "sampling", about | {"gb_per_s": 1e12})
    assert limit(case, "training", about) * 3 == pytest.approx(limit(case, "scoring", about))
    speed = Speed(
        model="x", what="sampling", tokens_per_s=sampling / 2, limit=sampling, flops_per_token=1.0
    )  # fmt: skip
    assert speed.share == 0.5
