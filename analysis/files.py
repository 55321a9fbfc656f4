"""Functions that the analysis scripts share: read a run's results, write tables and figures."""

import argparse
import csv
import lzma
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure
from rich.table import Table

from kdhpc.cluster import archive, places
from kdhpc.errors import DamagedError, InputError
from kdhpc.pipeline import MIXTURE
from kdhpc.plan.stages import Pipeline
from kdhpc.storage.results import Results, read_results
from kdhpc.storage.run_folder import RESULTS

mpl.use("Agg")  # figures are written to files, so no display is needed


def parser(
    description: str | None, *, several: bool = False, writes: bool = True
) -> argparse.ArgumentParser:
    """Make a parser of the arguments that every analysis takes.

    Args:
        description: text of the help.
        several: whether several runs may be given; `run` is a list then.
        writes: whether the analysis writes files.
    """
    new_parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    new_parser.add_argument(
        "run",
        nargs="+" if several else None,
        help=f"a run's name or folder, its archive ({archive.SUFFIX}), or a file such as {RESULTS}",
    )
    if writes:
        new_parser.add_argument(
            "--out",
            type=Path,
            help=f"folder to write to (default: that of {RESULTS}; of an archive: ./NAME)",
        )
    new_parser.set_defaults(out=None)
    return new_parser


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The results of a run, and where their tables and figures go.

    Those of partial results have names of their own, so that they never replace those of complete
    results.
    """

    results: Results
    path: Path
    """File of the results."""
    out: Path
    """Folder to write to."""

    def titled(self, table: Table) -> Table:
        """Say in a table's title if the results are partial; return the table."""
        if not self.results.complete:
            table.title = f"partial results; {table.title}"
        return table

    def save_csv(self, rows: Sequence[Mapping[str, Any]], name: str) -> Path:
        """Write rows with all digits and a column for every key, as CSV and beside it as Parquet.

        Returns:
            The path of the CSV file.
        """
        path = self._named(f"{name}.csv")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        arrays = {column: _column([row.get(column) for row in rows]) for column in columns}
        pq.write_table(pa.table(arrays), path.with_suffix(".parquet"))
        return path

    def save_figure(self, figure: Figure, name: str) -> list[Path]:
        """Write a figure as PNG and PDF and close it; return both paths."""
        paths = [self._named(f"{name}.png"), self._named(f"{name}.pdf")]
        for path in paths:
            figure.savefig(path, dpi=150)
        plt.close(figure)
        return paths

    def save(self, content: bytes, file_name: str) -> Path:
        """Write a file; return its path."""
        path = self._named(file_name)
        path.write_bytes(content)
        return path

    def _named(self, file_name: str) -> Path:
        return self.out / (file_name if self.results.complete else f"partial-{file_name}")


def _column(values: Sequence[Any]) -> pa.Array:
    """Return a column of Parquet: numbers or truth values where there is nothing else, else text.

    A cell that is empty in CSV is null, but NaN is a number.
    """
    known = [None if value == "" else value for value in values]
    try:
        return pa.array(known)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # of several kinds, or huge
        return pa.array([None if value is None else str(value) for value in known])


def read_file(path: Path) -> Results:
    """Read a file of results, or one that `analysis/archive.py` has compressed.

    Raises:
        DamagedError: if it cannot be read.
    """
    if path.suffix != ".xz":
        return read_results(path)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.stem
        try:
            plain.write_bytes(lzma.decompress(path.read_bytes()))
        except lzma.LZMAError as error:
            raise DamagedError(
                f"{path}: not a whole xz file ({error}); fetch or archive it again"
            ) from error
        try:
            return read_results(plain)  # its arrays are mapped, and stay when the name is gone
        except DamagedError as error:
            raise DamagedError(str(error).replace(str(plain), str(path))) from error


def read(options: argparse.Namespace, pipeline: Pipeline[Any]) -> Analysis:
    """Read the results of a run.

    Args:
        options: arguments that were parsed by `parser`.
        pipeline: the pipeline that made the run.

    Returns:
        The results, and the folder to write to, which exists.

    Raises:
        InputError: if there is no such run or it has no results, they are those of another
            pipeline, or the folder to write to cannot be made.
        DamagedError: if the results cannot be read.
    """
    path, beside = Path(options.run), None
    if options.run.endswith(archive.SUFFIX):
        path, beside = archive.unpack_until_exit(path), Path(path.name.removesuffix(archive.SUFFIX))
    elif os.sep not in options.run and not path.exists():
        path = places.locate(options.run)
    if path.is_dir():
        path = path / pipeline.folders["merge"] / RESULTS
    if not path.is_file():
        raise InputError(
            f"{path}: no results here; expected the file that a run writes at its end, so let "
            "launch/sweep.py finish it"
        )
    results = read_file(path)
    if bool(results.tables) != (pipeline is MIXTURE):
        raise InputError(
            f"{path}: results of another pipeline; expected those of {pipeline.name}, use the "
            "other analysis script"
        )
    if not results.complete:
        print("warning: some planned shards are missing from these results", file=sys.stderr)
    out = folder_to_write(options, beside or path.parent)
    return Analysis(results=results, path=path, out=out)


def folder_to_write(options: argparse.Namespace, beside: Path) -> Path:
    """Return the folder to write to, which is made: `--out`, or another one.

    Args:
        options: arguments that were parsed by `parser`.
        beside: folder to write to without `--out`.

    Raises:
        InputError: if it cannot be made.
    """
    out: Path = options.out or beside
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{out}: cannot be made ({error.strerror}); expected a folder to write to"
        ) from error
    return out
