"""The whole demo shows the effect and writes its files."""

import csv
import subprocess
import sys
from pathlib import Path

from commands import ROOT, launch


def test_precision_rises_and_recall_falls_as_the_teacher_gets_more_selective(
    tmp_path: Path,
) -> None:
    launch("sweep", "demo", "cluster=local", f"runs_dir={tmp_path}")
    finished = subprocess.run(
        [sys.executable, str(ROOT / "analysis/precision_recall.py"), str(tmp_path / "demo")],
        capture_output=True,
        text=True,
        check=True,
    )
    for suffix in ("results.h5", "precision_recall.csv", ".png", ".pdf"):
        [named] = [line for line in finished.stdout.splitlines() if line.endswith(suffix)]
        assert Path(named).stat().st_size > 0
    with (tmp_path / "demo/8-merge/precision_recall.csv").open() as file:
        rows = {row["tau"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["direct", "1", "0.95", "0.875", "0.8", "0.6"]
    plain, selective = rows["1"], rows["0.6"]
    assert float(selective["precision_low"]) > float(plain["precision_high"])
    assert float(selective["recall_high"]) < float(plain["recall_low"])
    precision = [float(rows[tau]["precision"]) for tau in ("1", "0.95", "0.875", "0.8", "0.6")]
    assert precision == sorted(precision)
