"""The Tab key: a command is started as the shell's function for argcomplete starts it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, launch

from kdhpc.config import presets

SWEEP, RERUN, STATUS = ([f"{ROOT}/launch/{name}.py"] for name in ("sweep", "rerun", "status"))
MODULE = ["-m", "kdhpc"]


def completed(start: list[str], typed: str, folder: Path = ROOT) -> list[str]:
    """Return what the end of `python START TYPED` may become when Tab is pressed there."""
    line = f"python {' '.join(start)} {typed}"
    finished = subprocess.run(
        ["bash", "-c", '"$@" 8>&1 >/dev/null 2>&1', "bash", sys.executable, *start],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
            "_ARGCOMPLETE": str(1 + len(start)),
            "_ARGCOMPLETE_SHELL": "bash",
            "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        },
    )
    return finished.stdout.split("\v") if finished.stdout else []


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("ti", ["tiny"]),
        ("tiny tempera", ["temperature"]),  # is added to tiny
        ("mini tempera", []),
        ("tiny len", ["length="]),
        ("tiny sampling.eng", ["sampling.engine="]),
        ("tiny sampling.engine=", ["sampling.engine=torch", "sampling.engine=native"]),
        ("tiny tensorboard=t", ["tensorboard=true"]),
        ("tiny students.small.shape.hid", ["students.small.shape.hidden="]),
        ("mixture settings.paper.fit", ["settings.paper.fit_points="]),
        ("tiny slurm.stages.train-on-truth.time", ["slurm.stages.train-on-truth.time_min="]),
        ("tiny cluster=sites/lu", ["cluster=sites/lumi"]),
        ("tiny until=sample-tr", ["until=sample-truth"]),
        ("--dr", ["--dry-run"]),
        ("tiny length=x se", ["seed=", "seeds="]),  # a mistake before the word does not matter
        ("nothing se", []),
    ],
)
def test_presets_keys_and_values_are_completed(typed: str, expected: list[str]) -> None:
    assert completed(SWEEP, typed) == expected


def test_without_a_letter_presets_and_first_parts_of_keys_are_shown() -> None:
    shown = completed(SWEEP, "")
    assert {*presets.preset_names(), "taus=", "slurm.", "students."} <= {*shown}
    assert not [word for word in shown if "." in word[:-1]]


def test_commands_are_completed_without_a_clone_too(tmp_path: Path) -> None:
    assert completed(MODULE, "sw", tmp_path) == ["sweep"]
    assert {"sweep", "status", "report"} <= {*completed(MODULE, "", tmp_path)}
    assert completed(MODULE, "sweep ti", tmp_path) == ["tiny"]
    assert completed(MODULE, "swep ti", tmp_path) == []


def test_runs_stages_and_resources_are_completed(tmp_path: Path) -> None:
    words = ["pipeline=light:PIPELINE", "cluster=local", "name=light", "num_shards=1"]
    launch("sweep", *words, f"runs_dir={tmp_path}/runs")
    for start, typed in ((STATUS, ""), (MODULE, "status "), (MODULE, "report ")):
        assert completed(start, typed, tmp_path) == ["light"]
    assert completed(STATUS, "light --list mak", tmp_path) == ["make"]
    assert completed(STATUS, "heavy --list mak", tmp_path) == []
    assert completed(RERUN, "light --stage s", tmp_path) == ["square"]
    assert completed(RERUN, "light slurm.mem", tmp_path) == ["slurm.mem_gb="]
    assert completed(SWEEP, "tiny reuse=", tmp_path) == ["reuse=light"]
