"""The analysis of a partial merge shows what is there and says what is not."""

import csv
import importlib
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import ROOT, launch

from kdhpc.storage.results import ScorePieces, read_results, write_results


def partial(
    path: Path, students: Sequence[tuple[int, float]], unscored: Sequence[tuple[str, str]] = ()
) -> Path:
    """Write a partial merge of students, given as seed and tau, with all scores but some pairs."""
    models = {
        f"student-s{seed}-small-tau{tau:g}": {
            "kind": "student",
            "seed": seed,
            "size": "small",
            "arm": f"tau{tau:g}",
            "tau": tau,
        }
        for seed, tau in students
    }
    pairs = [pair for name in models for pair in ((name, "truth"), ("truth", name))]
    scores = [
        ScorePieces(
            sampler=sampler,
            scorer=scorer,
            num_rows=4,
            pieces=[
                ("log_prob_sum", -np.arange(4.0) - 1),
                ("num_tokens", np.ones(4, np.int32)),
            ],
        )
        for sampler, scorer in sorted(pairs)
        if (sampler, scorer) not in unscored
    ]
    models["teacher-s0"] = {"kind": "teacher"}
    write_results(path, recipe="r", provenance={}, scores=scores, models=models, complete=False)
    return path


def analyse(path: Path | str, cwd: Path = ROOT, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "analysis" / "precision_recall.py", path, *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_students_without_both_scores_are_left_out_and_counted(tmp_path: Path) -> None:
    students = [(0, 1.0), (0, 0.8), (0, 0.6)]
    no_recall, no_precision = "student-s0-small-tau0.8", "student-s0-small-tau0.6"
    path = partial(
        tmp_path / "partial.h5", students, [("truth", no_recall), (no_precision, "truth")]
    )
    done = analyse(path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("partial results; nats per token")
    assert "2 of 3 trained students are left out" in done.stdout
    assert no_recall in done.stdout
    assert no_precision in done.stdout
    with (tmp_path / "partial-precision_recall.csv").open() as file:
        assert [row["tau"] for row in csv.DictReader(file)] == ["1"]


def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    path = partial(tmp_path / "partial.h5", [(0, 1.0)])
    for out in (path, path / "below"):
        refused = analyse(path, ROOT, "--out", str(out))
        assert refused.returncode == 2, refused.stderr
        assert f"error: {out}: cannot be made" in refused.stderr
        assert refused.stderr.count("\n") == 2  # the other one says that results are partial


@pytest.mark.parametrize("num_trained", [0, 1])
def test_without_a_scored_student_one_line_says_what_to_do(
    num_trained: int, tmp_path: Path
) -> None:
    missing = [("truth", "student-s0-small-tau1")]
    path = partial(tmp_path / "partial.h5", [(0, 1.0)][:num_trained], missing)
    refused = analyse(path)
    assert refused.returncode == 2, refused.stderr
    [error] = [line for line in refused.stderr.splitlines() if not line.startswith("warning:")]
    assert error.startswith(f"error: {path}: no student has both of its scores")
    assert f"({num_trained} are trained)" in error
    assert "launch/sweep.py" in error
    assert list(tmp_path.iterdir()) == [path]


def test_a_student_with_one_seed_is_drawn_beside_means_and_in_the_order_of_tau(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "analysis")
    analysis = importlib.import_module("precision_recall")
    students = [(0, 1.0), (0, 0.6), (1, 1.0), (1, 0.8), (1, 0.6), (0, 0.4)]
    results = read_results(partial(tmp_path / "partial.h5", students))
    rows = analysis.rows(analysis.Study(results))
    assert [(row.seed, row.tau) for row in rows if row.seed == "all"] == [
        ("all", "1"),
        ("all", "0.6"),
    ]
    [axes] = analysis.draw(rows).axes
    assert [text.get_text() for text in axes.texts] == ["τ=1", "τ=0.8", "τ=0.6", "τ=0.4"]


def test_a_run_is_analysed_by_name_folder_or_file_and_a_partial_look_replaces_nothing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # where `tiny_run` is not noted
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(tiny_run, run)
    merged = run / "8-merge"
    whole = [merged / f"precision_recall.{suffix}" for suffix in ("csv", "png", "pdf")]
    printed = {analyse(name, tmp_path).stdout for name in ("tiny", run, merged / "results.h5")}
    assert len(printed) == 1
    assert str(whole[0]) in printed.pop()
    before = [path.read_bytes() for path in whole]
    shutil.rmtree(run / "7-score" / "truth-under-teacher-s0")
    launch("rerun", str(run), "--partial")
    shown = analyse(merged / "partial.h5")
    assert shown.stdout.splitlines()[0].startswith("partial results;"), shown.stderr
    assert [path.read_bytes() for path in whole] == before
    assert all(path.with_name(f"partial-{path.name}").stat().st_size for path in whole)
    refused = analyse("tinny", tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == (
        "error: tinny: no run of this name in runs/ or noted elsewhere; expected one of tiny\n"
    )


def test_the_parquet_beside_a_csv_holds_equal_values(tmp_path: Path) -> None:
    rows = [
        {"student": "direct", "tau": 1, "mean": np.float64(-3.25), "low": math.nan, "known": True},
        {"student": "tau0.8", "tau": 0.8, "mean": 1e-17, "note": "x", "known": False},
        {"student": "", "tau": "", "mean": -math.inf, "low": 1.5, "mixed": 1},
        {"student": "a,b", "tau": 2, "mean": 0.1 + 0.2, "low": "", "mixed": "one"},
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analysis"))
        files = importlib.import_module("files")
    results = read_results(partial(tmp_path / "results.h5", [(0, 1.0)]))
    analysis = files.Analysis(results=results, path=tmp_path / "results.h5", out=tmp_path)
    path = analysis.save_csv(rows, "table")
    assert path.name == "partial-table.csv"
    table = pq.read_table(path.with_suffix(".parquet"))
    with path.open() as file:
        in_csv = list(csv.DictReader(file))
    assert table.column_names == list(in_csv[0])
    assert table.num_rows == len(in_csv) == 4
    for from_csv, from_parquet in zip(in_csv, table.to_pylist(), strict=True):
        for column, text in from_csv.items():
            value = from_parquet[column]
            if isinstance(value, float):
                assert math.isnan(value) == math.isnan(float(text))
                assert math.isnan(value) or value == float(text)
            else:
                assert text == ("" if value is None else str(value))
    assert str(table.schema.field("mean").type) == "double"
    assert str(table.schema.field("known").type) == "bool"
    assert str(table.schema.field("mixed").type) == "string"
