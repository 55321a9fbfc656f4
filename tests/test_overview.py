"""All runs are listed, whatever is wrong with one of them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from commands import launch
from light import PIPELINE, LightConfig
from rich.console import Console
from test_run_folder import write as write_data

from kdhpc.cluster import places, runs
from kdhpc.cluster.display import runs_view
from kdhpc.cluster.ledger import Failure, Job, Ledger, Submission
from kdhpc.cluster.overview import overviews
from kdhpc.cluster.runs import Run
from kdhpc.storage.files import write_once
from kdhpc.storage.work import Work, Written


def make(runs_dir: Path, name: str, *, published: int = 0, executor: str = "local") -> Run:
    """Return a run of one shard in each of three stages, of which the first are published."""
    config = LightConfig(pipeline="light:PIPELINE", name=name, runs_dir=str(runs_dir), num_shards=1)
    plan = PIPELINE.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor=executor)
    for shard in list(plan.shards.values())[:published]:
        work: Work[Any] = Work(run, config, plan)
        written = Written(path=write_data(shard, work).path, num_rows=1)
        work.publish(shard, written, time.time() - 36)
    return run


def submit(run: Run, job: Job | None) -> Submission:
    submission = Submission(
        number=1, request=1, name=f"make.{run.path.name}-0001", stage="make",
        tasks=(("make/arm/00000",),), resources={}, code="", time=time.time(), host="", pid=0,
    )  # fmt: skip
    ledger = Ledger(run.path)
    ledger.claim(submission)
    if job:
        ledger.settle(1, job)
    return submission


def test_every_state_has_its_word_and_one_damaged_run_hides_no_other(tmp_path: Path) -> None:
    make(tmp_path, "complete", published=3)
    make(tmp_path, "incomplete", published=1)
    failed = make(tmp_path, "failed")
    submit(failed, Job(job_id=None))
    failure = Failure(key="make/arm/00000", kind="EXCEPTION", message="m", submission=1)
    assert Ledger(failed.path).add_failure(failure)
    cancelled = make(tmp_path, "cancelled")
    _, config, _ = runs.current(cancelled)
    runs.add_request(cancelled, config, kind="cancel", executor="local")
    (make(tmp_path, "garbage").path / "run.json").write_text("{}")
    (tmp_path / "other-format").mkdir(mode=0o700)
    write_once(tmp_path / "other-format" / "run.json", {"pipeline": "language", "format": 99})
    no_request = make(tmp_path, "no-request")
    (no_request.path / "requests" / "0001.json").unlink()
    running = make(tmp_path, "running", published=1)
    with runs.launcher_lock(running):
        printed = launch("runs", "--runs-dir", str(tmp_path), "--json").stdout
    listed = {run["name"]: run for run in json.loads(printed)}
    assert {name: run["state"] for name, run in listed.items()} == {
        "complete": "complete",
        "incomplete": "incomplete",
        "failed": "failed",
        "cancelled": "cancelled",
        "garbage": "unreadable",
        "other-format": "unreadable",
        "no-request": "unreadable",
        "running": "running",
    }
    for run in listed.values():
        assert bool(run["problem"]) == (run["state"] == "unreadable")
        assert run["path"] in run["problem"] or not run["problem"]
    assert (listed["complete"]["done"], listed["complete"]["planned"]) == (3, 3)
    assert listed["complete"]["rank_hours"] == pytest.approx(3 * 36 / 3600, rel=0.1)
    assert abs(listed["complete"]["changed"] - time.time()) < 600
    table = launch("runs", "list", "--runs-dir", str(tmp_path)).stdout
    assert all(name in table for name in listed)


def test_slurm_is_asked_once_for_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    lines = "1|1|0|RUNNING|None|make.a-0001\\n2|2|0|PENDING|Priority|make.b-0001\\n"
    squeue.write_text(f"#!/bin/sh\necho asked >> {asked}\nprintf '{lines}'\n")
    squeue.chmod(0o755)
    for name in ("a", "b", "c"):
        run = make(tmp_path / "runs", name, executor="slurm")
        submit(run, Job(job_id="1"))
    monkeypatch.setenv("PATH", f"{squeue.parent}{os.pathsep}{os.environ['PATH']}")
    paths = places.folders(str(tmp_path / "runs"))
    states = {run.name: run.state for run in overviews(paths)}
    assert states == {"a": "running", "b": "queued", "c": "incomplete"}
    assert asked.read_text() == "asked\n"
    squeue.write_text(f"#!/bin/sh\necho asked >> {asked}\nexit 1\n")
    unknown = overviews(paths)
    assert {run.state for run in unknown} == {"unknown"}
    assert all("squeue failed" in run.problem for run in unknown)
    assert asked.read_text() == "asked\n" * 2


def test_a_line_fits_80_columns_and_runs_of_one_name_have_their_paths(tmp_path: Path) -> None:
    long = "a-name-that-somebody-has-made-rather-long-to-say-it-all"
    make(tmp_path / "one", long, published=3)
    make(tmp_path / "one", "twin")
    make(tmp_path / "two", "twin")
    paths = [*places.folders(str(tmp_path / "one")), *places.folders(str(tmp_path / "two"))]
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(runs_view(overviews(paths)))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "complete" in text
    assert "3/3" in text
    assert "incomplete" in text
    first_column = "".join(line.split("  ")[0].split(" ")[0] for line in lines)
    assert str(tmp_path / "one" / "twin") in first_column
    assert str(tmp_path / "two" / "twin") in first_column


def test_files_with_several_names_count_once_and_links_are_not_followed(tmp_path: Path) -> None:
    run = make(tmp_path, "sized", published=3)
    before = overviews([run.path])[0].num_bytes
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "big").write_bytes(bytes(10**6))
    data = run.path / "big"
    data.write_bytes(bytes(range(256)) * 4096)
    os.link(data, run.path / "again")
    (run.path / "models").mkdir()
    (run.path / "models" / "x").symlink_to(tmp_path / "elsewhere")
    grown = overviews([run.path])[0].num_bytes - before
    assert 2**20 <= grown < 2**20 + 10**5


def test_reused_work_is_not_counted_again_and_no_runs_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    said = launch("runs", "--runs-dir", f"{tmp_path}/empty").stdout
    assert said == f"no runs in {tmp_path}/empty; sweep.py makes one\n"
    run = make(tmp_path / "runs", "a", published=1)
    path = run.record_path("make/arm/00000")
    record = json.loads(path.read_text())
    del record["seal"]
    path.unlink()
    write_once(path, record | {"reused_from": "/elsewhere"})
    assert overviews([run.path])[0].rank_hours == 0
