"""Functions that the analysis scripts share: read a run's results, write tables and figures."""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from kdhpc.errors import InputError
from kdhpc.pipeline import MIXTURE
from kdhpc.plan.stages import Pipeline
from kdhpc.storage.results import Results, read_results
from kdhpc.storage.run_folder import RESULTS

mpl.use("Agg")  # figures are written to files, so no display is needed


def parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of the arguments that every analysis takes."""
    new_parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    new_parser.add_argument("run", type=Path, help=f"folder of a run, or a {RESULTS} file")
    new_parser.add_argument(
        "--out", type=Path, help=f"folder to write to (default: the folder of {RESULTS})"
    )
    return new_parser


def read(options: argparse.Namespace, pipeline: Pipeline[Any]) -> tuple[Results, Path, Path]:
    """Read the results of a run.

    Args:
        options: arguments that were parsed by `parser`.
        pipeline: the pipeline that made the run.

    Returns:
        The results, the path of their file, and the folder to write to, which exists.

    Raises:
        InputError: if there are no results, or they are those of another pipeline.
        DamagedError: if the results cannot be read.
    """
    path: Path = (
        options.run / pipeline.folders["merge"] / RESULTS if options.run.is_dir() else options.run
    )
    if not path.is_file():
        raise InputError(
            f"{path}: no results here; expected the file that a run writes at its end, so let "
            "launch/sweep.py finish it"
        )
    results = read_results(path)
    if bool(results.tables) != (pipeline is MIXTURE):
        raise InputError(
            f"{path}: results of another pipeline; expected those of {pipeline.name}, use the "
            "other analysis script"
        )
    if not results.complete:
        print("warning: some planned shards are missing from these results", file=sys.stderr)
    out: Path = options.out or path.parent
    out.mkdir(parents=True, exist_ok=True)
    return results, path, out


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Write rows as CSV with all digits and a column for every key; return the path."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_figure(figure: Figure, out: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF and close it; return both paths."""
    paths = [out / f"{name}.png", out / f"{name}.pdf"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
