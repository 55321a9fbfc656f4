"""A run may start from finished models: a teacher as it is, students from weights."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, launch
from safetensors.torch import load_file
from test_given_models import FAMILIES, save

from kdhpc.cluster.ledger import Ledger
from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.models import huggingface
from kdhpc.pipeline import LANGUAGE
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


def test_a_teacher_is_taken_as_it_is_and_students_start_from_weights_of_any_family(
    teacher: Path, student: Path, tiny_run: Path, tmp_path: Path
) -> None:
    gpt2 = save(tmp_path / "gpt2", "GPT-2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", "taus=[1.0]"]
    words += [f"teacher.model={teacher}", "teacher.training=null"]
    words += [f"students.small.model={student}", "students.small.training.learning_rate=1e-5"]
    words += [f"students.other.model={gpt2}", "students.other.training.batch_sequences=32"]
    launch("sweep", *words)
    run = tmp_path / "tiny"
    taken = model_of(run, "3-train-on-truth", "teacher-s0")
    for name, value in weights(teacher).items():
        assert torch.equal(weights(taken)[name], value)
    log = "3-train-on-truth/student-s0-{}-direct/00000.checkpoints"
    first, fresh = (read_log(folder / log.format("small"))[0]["loss"] for folder in (run, tiny_run))
    assert first < fresh - 0.5
    other = model_of(run, "5-train-students", "student-s0-other-tau1")
    assert json.loads((other / "config.json").read_text())["model_type"] == "gpt2"
    losses = [facts["loss"] for facts in read_log(run / log.format("other"))]
    assert losses[-1] < losses[0]
    results = read_results(run / "8-merge" / RESULTS)
    assert "steps" not in results.models["teacher-s0"]
    assert results.models["student-s0-other-tau1"]["steps"] > 0
    assert ("student-s0-other-tau1", "truth") in results.scores
    assert launch("verify", str(run)).stdout.endswith("0 damaged\n")


def test_where_a_model_is_kept_determines_nothing_and_what_it_is_everything() -> None:
    def recipes(*words: str) -> dict[str, str]:
        config = presets.build(LanguageConfig, presets.compose(["tiny", *words]))
        return {key: shard.recipe for key, shard in LANGUAGE.plan(config).shards.items()}

    place, print_ = "teacher.model={}", "teacher.fingerprint={}"
    one = recipes(place.format("/a"), print_.format("f"), "teacher.training=null")
    assert recipes(place.format("/b"), print_.format("f"), "teacher.training=null") == one
    other = recipes(place.format("/a"), print_.format("g"), "teacher.training=null")
    changed = {key for key in one if one[key] != other.get(key)}
    assert "train-on-truth/teacher-s0/00000" in changed
    assert "train-on-truth/student-s0-small-direct/00000" not in changed
    assert recipes(place.format("/a"), print_.format("f")) != one


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_without_dropout(family: str, tmp_path: Path) -> None:
    model = huggingface.model_to_train(save(tmp_path / "model", family)).train()
    one, two = (model(torch.arange(9)[None]).logits for _ in range(2))
    assert torch.equal(one, two)


def test_a_teacher_with_another_tokenizer_is_refused(
    tiny_run: Path, teacher: Path, tmp_path: Path
) -> None:
    truth = model_of(tiny_run, "1-truth", "truth")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", f"teacher.model={other}"]
    words += ["teacher.training=null"]
    given_truth = [f"truth.model={truth}", "truth.tokenizer=model"]
    at_once = launch("sweep", *words, *given_truth, code=2).stderr
    assert "its tokenizer is not the truth's; expected one with the same ids" in at_once
    assert not (tmp_path / "tiny").exists()
    later = launch("sweep", *words, "until=train-on-truth", code=1).stdout
    assert "its tokenizer is not the truth's" in " ".join(later.split())
    [failure] = Ledger(tmp_path / "tiny").failures()
    assert (failure.key, failure.kind) == ("train-on-truth/teacher-s0/00000", "REFUSED")


def test_two_folders_become_a_curve_with_the_commands_of_the_page(
    tiny_run: Path, tmp_path: Path
) -> None:
    """At the size of `tiny`; both folders come from a run that trained them."""
    large = model_of(tiny_run, "1-truth", "truth")
    small = model_of(tiny_run, "3-train-on-truth", "student-s0-small-direct")
    page = (ROOT / "docs" / "models.md").read_text().partition("## Distil your own models")[2]
    block = page.partition("```\n")[2].partition("```")[0].replace("\\\n", " ")
    commands = [line.split() for line in block.splitlines()]
    assert len(commands) == 4
    toy = {"demo": "tiny", "LARGE": str(large), "SMALL": str(small)}
    for python, script, *words in commands:
        words = [re.sub("demo|LARGE|SMALL", lambda found: toy[found[0]], word) for word in words]
        if script == "launch/sweep.py":
            words += ["cluster=local", f"runs_dir={tmp_path}"]
        done = subprocess.run(
            [python.replace("python", sys.executable), str(ROOT / script), *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "tau 0.6" in done.stdout
    assert list((tmp_path / "mine").rglob("*.png"))


def test_the_vocabulary_of_a_given_truth_decides_estimates(tmp_path: Path) -> None:
    words = ["tiny", "truth.tokenizer=model", f"truth.model={save(tmp_path / 'm', 'Llama')}"]
    config = presets.build(LanguageConfig, presets.compose(words))
    assert LANGUAGE.prepare(config).truth.num_ids == 257

    def row_bytes(*more: str) -> float:
        config = presets.build(LanguageConfig, presets.compose([*words, *more]))
        shard = LANGUAGE.plan(config).stage("sample-truth")[0]
        return shard.num_bytes / shard.num_rows

    assert row_bytes("truth.num_ids=70000") - row_bytes() == 2 * config.length
    assert row_bytes("truth.num_ids=70000", "truth.vocabulary=100") == row_bytes()
