"""Where the folders of the project are: beside the package in a clone, inside it when installed.

A wheel carries copies of launch/, analysis/, configs/ and slurm/, so that no clone is needed.
"""

from collections.abc import Iterator
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
INSTALLED_DIR = PACKAGE_DIR / "_project"
"""The copies in a wheel; in a clone and in a run's snapshot of the code there is no such folder."""
PROJECT_DIR = INSTALLED_DIR if INSTALLED_DIR.is_dir() else PACKAGE_DIR.parent


def files_of(name: str) -> Iterator[tuple[str, Path]]:
    """Yield the files of a folder of the project, or of the package, in the order of their names.

    Yields:
        The path from the project's folder, as a clone has it, and the path of the file.
    """
    folder = PACKAGE_DIR if name == PACKAGE_DIR.name else PROJECT_DIR / name
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not (folder == PACKAGE_DIR and path.is_relative_to(INSTALLED_DIR)):
            yield str(Path(name) / path.relative_to(folder)), path
