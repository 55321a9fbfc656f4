"""Fixtures that several test files share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import launch, status

FIRST = ("test_ranks.py", "test_training.py", "test_slurm.py", "test_local.py")
"""Files that take longest, so that no core waits for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip what is marked as long, unless FAULTS=all."""
    items.sort(key=lambda item: item.path.name not in FIRST)
    for item in items:
        if item.get_closest_marker("long") and os.environ.get("FAULTS") != "all":
            reason = "long: takes minutes of two cores; FAULTS=all plays it"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def _own_notes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the runs of tests out of the user's note of where runs are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _own_notes_of_a_test(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the runs of a test out of those of others, which have the same names."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished `tiny` run, made once for all tests.

    Tests may read or copy it, but must not change it.
    """
    runs_dir = tmp_path_factory.mktemp("runs")
    launch("sweep", "tiny", "cluster=local", f"runs_dir={runs_dir}")
    return runs_dir / "tiny"


@pytest.fixture(scope="session")
def extended_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Return a finished run that was extended by every score, and the arms that this added.

    Tests may read or copy it, but must not change it.
    """
    runs_dir = tmp_path_factory.mktemp("extended")
    run = shutil.copytree(tiny_run, runs_dir / "tiny")
    before = {path: path.read_bytes() for path in run.glob("[1-7]-*/*/*.json")}
    words = ["tiny", "cluster=local", f"runs_dir={runs_dir}", "decode_temperatures=[0.7,1.3]"]
    words += ["scoring.corruptions=[swap]", "scoring.expected=true"]
    launch("sweep", *words, f"claims={Path(__file__).parent}/data/tiny-claims.yaml")
    assert status(run, code=0)["complete"]
    assert {path: path.read_bytes() for path in before} == before
    new = {path.parent.name for path in run.glob("[1-7]-*/*/*.json") if path not in before}
    return run, new
