"""Estimates of time from speeds that gpu_check has measured."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import launch

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.config.model import Shape
from kdhpc.errors import InputError
from kdhpc.experiment import arms
from kdhpc.experiment.estimates import SHARD_S, estimates, model_flops, seconds
from kdhpc.experiment.inputs import _with_speeds
from kdhpc.models.sizes import forward_flops, sizes_of_shape, training_flops

LARGE = sizes_of_shape(Shape(layers=32, hidden=960, heads=15, kv_heads=5, ffn=2560))


def report(**changes: Any) -> dict[str, Any]:
    """Return what gpu_check writes, with the speeds of a model of 360 million parameters."""
    flops = forward_flops(LARGE, 49152, 512)
    row = {"model": "360M", "limit": 1e9, "flops_per_token": flops, "share": 0.1}
    rows = [
        row | {"what": "sampling", "tokens_per_s": 7e4},
        row | {"what": "scoring", "tokens_per_s": 2e5},
        row | {"what": "training", "tokens_per_s": 9e4, "flops_per_token": 3 * flops},
        row | {"what": "transformers' generate", "tokens_per_s": 1e3, "limit": None},
    ]
    return {"about": {"device": "cuda"}, "checks": [], "speeds": rows} | changes


def paper_with(path: Path, content: str) -> LanguageConfig:
    path.write_text(content)
    words = ["paper", f"throughput_from={path}"]
    return _with_speeds(presets.build(LanguageConfig, presets.compose(words)))


def test_speeds_of_the_nearest_model_are_scaled_by_operations(tmp_path: Path) -> None:
    """They replace those of the preset, and nothing is said of what is far from all of them."""
    config = paper_with(tmp_path / "gpu_check.json", json.dumps(report()))
    assert set(config.speeds) == {"360M sampling", "360M scoring", "360M training"}
    flops = forward_flops(LARGE, 49152, 512)

    def per_s(stage: str, flops: float) -> float:
        return 1e9 / (seconds(config, stage, 1e9, flops) - SHARD_S)

    assert per_s(arms.SAMPLE_TEACHER, flops) == pytest.approx(7e4)
    assert per_s(arms.SAMPLE_TRUTH, 4 * flops) == pytest.approx(7e4 / 4)
    assert per_s(arms.SCORE, flops / 2) == pytest.approx(2 * 2e5)
    training = training_flops(LARGE, 49152, 512)
    assert per_s(arms.TRAIN_STUDENTS, training) == pytest.approx(9e4)
    preset = dataclasses.replace(config, speeds={})
    for far in (flops / 11, 11 * flops):
        times = [seconds(c, arms.SAMPLE_TEACHER, 1e9, far) for c in (config, preset)]
        assert times[0] == times[1] == 1e9 / config.throughput[arms.SAMPLE_TEACHER]
    assert all(flops / 10 < each < 10 * flops for each in model_flops(config).values())
    assert str(tmp_path) in next(estimates(config))


@pytest.mark.parametrize(
    ("content", "says"),
    {
        "no JSON": ("speed 9", "not a file of speeds"),
        "a list": ("[]", "not a file of speeds"),
        "another file": ('{"model": 1}', "not a file of speeds"),
        "a row without operations": (
            json.dumps(report(speeds=[{"model": "360M", "what": "sampling", "limit": 1.0}])),
            "flops_per_token",
        ),
        "another device": (
            json.dumps(report(about={"device": "cpu"})),
            "cpu, and tasks run on cuda",
        ),
        "no speeds": (json.dumps(report(speeds=[])), "every measurement has failed"),
    }.values(),
)
def test_a_file_that_has_no_speeds_is_refused_in_one_line(
    tmp_path: Path, content: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as refused:
        paper_with(tmp_path / "speeds.json", content)
    assert str(refused.value).startswith(f"throughput_from={tmp_path}/speeds.json: ")
    assert "python -m kdhpc.gpu_check" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("changes", [
    {"tokens_per_s": 0.0}, {"tokens_per_s": float("nan")}, {"flops_per_token": -1.0},
    {"flops_per_token": float("inf")}, {"what": "decoding"},
])  # fmt: skip
def test_speeds_that_cannot_be_are_refused_in_one_line(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    rows = report()["speeds"]
    with pytest.raises(InputError, match=r"tokens/s of .* operations; expected") as refused:
        paper_with(tmp_path / "speeds.json", json.dumps(report(speeds=[rows[0] | changes])))
    assert "\n" not in str(refused.value)


def test_a_dry_run_plans_with_the_speeds_of_the_file(tmp_path: Path) -> None:
    """The paper's truth cannot be read here, so that tiny takes its place."""
    path = tmp_path / "gpu_check.json"
    words = ["tiny", f"throughput_from={path}", "--dry-run"]
    refused = launch("sweep", *words, code=2)
    assert f"throughput_from={path}: not readable" in refused.stderr
    slow = {"what": "sampling", "model": "toy", "tokens_per_s": 0.1, "limit": 1.0}
    slow["flops_per_token"] = 3e5
    path.write_text(json.dumps(report(about={"device": "cpu"}, speeds=[slow])))
    said = launch("sweep", *words).stdout
    assert f"times come from {path}" in said
    hours = [float(n) for n in re.findall(r"([\d.]+) h\b", said)]
    assert max(hours) > 10, said


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    words = ["paper", f"throughput_from={tmp_path}/none.json"]
    config = presets.build(LanguageConfig, presets.compose(words))
    with pytest.raises(InputError, match=r"none\.json: not readable \(No such file"):
        _with_speeds(config)
