#!/usr/bin/env python
"""Check whether two commits make the same arrays on this machine, bit for bit.

python benchmarks/same_arrays.py OLD NEW [PRESET ...] [--keep DIR]

Each preset (tiny and demo by default) is run with the code of each commit, in local processes with
one thread. The script compares all arrays of results.h5, the columns of each arm's token shards,
however they are cut into shards, and the tensors of all models. Attributes and recipes may differ.
Files are read with h5py, pyarrow and safetensors alone, because modules of kdhpc move between
commits. With --keep, a run stays in DIR/COMMIT/PRESET and is not repeated once it has results. If
both commits are the same, it is run twice. The exit code is 1 if an array differs or exists on one
side only.
"""

import collections
import filecmp
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import tables
from safetensors import deserialize

GIT = ("git", "-C", str(Path(__file__).resolve().parents[1]))
RESULTS = "*-merge/results.h5"
"""Path of the results below a run's folder, for every pipeline."""
MOST_NAMES = 10
Array = tuple[str, tuple[int, ...], bytes]
"""Dtype, shape and content of an array."""


def main() -> int:
    """Make the missing runs and print one line per preset."""
    parser = tables.options(__doc__)
    parser.add_argument("old", metavar="OLD", help="a commit")
    parser.add_argument("new", metavar="NEW", help="a commit")
    parser.add_argument("presets", metavar="PRESET", nargs="*", default=["tiny", "demo"])
    parser.add_argument("--keep", metavar="DIR", type=Path, help="folder to keep the runs in")
    options = parser.parse_intermixed_args()
    old, new = commit_of(options.old), commit_of(options.new)
    any_differs = False
    with tempfile.TemporaryDirectory(prefix="same-arrays-") as temporary:
        home = (options.keep or Path(temporary)).resolve()
        folders = [home / old, home / (f"{new}-again" if new == old else new)]
        for preset in options.presets:
            for commit, folder in zip((old, new), folders, strict=True):
                make_run(commit, preset, folder)
            before, after = (arrays_of(folder / preset) for folder in folders)
            lines = differences(before, after)
            counts = collections.Counter(name.split("/")[0] for name in before | after)
            where = ", ".join(f"{folder} {count}" for folder, count in sorted(counts.items()))
            print(f"{preset}: {counts.total()} arrays ({where}), {len(lines)} differ", flush=True)
            for line in lines[:MOST_NAMES]:
                print(f"  {line}", flush=True)
            any_differs |= bool(lines)
    return int(any_differs)


def commit_of(name: str) -> str:
    """Return the full hash of a commit."""
    command = [*GIT, "rev-parse", "--verify", f"{name}^{{commit}}"]
    return subprocess.check_output(command, text=True).strip()


def make_run(commit: str, preset: str, folder: Path) -> None:
    """Run a preset with a commit's own code into a folder, unless its results are there."""
    with tempfile.TemporaryDirectory(prefix="same-arrays-") as tree:
        packed = subprocess.check_output([*GIT, "archive", commit])
        subprocess.run(["tar", "-x", "-C", tree], check=True, input=packed)
        if not list(folder.glob(f"{preset}/{RESULTS}")):
            print(f"{preset}: running {commit[:12]}", file=sys.stderr, flush=True)
            words = [preset, "cluster=local", f"runs_dir={folder}", f"name={preset}"]
            done = subprocess.run(
                [sys.executable, "launch/sweep.py", *words],
                cwd=tree,
                env=os.environ | {"PYTHONPATH": tree, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if done.returncode:
                raise SystemExit(f"{done.stdout}\n{commit[:12]}: {preset} failed")
        modules = [path.relative_to(tree) for path in Path(tree, "kdhpc").rglob("*.py")]
        # Check that the run used the commit's code and not an installed kdhpc.
        for snapshot in (folder / preset / "code").glob("[!.]*"):
            _, *other = filecmp.cmpfiles(tree, snapshot, modules, shallow=False)
            if any(other):
                raise SystemExit(
                    f"{snapshot}: not the code of {commit[:12]}; delete this run and try again"
                )


def arrays_of(run: Path) -> dict[str, Array]:
    """Return everything that is compared, by stage folder, arm and name."""
    [results] = run.glob(RESULTS)
    arrays: dict[str, Array] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            content = item[()].tobytes()
            arrays[f"{results.parent.name}/{name}"] = str(item.dtype), item.shape, content

    with h5py.File(results, "r", locking=False) as file:
        file.visititems(visit)
    shards: dict[Path, list[tuple[list[int], Path]]] = collections.defaultdict(list)
    for path in run.glob("[0-9]*-*/*/*.json"):
        record = json.loads(path.read_text())
        data = path.parent / record["data"]
        if data.suffix == ".arrow":
            shards[path.parent].append((record["row_range"], data))
        elif data.is_dir():
            model = path.relative_to(run).with_suffix("")
            arrays |= {f"{model}/{name}": tensor for name, tensor in tensors_of(data).items()}
    for arm, parts in shards.items():
        columns = columns_of([data for _, data in sorted(parts)])
        arrays |= {f"{arm.relative_to(run)}/{name}": column for name, column in columns.items()}
    return arrays


def columns_of(shards: list[Path]) -> dict[str, Array]:
    """Return the columns of token shards, concatenated in order."""
    table = pa.concat_tables([pa.ipc.open_stream(path.read_bytes()).read_all() for path in shards])
    columns: dict[str, Array] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        rows = pa.types.is_fixed_size_list(column.type)
        numbers = (column.flatten() if rows else column).to_numpy(zero_copy_only=True)
        columns[name] = str(column.type), (len(column),), numbers.tobytes()
    return columns


def tensors_of(model: Path) -> dict[str, Array]:
    """Return the tensors of a checkpoint folder by name."""
    return {
        name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        for path in model.glob("*.safetensors")
        for name, tensor in deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    }


def differences(old: Mapping[str, Array], new: Mapping[str, Array]) -> list[str]:
    """Return a line for every array that differs; NaN equals NaN if the bits are the same."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new or name not in old:
            lines.append(f"{name}: only in {'OLD' if name in old else 'NEW'}")
        elif old[name][:2] != new[name][:2]:
            lines.append(f"{name}: {old[name][:2]} -> {new[name][:2]}")
        elif old[name] != new[name]:
            before, after = (np.frombuffer(side[name][2], np.uint8) for side in (old, new))
            lines.append(f"{name}: {np.count_nonzero(before != after)} of {len(before)} bytes")
    return lines


if __name__ == "__main__":
    sys.exit(main())
