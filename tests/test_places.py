"""Runs are found by name wherever they are, and are not made anew where they were."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, assert_light_complete, begin, launch, status
from light import PIPELINE, LightConfig

from kdhpc.cluster import places, runs
from kdhpc.cluster.ledger import Ledger
from kdhpc.errors import InputError

LIGHT = ["pipeline=light:PIPELINE", "cluster=local", "name=light", "num_shards=2"]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the project whose runs/ and noted runs are this test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name in ("kdhpc", "configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, tmp_path / "project" / name)
    site = tmp_path / "project" / "configs" / "cluster" / "mysite.yaml"
    site.write_text(f"executor: local\nruns_dir: {tmp_path}/scratch\n")
    return tmp_path / "project"


def test_every_command_finds_a_run_whose_place_the_clusters_yaml_says(
    project: Path, tmp_path: Path
) -> None:
    words = [*LIGHT, "cluster=mysite"]
    launch("sweep", *words, project=str(project))
    assert_light_complete(tmp_path / "scratch/light", 2)
    for script in ("status", "verify", "clean", "cancel", "rerun"):
        launch(script, "light", project=str(project))
    launch("sweep", *words, project=str(project))
    assert (tmp_path / "state/kdhpc/runs").read_text() == f"{tmp_path}/scratch/light\n"
    refused = launch("status", "ligth", project=str(project), code=2)
    assert (
        refused.stderr
        == "error: ligth: no run of this name in runs/ or noted elsewhere; expected one of light\n"
    )


def test_a_forgotten_cluster_starts_no_second_run(project: Path, tmp_path: Path) -> None:
    launch("sweep", *LIGHT, "cluster=mysite", project=str(project))
    refused = launch("sweep", *LIGHT, project=str(project), code=2)
    assert refused.stderr == (
        f"error: name=light: a run of this name is in {tmp_path}/scratch/light; type "
        f"cluster=mysite runs_dir={tmp_path}/scratch to go on with it, or runs_dir=runs if you "
        f"mean {project}/runs/light\n"
    )
    assert not (project / "runs").exists()
    again = [f"runs_dir={tmp_path}/scratch", "cluster=mysite"]
    launch("sweep", *LIGHT, *again, project=str(project))


def test_of_two_runs_with_one_name_the_path_is_asked_for(project: Path, tmp_path: Path) -> None:
    launch("sweep", *LIGHT, "cluster=mysite", project=str(project))
    launch("sweep", *LIGHT, "runs_dir=runs", project=str(project))
    for script in ("status", "cancel", "rerun", "clean", "verify"):
        refused = launch(script, "light", project=str(project), code=2)
        assert refused.stderr.count("\n") == 1
        assert f"{project}/runs/light, {tmp_path}/scratch/light" in refused.stderr
    launch("status", "light", "--runs-dir", "runs", project=str(project))
    launch("status", f"{tmp_path}/scratch/light", project=str(project))
    shutil.rmtree(tmp_path / "scratch")
    launch("status", "light", project=str(project))
    launch("sweep", *LIGHT, project=str(project))


def test_a_home_that_cannot_be_written_breaks_no_sweep(project: Path, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    launch("sweep", *LIGHT, f"runs_dir={tmp_path}/other", project=str(project))
    launch("status", f"{tmp_path}/other/light", project=str(project))
    launch("status", "light", project=str(project), code=2)


def test_a_link_in_runs_is_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "run.json").touch()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "short").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert places.locate("short") == tmp_path / "elsewhere"
    places.note(tmp_path / "elsewhere")
    assert places.locate("short") == places.locate("elsewhere")
    with pytest.raises(InputError, match="expected one of elsewhere, short"):
        places.locate("long")


def test_a_narrower_request_says_what_it_leaves_out(project: Path) -> None:
    wide = [word for word in LIGHT if not word.startswith("num_shards")]
    first = launch("sweep", *wide, "num_shards=4", project=str(project)).stdout
    assert "note:" not in first
    narrow = launch("sweep", *LIGHT, project=str(project)).stdout
    assert (
        "note: 4 shards of the last request are not in this one: make/arm, square/arm; what is "
        "published of them stays, and typing the wider settings takes them up again\n"
    ) in narrow
    assert "note:" not in launch("sweep", *wide, "num_shards=5", project=str(project)).stdout


def test_a_task_makes_no_run_where_its_run_was(tmp_path: Path) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    config = LightConfig(
        pipeline="light:PIPELINE", name="light", runs_dir=str(tmp_path), trouble=str(trouble),
        num_shards=3,
    )  # fmt: skip
    plan = PIPELINE.plan(config)
    run = runs.open_for(config, plan)
    runs.add_request(run, config, kind="sweep", executor="local")
    keys = [shard.key for shard in plan.stage("make")]
    (trouble / "make-00001").write_text("hang")
    task = begin(run, 1, keys)
    while Ledger(run.path).last_events(1, 0).get(keys[1]) != "started":
        assert task.poll() is None
        time.sleep(0.05)
    moved = run.path.rename(tmp_path / "moved")
    (trouble / "make-00001").unlink()
    assert task.wait() == 1
    assert not run.path.exists()
    log = (moved / "logs/0001/0.log").read_text()
    said = "was moved or deleted while it was in use; go on in its new place"
    assert log.splitlines()[-1] == f"error: {run.path}: {said}"
    assert "Traceback" not in log


def test_a_gate_makes_no_run_where_its_run_was(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "kdhpc.cluster.gate", f"{tmp_path}/gone"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"error: {tmp_path}/gone: no run here; expected a folder that sweep.py made\n"
    )
    assert not (tmp_path / "gone").exists()


def test_a_moved_run_goes_on_in_its_new_place(project: Path, tmp_path: Path) -> None:
    trouble = tmp_path / "trouble"
    trouble.mkdir()
    (trouble / "square-00001").write_text("hang")
    words = [*LIGHT, f"trouble={trouble}", f"runs_dir={tmp_path}/old"]
    run = tmp_path / "old" / "light"
    with subprocess.Popen(
        [sys.executable, f"{project}/launch/sweep.py", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{project}:{ROOT}/tests"},
    ) as launcher:
        while not list((run / "2-square/arm").glob("00001.*.txt")):
            assert launcher.poll() is None
            time.sleep(0.05)
        (tmp_path / "new").mkdir()
        run.rename(tmp_path / "new" / "light")
        (trouble / "square-00001").unlink()
        said = launcher.communicate()[1]
    assert launcher.returncode == 1
    assert said == (
        f"error: {run}: was moved or deleted while it was in use; go on in its new place\n"
    )
    assert not run.exists()
    assert status(tmp_path / "new/light", code=1)["stages"][0]["done"] == 2
    launch("sweep", *LIGHT, f"runs_dir={tmp_path}/new", project=str(project))
    assert_light_complete(tmp_path / "new/light", 2)
    launch("verify", "light", project=str(project))


def test_a_runs_dir_that_is_given_is_the_only_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("A/light", "B/light", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("A/light", "B/light"):
        (tmp_path / folder / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "A")
    assert places.locate("light") == tmp_path / "A" / "light"
    assert places.locate("light", "../B") == tmp_path / "B" / "light"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="docs: no run of this name"):  # a folder, but no run
        places.locate("docs")
