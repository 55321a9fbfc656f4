"""docs/first-day.md, typed from top to bottom on a fresh cluster as a newcomer does."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT
from real_slurm import PATIENCE_S, running_cluster

PROJECT = ("analysis", "configs", "kdhpc", "launch", "slurm")
SITE = """\
executor: slurm
runs_dir: {runs_dir}
slurm:
  time_min: 1:00:00
  mem_gb: 1.5
  gate: {{time_min: 10, mem_gb: 0.2}}
"""
"""What a user of slurm/devcluster fills in."""


def commands_of(page: str) -> Iterator[tuple[str, int, str]]:
    """Yield what a page's `console` blocks show: each command, its exit code and last line.

    A comment `# exit code N` says the code if it is not 0. A command may show nothing.
    """
    for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL):
        for shown in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = shown.partition("\n")
            code = re.search(r"# exit code (\d)", command)
            yield command, int(code.group(1)) if code else 0, output.rstrip("\n")


def is_like(line: str, shown: str) -> bool:
    """Return whether a line is what the page shows, with `...` for anything."""
    pattern = ".*".join(re.escape(part) for part in shown.split("..."))
    return re.fullmatch(pattern, line) is not None


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project, whose runs and cluster files are its own."""
    for name in PROJECT:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "project" / name, ignore=ignored)
    return tmp_path / "project"


def test_the_first_day_goes_as_its_page_says(project: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "first-day.md").read_text()
    python = Path(sys.executable).parent
    with running_cluster("--cpus-per-node", "2"):
        environment = {
            **os.environ,
            "PATH": f"{python}:{os.environ['PATH']}",
            "PYTHONPATH": str(project),
            "XDG_STATE_HOME": str(tmp_path / "state"),
        }
        for command, code, shown in commands_of(page):
            typed = subprocess.run(
                ["bash", "-c", command],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=project,
                env=environment,
                timeout=PATIENCE_S,
            )
            last = (typed.stdout.rstrip("\n").splitlines() or [""])[-1]
            said = f"$ {command}\n{typed.stdout}"
            assert typed.returncode == code, said
            assert is_like(last, shown), f"{said}\nexpected the last line: {shown}"
            if command.startswith("cp "):
                site = project / "configs" / "cluster" / "mysite.yaml"
                site.write_text(SITE.format(runs_dir=tmp_path / "runs"))
