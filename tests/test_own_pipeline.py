"""A pipeline of somebody else has every feature, even where the experiment is absent."""

import json
import subprocess
from pathlib import Path

import pytest
from commands import launch
from own_pipeline import (
    assert_counted,
    project_without_experiment,
    words,
    write_pipeline,
    write_texts,
)


@pytest.fixture
def project(tmp_path: Path) -> str:
    write_pipeline(tmp_path)
    return str(project_without_experiment(tmp_path / "project"))


def typed(
    script: str, project: str, *more: str, code: int | None = 0
) -> subprocess.CompletedProcess[str]:
    path = f"{project}:{Path(project).parent}"
    return launch(script, *more, project=project, code=code, PYTHONPATH=path)


def stages(project: str, run: Path, code: int | None = 0) -> dict[str, tuple[int, int]]:
    """Return, for each stage, the number of shards that are done and of those planned."""
    report = json.loads(typed("status", project, str(run), "--json", code=code).stdout)
    return {stage["folder"]: (stage["done"], stage["planned"]) for stage in report["stages"]}


def test_bad_values_are_refused_and_a_dry_run_writes_nothing(project: str, tmp_path: Path) -> None:
    one, two, _ = write_texts(tmp_path)
    refused = typed("sweep", project, *words(tmp_path, one, tmp_path / "gone.txt"), code=2)
    assert refused.stderr.startswith("error: files: ")
    assert "gone.txt is not there; expected text files" in refused.stderr
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / one.name
    twin.write_text("a\n")
    refused = typed("sweep", project, *words(tmp_path, one, twin), code=2)
    assert "expected files with different names" in refused.stderr
    planned = typed("sweep", project, *words(tmp_path, one, two), "--dry-run").stdout
    assert "words: 3 shards" in planned
    assert not (tmp_path / "words").exists()


def test_it_runs_grows_and_is_rerun_and_what_is_published_stays(
    project: str, tmp_path: Path
) -> None:
    one, two, three = write_texts(tmp_path)
    run = tmp_path / "words"
    typed("sweep", project, *words(tmp_path, one, two), "cluster=local")
    assert_counted(run, one, two)
    assert stages(project, run) == {"1-count": (2, 2), "2-add": (1, 1)}
    progress = [json.loads(path.read_text())["key"] for path in run.glob("progress/*.json")]
    assert any(key.startswith("add/results/") for key in progress)

    typed("sweep", project, *words(tmp_path, one, two, three), "cluster=local")
    assert_counted(run, one, two, three)
    assert len(list(run.glob("1-count/*/*.json"))) == 3
    [record] = run.glob("1-count/two/*.json")
    record.unlink()
    assert stages(project, run, code=1)["1-count"] == (2, 3)
    typed("rerun", project, str(run), "--stage", "count", "--shards", "1")
    assert stages(project, run) == {"1-count": (3, 3), "2-add": (1, 1)}
    typed("verify", project, str(run))

    two.write_text("something else\n")
    changed = [*words(tmp_path, one, two, three), "cluster=local"]
    refused = typed("sweep", project, *changed, code=2)
    assert "published results were made with other settings: count/two: digest" in refused.stderr
