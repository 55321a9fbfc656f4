"""Where runs are: in runs/, or where `runs_dir` has put them.

The cluster's YAML or the command line says where a new run goes, and neither is typed again with a
run's name. Runs outside runs/ are therefore noted in a file of the user, a path on each line. It is
a convenience: if it cannot be written, such a run is found by its path only.
"""

import contextlib
import os
from pathlib import Path

from kdhpc.config.run import RunConfig
from kdhpc.errors import InputError

DEFAULT_DIR = RunConfig.runs_dir


def notes_path() -> Path | None:
    """Return the file of noted runs; None for a user without a home."""
    with contextlib.suppress(RuntimeError):
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        return Path(state) / "kdhpc" / "runs"
    return None


def note(run_dir: Path) -> None:
    """Remember where a run is, unless it is in runs/; an unwritable disk is ignored.

    Args:
        run_dir: absolute path of the run folder.
    """
    line, path = os.fsencode(run_dir), notes_path()
    is_default = run_dir.parent == Path(DEFAULT_DIR).resolve()
    if path is None or is_default or b"\n" in line or run_dir in _noted():
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(line + b"\n")


def named(name: str) -> list[Path]:
    """Return the absolute folders of all runs of this name, the one in runs/ first."""
    return _of_name(name, known())


def names(runs_dir: str | None = None) -> list[str]:
    """Return the names of the runs that `locate` finds, sorted."""
    return sorted({path.name for path in _candidates(runs_dir)})


def folders(runs_dir: str | None = None) -> list[Path]:
    """Return the absolute folders of the runs that `locate` finds, each once.

    Raises:
        InputError: if there is no folder `runs_dir`.
    """
    if runs_dir is not None and not Path(runs_dir).is_dir():
        raise InputError(f"{runs_dir}: no such folder; expected one with runs")
    return list(dict.fromkeys(path.resolve() for path in _candidates(runs_dir)))


def locate(name: str, runs_dir: str | None = None) -> Path:
    """Find the folder of a run.

    Args:
        name: name of the run, or a path.
        runs_dir: folder that has the run; None to look in runs/ and where runs are noted.

    Returns:
        The absolute path of a folder.

    Raises:
        InputError: if there is no such run, or runs in several places have this name.
    """
    is_path = Path(name).is_dir() and (os.sep in name or (Path(name) / "run.json").is_file())
    if is_path and (runs_dir is None or os.sep in name):
        return Path(name).resolve()
    paths = _of_name(name, _candidates(runs_dir))
    if not paths:
        others = ", ".join(names(runs_dir))
        expected = f"one of {others}" if others else "the path of a run"
        if os.sep in name:
            raise InputError(f"{name}: no such folder; expected {expected}")
        where = f"{runs_dir}/" if runs_dir else f"{DEFAULT_DIR}/ or noted elsewhere"
        raise InputError(f"{name}: no run of this name in {where}; expected {expected}")
    if len(paths) > 1:
        raise InputError(
            f"{name}: runs in several places have this name; expected the path of one: "
            f"{', '.join(map(str, paths))}"
        )
    return paths[0]


def known() -> list[Path]:
    """Return the folders of all runs in runs/, then of those that are noted and still there."""
    noted = [path for path in _noted() if os.path.isfile(path / "run.json")]
    return [*_runs_in(Path(DEFAULT_DIR)), *noted]


def _candidates(runs_dir: str | None) -> list[Path]:
    return known() if runs_dir is None else _runs_in(Path(runs_dir))


def _runs_in(runs_dir: Path) -> list[Path]:
    return [path.parent for path in sorted(runs_dir.glob("*/run.json"))]


def _of_name(name: str, paths: list[Path]) -> list[Path]:
    """Return the paths that end with this name, absolute and each once."""
    return list(dict.fromkeys(path.resolve() for path in paths if path.name == name))


def _noted() -> list[Path]:
    path = notes_path()
    with contextlib.suppress(OSError):
        if path is not None:
            return [Path(os.fsdecode(line)) for line in path.read_bytes().splitlines()]
    return []
