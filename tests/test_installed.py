"""A wheel needs no clone: it has every command, and a run of it is the run of the clone."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, assert_light_complete, launch

import kdhpc
from kdhpc.project import PROJECT_DIR, files_of

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        *PIP,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "site"
    install = [*PIP, "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True, cwd=wheel.parent)
    return folder


def typed(installed: Path, *words: str, code: int = 0) -> str:
    """Type words as somebody does who has installed the wheel; return what is printed."""
    finished = subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=installed.parent,
        env={**os.environ, "PYTHONPATH": f"{installed}:{ROOT}/tests", "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == code, f"{finished.stdout}\n{finished.stderr}"
    return finished.stdout or finished.stderr


def test_a_clone_is_used_as_it_is() -> None:
    assert PROJECT_DIR == ROOT
    assert ("slurm/environment.sh", ROOT / "slurm" / "environment.sh") in list(files_of("slurm"))


def test_a_wheel_has_every_file_that_a_run_and_its_analysis_need(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"kdhpc/py.typed", "kdhpc/sampling/native.cpp"} <= names
    package = {name for name in names if re.fullmatch(r"kdhpc/(?!_project/).*\.(py|cpp)", name)}
    assert package == {n for n, path in files_of("kdhpc") if path.suffix in {".py", ".cpp"}}
    for folder, suffix in (("launch", ".py"), ("configs", ".yaml"), ("slurm", ".sh")):
        there = {n for n in names if n.startswith(f"kdhpc/_project/{folder}/")}
        needed = {f"kdhpc/_project/{n}" for n, path in files_of(folder) if path.suffix == suffix}
        assert needed <= there
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"kdhpc", f"kdhpc-{kdhpc.__version__}.dist-info"}


def test_modules_of_the_analysis_that_a_wheel_lacks_are_needed_by_none_that_it_has(
    wheel: Path,
) -> None:
    prefix = "kdhpc/_project/analysis/"
    files = zipfile.ZipFile(wheel)
    there = {n.removeprefix(prefix) for n in files.namelist() if n.startswith(prefix)}
    lacking = {path.stem for path in (ROOT / "analysis").glob("*.py") if path.name not in there}
    for name in there:
        text = files.read(f"{prefix}{name}").decode()
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, re.MULTILINE))
        assert not imported & lacking, name


def test_all_commands_are_listed_and_others_are_refused(installed: Path) -> None:
    listing = typed(installed, sys.executable, "-m", "kdhpc")
    assert listing == typed(installed, sys.executable, "-m", "kdhpc", "--help")
    names = re.findall(r"^  (\w+)  +[A-Z].*\.$", listing, re.MULTILINE)
    scripts = [path.stem for path in (ROOT / "launch").glob("*.py")]
    assert {*scripts, "report", "precision_recall", "mixture"} <= {*names}
    assert len(names) == len({*names})
    assert not {"experiment", "files", "study"} & {*names}
    refused = typed(installed, sys.executable, "-m", "kdhpc", "swep", code=2)
    assert refused.startswith("error: swep: no such command; expected one of ")
    assert refused.count("\n") == 1


def test_a_run_without_a_clone_is_the_run_of_the_clone(installed: Path, tmp_path: Path) -> None:
    python = [sys.executable, "-m", "kdhpc"]
    dry = typed(installed, *python, "sweep", "tiny", "cluster=local", "--dry-run")
    assert dry.endswith("planned for local, in runs/tiny; nothing was written\n")
    words = ["pipeline=light:PIPELINE", "cluster=local", "name=light", "num_shards=2"]
    typed(installed, *python, "sweep", *words)
    shown = typed(installed, f"{installed}/bin/kdhpc", "status", "light", "--json")
    assert json.loads(shown)["complete"]
    launch("sweep", *words, f"runs_dir={tmp_path}")
    run = installed.parent / "runs" / "light"
    assert_light_complete(run, 2)
    [code] = (path.name for path in (run / "code").iterdir())
    assert [path.name for path in (tmp_path / "light" / "code").iterdir()] == [code]


def test_the_analysis_needs_no_clone(installed: Path, tmp_path: Path) -> None:
    scores = ROOT / "docs" / "experiments" / "objective" / "scores-0.h5.xz"
    script = f"{installed}/bin/kdhpc"
    table = typed(installed, script, "precision_recall", str(scores), "--out", str(tmp_path))
    assert "nats per token, given p* and D" in table
    assert [*tmp_path.glob("*.png")]
