"""What the analysis scripts share: reading a run's results, writing tables and figures."""

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

mpl.use("Agg")  # figures go to files; there need not be a screen


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every analysis takes."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    found.add_argument("run", type=Path, help=f"folder of a run, or a {RESULTS}")
    found.add_argument("--out", type=Path, help=f"where to write; beside {RESULTS} if not given")
    return found


def read(options: argparse.Namespace, pipeline: Pipeline[Any]) -> tuple[Results, Path, Path]:
    """Results of a run, where they are, and the folder to write into.

    Args:
        options: what `parser` found.
        pipeline: that the run is of.

    Raises:
        InputError: if there are no results, or those of another pipeline.
        DamagedError: if they cannot be read.
    """
    path: Path = (
        options.run / pipeline.folders["merge"] / RESULTS if options.run.is_dir() else options.run
    )
    if not path.is_file():
        raise InputError(f"{path}: no results here; run launch/sweep.py to its end")
    results = read_results(path)
    if bool(results.tables) != (pipeline is MIXTURE):
        raise InputError(f"{path}: results of another pipeline; expected {pipeline.name}")
    if not results.complete:
        print("warning: some planned shards are missing from these results", file=sys.stderr)
    out: Path = options.out or path.parent
    out.mkdir(parents=True, exist_ok=True)
    return results, path, out


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """A table with a column a key, every digit."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def save_figure(figure: Figure, out: Path, name: str) -> list[Path]:
    """A figure as PNG and PDF."""
    paths = [out / f"{name}.png", out / f"{name}.pdf"]
    for path in paths:
        figure.savefig(path, dpi=150)
    plt.close(figure)
    return paths
