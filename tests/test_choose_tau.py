"""The tau that is chosen is the best of the sweep, and the regret is what a prediction loses."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT
from test_verdicts import changed

from kdhpc.errors import InputError
from kdhpc.storage.results import ScorePieces, write_results

POINTS = {1.0: (-3.0, -2.5), 0.8: (-2.5, -2.54), 0.6: (-2.0, -3.0)}
"""Precision and recall of the students by tau."""


def results_of(path: Path, teacher: dict[float, tuple[float, float]], seeds: int = 2) -> Path:
    """Write results of students at POINTS, and of teachers at these points, without noise."""
    scores: dict[tuple[str, str], float] = {}
    models = {}
    for seed in range(seeds):
        for tau, (precision, recall) in POINTS.items():
            name = f"student-s{seed}-small-tau{tau:g}"
            models[name] = {
                "kind": "student", "seed": seed, "size": "small", "arm": f"tau{tau:g}", "tau": tau,
            }  # fmt: skip
            scores[name, "truth"], scores["truth", name] = precision, recall
            scores[name, "judge"] = -tau
        for tau, (precision, recall) in teacher.items():
            scores[f"teacher-s{seed}-tau{tau:g}", "truth"] = precision
            scores["truth", f"teacher-s{seed}" + (f"-T{tau:g}" if tau != 1 else "")] = recall
    counts = np.full(5, 10, np.int32)
    parts = [
        ScorePieces(
            sampler=sampler,
            scorer=scorer,
            num_rows=5,
            pieces=[("log_prob_sum", np.full(5, 10 * mean)), ("num_tokens", counts)],
        )
        for (sampler, scorer), mean in scores.items()
    ]
    write_results(path, recipe="r", provenance={}, scores=parts, models=models)
    return path


Choose = Callable[..., str]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Choose:
    """Return a function that runs the script and returns what it prints."""
    monkeypatch.syspath_prepend(ROOT / "analysis")
    script = importlib.import_module("choose_tau")

    def run(path: Path, *words: str) -> str:
        assert script.main([str(path), *words]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("words", "tau"),
    [
        (["--recall-loss", "0.05"], "0.8"),
        (["--recall-loss", "0.01"], "1"),
        (["--recall-loss", "1"], "0.6"),
        (["--precision", "-2.6"], "0.8"),
        (["--weight", "0.1"], "0.6"),
        (["--weight", "20"], "1"),
        (["--metric", "judge"], "0.6"),
    ],
)
def test_the_best_tau_of_a_sweep_is_chosen(
    words: list[str], tau: str, tmp_path: Path, choose: Choose
) -> None:
    said = choose(results_of(tmp_path / "r.h5", POINTS), *words)
    assert f"small: tau {tau}; against tau 1" in said
    assert f"seed by seed: tau {tau} in 2 of 2" in said
    if "--metric" not in words:  # students equal their teachers, so the prediction is right
        assert f"pilot of seed 0: tau {tau}; regret over the other seeds 0.000" in said


def test_a_wrong_prediction_has_a_regret(tmp_path: Path, choose: Choose) -> None:
    """These teachers lose no recall at 0.6, so 0.6 looks best and costs 0.4 more nats than 0.8."""
    path = results_of(tmp_path / "r.h5", POINTS | {0.6: (-2.0, -2.5)})
    said = choose(path, "--weight", "2")
    assert "small: tau 0.8;" in said
    assert "pilot of seed 0: tau 0.6; regret over the other seeds 0.420" in said
    assert "there, the predicted tau is not allowed" in choose(path, "--recall-loss", "0.1")


def test_without_a_seed_of_all_taus_nothing_is_chosen(tmp_path: Path, choose: Choose) -> None:
    def lack(pair: tuple[str, str], arrays: dict[str, Any]) -> None:
        if pair[0] in ("student-s0-small-tau1", "student-s1-small-tau0.6"):
            arrays["log_prob_sum"][0] = np.nan

    path = changed(results_of(tmp_path / "r.h5", POINTS), tmp_path / "s.h5", lack)
    said = choose(path, "--weight", "1")
    assert "2 of 6 trained students are left out" in said
    assert "small: no seed has its students of all taus; nothing is chosen" in said


def test_a_size_without_students_of_tau_1_is_said(tmp_path: Path, choose: Choose) -> None:
    def none(pair: tuple[str, str], arrays: dict[str, Any]) -> None:
        if pair[0].endswith("tau1"):
            arrays["log_prob_sum"][0] = np.nan

    path = changed(results_of(tmp_path / "r.h5", POINTS), tmp_path / "s.h5", none)
    with pytest.raises(InputError, match="no students of tau 1 with both of their scores"):
        choose(path, "--weight", "1")


def test_what_no_tau_reaches_and_what_is_not_there_is_said(tmp_path: Path, choose: Choose) -> None:
    path = results_of(tmp_path / "r.h5", {})
    said = choose(path, "--precision", "-1")
    assert "small: no tau of this sweep is allowed" in said
    assert "predicted: needs teachers that are scored at each tau" in said
    for words in (["--weight", "nan"], ["--recall-loss", "inf"], ["--weight", "1", "--out", "x"]):
        with pytest.raises(SystemExit, match="2"):
            choose(path, *words)
    with pytest.raises(InputError, match="has no such score; expected one of judge, truth"):
        choose(path, "--metric", "other")
