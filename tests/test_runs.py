"""Requests of a run, and what of them reaches the next submission."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from commands import launch
from light import PIPELINE, LightConfig

from kdhpc.cluster import runs
from kdhpc.cluster.advance import advance
from kdhpc.cluster.observe import observe
from kdhpc.cluster.runs import Run


@pytest.fixture
def config(tmp_path: Path) -> LightConfig:
    return LightConfig(pipeline="light:PIPELINE", name="light", runs_dir=str(tmp_path))


@pytest.fixture
def run(config: LightConfig) -> Run:
    return runs.open_for(config, PIPELINE.plan(config))


def resources_of(run: Run, key: str) -> Any:
    _, config, plan = runs.current(run)
    return observe(run, config, plan, with_queue=False).situation.overrides.get(key, {})


def test_resources_of_reruns_add_up_and_end_with_a_sweep(run: Run, config: LightConfig) -> None:
    key = "make/arm/00000"
    runs.add_request(run, config, kind="sweep", executor="slurm")
    for resources in ({"mem_gb": 8.0}, {"time_min": 30}, {"mem_gb": 16.0}):
        runs.add_request(run, config, kind="rerun", executor="slurm", resources=resources)
    assert resources_of(run, key) == {"mem_gb": 16.0, "time_min": 30}
    changed = dataclasses.replace(config, slurm=dataclasses.replace(config.slurm, time_min=600))
    runs.add_request(run, changed, kind="sweep", executor="slurm")
    assert resources_of(run, key) == {}


def test_a_gate_that_is_left_from_slurm_leaves_a_local_request_alone(
    run: Run, config: LightConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # whatever asks Slurm fails
    runs.add_request(run, config, kind="sweep", executor="local")
    state = advance(run)
    assert state.decision.batches
    assert state.submissions == ()


def test_a_pipeline_whose_files_are_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine.py").write_text("from light import PIPELINE\n")
    words = ["pipeline=space.mine:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    path = f"{tmp_path}:{Path(__file__).parent}"
    refused = launch("sweep", *words, code=2, PYTHONPATH=path)
    assert "the package space has no __init__.py" in refused.stderr
