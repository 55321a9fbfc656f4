"""What several test files share."""

from pathlib import Path

import pytest
from commands import launch


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished `tiny` run, made once for all tests: look, copy, do not touch."""
    runs_dir = tmp_path_factory.mktemp("runs")
    launch("sweep", "tiny", "cluster=local", f"runs_dir={runs_dir}")
    return runs_dir / "tiny"
