"""Requests of a run, and what of them reaches the next submission."""

import dataclasses
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from commands import launch, need
from light import PIPELINE, LightConfig

from kdhpc.cluster import runs, slurm
from kdhpc.cluster.advance import _failures_of, advance
from kdhpc.cluster.gate import tell
from kdhpc.cluster.ledger import Ledger, Submission
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


def test_a_mail_or_hook_that_fails_is_a_warning(
    run: Run,
    config: LightConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told = dataclasses.replace(config.slurm, on_end="/nonexistent", mail_user="me@example.org")
    config = dataclasses.replace(config, slurm=told)
    runs.add_request(run, config, kind="sweep", executor="local")
    state = observe(run, config, PIPELINE.plan(config), with_queue=False)
    monkeypatch.setenv("PATH", "/nowhere")
    tell(run.path, state)
    said = capfd.readouterr()
    assert "warning: slurm.on_end: /nonexistent" in said.err
    assert "warning: slurm.mail_user: mail" in said.err
    assert said.out == "light: stopped\n"


def test_a_cancel_by_the_user_is_one_whatever_the_task_said_last(
    run: Run, config: LightConfig
) -> None:
    runs.add_request(run, config, kind="sweep", executor="slurm")
    ledger, key = Ledger(run.path), "make/arm/00000"
    submission = Submission(
        number=1, request=1, name="make.light-0001", stage="make", tasks=((key,),),
        resources={}, code="", time=time.time(), host="", pid=0,
    )  # fmt: skip
    for event in ("started", "stopped"):
        ledger.note_attempt(1, 0, key, event)
    for state, kind in (("CANCELLED by 1000", "CANCELLED"), ("FAILED", "STOPPED")):
        ended = slurm.Ended(state=state, exit_code="0:15", node="n1")
        [failure] = _failures_of(run, ledger, submission, 0, [key], ended)
        assert (failure.key, failure.kind) == (key, kind)


def test_a_file_system_without_locks_is_named(tmp_path: Path) -> None:
    need(shutil.which("cc") is not None, "no C compiler")
    source = "#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n"
    (tmp_path / "no.c").write_text(source)
    build = ["cc", "-shared", "-fPIC", "-o", f"{tmp_path}/no.so", f"{tmp_path}/no.c"]
    subprocess.run(build, check=True)
    words = ["pipeline=light:PIPELINE", "cluster=local", f"runs_dir={tmp_path}", "name=x"]
    refused = launch("sweep", *words, code=2, LD_PRELOAD=f"{tmp_path}/no.so")
    assert "its file system has no locks" in refused.stderr
    assert refused.stderr.count("\n") == 1
    shown = launch("status", str(tmp_path / "x"), code=None, LD_PRELOAD=f"{tmp_path}/no.so")
    assert "Traceback" not in shown.stderr
