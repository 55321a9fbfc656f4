"""The pipeline of docs/own-pipeline.md, and a copy of the project without the experiment."""

import re
import shutil
from collections import Counter
from pathlib import Path

from commands import ROOT

from kdhpc.storage.results import read_results

EXPERIMENT = ("experiment", "pipeline.py", "models", "sampling", "scoring", "training", "science")
"""Modules and packages that the batch system must not need."""


def project_without_experiment(folder: Path) -> Path:
    """Copy the launch scripts, kdhpc, configs and slurm/, but nothing of the experiment."""
    for name in ("launch", "kdhpc", "configs", "slurm"):
        ignore = shutil.ignore_patterns("__pycache__", *(EXPERIMENT if name == "kdhpc" else ()))
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


def write_pipeline(folder: Path) -> None:
    """Write the code of the page to word_counts.py, unchanged."""
    page = (ROOT / "docs" / "own-pipeline.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (folder / "word_counts.py").write_text(code)


def write_texts(folder: Path) -> list[Path]:
    texts = {
        "one": "a rose is a rose\n",
        "two": "is a rose a flower\n",
        "three": "yes it is a rosé · naïve\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return [folder / f"{name}.txt" for name in texts]


def words(runs_dir: Path, *files: Path) -> list[str]:
    """Return the words that are typed after `sweep.py`."""
    names = ",".join(map(str, files))
    return [
        "pipeline=word_counts:PIPELINE",
        "name=words",
        f"runs_dir={runs_dir}",
        f"files=[{names}]",
    ]


def assert_counted(run: Path, *files: Path) -> None:
    """Check that the merged table holds what Python counts."""
    table = read_results(run / "2-add" / "results.h5").tables["words"]
    merged_counts = dict(zip(table["word"].tolist(), table["count"].tolist(), strict=True))
    text = " ".join(file.read_text() for file in files)
    assert merged_counts == {word.encode(): count for word, count in Counter(text.split()).items()}
