"""The whole demo shows the effect and writes its files."""

import csv
import subprocess
import sys
from pathlib import Path

from commands import ROOT, launch


def test_precision_rises_in_the_demo_and_its_table_has_every_seed_and_their_means(
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
        rows = [*csv.DictReader(file)]
    labels = ["direct", "1", "0.8", "0.6"]
    seeds = [row["seed"] for row in rows]
    assert seeds == [seed for seed in "0123" for _ in labels] + ["all"] * 4
    assert [row["tau"] for row in rows] == labels * 5
    pooled = {row["tau"]: row for row in rows if row["seed"] == "all"}
    precision = {tau: float(row["precision"]) for tau, row in pooled.items()}
    assert precision["1"] < precision["0.8"] < precision["0.6"]
    assert float(pooled["0.6"]["precision_low"]) > float(pooled["direct"]["precision_high"])
