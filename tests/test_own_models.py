"""A run may start from finished models: a teacher as it is, students from weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import launch, status
from safetensors.torch import load_file

from kdhpc.storage.results import read_results
from kdhpc.storage.run_folder import RESULTS
from kdhpc.training.log import read_log


def model_of(run: Path, stage: str, arm: str) -> Path:
    """Return the folder of a model that a run has trained."""
    data: str = json.loads((run / stage / arm / "00000.json").read_text())["data"]
    return run / stage / arm / data


def weights(path: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, Any] = load_file(path / "model.safetensors")
    return loaded


@pytest.fixture(scope="module")
def teacher(tiny_run: Path) -> Path:
    return model_of(tiny_run, "3-train-on-truth", "teacher-s0")


@pytest.fixture(scope="module")
def student(tiny_run: Path) -> Path:
    return model_of(tiny_run, "3-train-on-truth", "student-s0-small-direct")


def test_a_teacher_is_taken_as_it_is_and_a_student_started_from_weights(
    teacher: Path, student: Path, tiny_run: Path, tmp_path: Path
) -> None:
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", f"teacher.model={teacher}"]
    words += ["teacher.training=null", f"students.small.model={student}"]
    words += ["students.small.training.learning_rate=1e-5"]
    launch("sweep", *words)
    run = tmp_path / "tiny"
    assert status(run, code=0)["complete"]
    taken = model_of(run, "3-train-on-truth", "teacher-s0")
    for name, value in weights(teacher).items():
        assert torch.equal(weights(taken)[name], value)
    log = "3-train-on-truth/student-s0-small-direct/00000.checkpoints"
    first, fresh = (read_log(folder / log)[0]["loss"] for folder in (run, tiny_run))
    assert first < fresh - 0.5
    models = read_results(run / "8-merge" / RESULTS).models
    assert "steps" not in models["teacher-s0"]
    assert models["student-s0-small-direct"]["steps"] > 0
    assert launch("verify", str(run)).stdout.endswith("0 damaged\n")
    config = json.loads((run / "requests" / "0001.json").read_text())["config"]
    assert len(config["teacher"]["fingerprint"]) == 64
