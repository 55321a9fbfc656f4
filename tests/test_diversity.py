"""Diversity numbers agree with loops over tokens, and with texts whose answer is known."""

import csv
import importlib
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from commands import ROOT, launch

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import InputError
from kdhpc.experiment import arms
from kdhpc.pipeline import LANGUAGE
from kdhpc.science import diversity
from kdhpc.storage.run_folder import RunFolder
from kdhpc.storage.token_shards import Samples, read_samples


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("spread", [1, 40_000])
def test_ngrams_are_those_of_a_loop(n: int, spread: int) -> None:
    noise = np.random.default_rng(0)
    ids = (spread * noise.integers(0, 3, (50, 12))).astype(np.uint32)
    length = noise.integers(2, 13, 50)
    rows = [row[:stop].tolist() for row, stop in zip(ids, length, strict=True)]
    grams = [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in rows]
    everything = Counter(gram for row in grams for gram in row)
    total = sum(everything.values())
    assert diversity.has_repeat(ids, length, n).tolist() == [len(r) > len({*r}) for r in grams]
    assert diversity.distinct_share(ids, length, n) == len(everything) / total
    once = sum(count == 1 for count in everything.values())
    assert diversity.missing_mass(ids, length, n) == once / total


def test_missing_mass_estimates_what_has_not_been_seen() -> None:
    """For many symbols of equal probability the truth is known: (1 - 1/m)^n."""
    ids = np.random.default_rng(0).integers(0, 5000, (200, 20))
    length = np.full(200, 20)
    unseen = (1 - 1 / 5000) ** ids.size
    assert diversity.missing_mass(ids, length, 1) == pytest.approx(unseen, abs=0.02)


def test_sequences_shorter_than_an_ngram_have_none() -> None:
    ids, length = np.zeros((5, 3), np.uint16), np.full(5, 3)
    assert not diversity.has_repeat(ids, length).any()
    assert diversity.missing_mass(ids, length) == diversity.distinct_share(ids, length) == 0.0


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "analysis")
    return importlib.import_module("diversity")


def sets_of(script: ModuleType, **rows: list[list[int]]) -> dict[str, list[Any]]:
    """Return sets of sequences, two seeds of each but the truth's."""
    sets = {}
    for label, sequences in rows.items():
        length = np.array([len(row) for row in sequences], np.int32)
        ids = np.zeros((len(sequences), 12), np.uint16)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        unknown = np.full(len(sequences), np.nan)
        samples = Samples(ids=ids, length=length, log_prob_sum=unknown, log_prob_tau_sum=unknown)
        names = ["truth"] if label == "truth" else [f"s{seed}-{label}" for seed in range(2)]
        sets[label] = [script.SampleSet(samples=samples, rows=name) for name in names]
    return sets


def test_a_student_of_short_texts_hides_no_collapse_of_another(script: ModuleType) -> None:
    varied = [list(range(20 * row, 20 * row + 12)) for row in range(50)]
    sets = sets_of(script, truth=varied, direct=varied, short=[[1, 2]] * 50, same=[[7] * 12] * 50)
    decisions = {verdict.name: verdict.decision for verdict in script.collapse(sets, "small")}
    # Of texts of two tokens nothing is said, and nothing else is cut to them.
    assert decisions == {"collapse-direct": "holds", "collapse-same": "fails"}
    lengths = {one.samples.length.max() for of in sets.values() for one in script.matched(of)}
    assert lengths == {12, 2}


def test_samples_that_are_not_whole_are_left_out(
    tiny_run: Path, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "tiny")

    def labels() -> list[str]:
        assert script.main([str(run), "--out", str(tmp_path)]) == 0
        capsys.readouterr()
        with (tmp_path / "diversity.csv").open() as file:
            return [row["student"] for row in csv.DictReader(file)]

    assert labels() == ["truth", "truth again", "direct", "1", "0.6"]
    next((run / "6-sample-students" / "student-s0-small-tau0.6").glob("00000.*.arrow")).unlink()
    assert labels() == ["truth", "truth again", "direct", "1"]
    shutil.rmtree(run / "2-sample-truth" / "eval")
    with pytest.raises(InputError, match="truth's evaluation set is not whole"):
        script.main([str(run), "--out", str(tmp_path)])
    shutil.rmtree(run / "1-truth")
    with pytest.raises(InputError, match="no samples beside it"):
        script.main([str(run), "--out", str(tmp_path)])


def test_rows_of_a_run_that_has_grown_are_read_once(tmp_path: Path, script: ModuleType) -> None:
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", "until=sample-truth"]
    launch("sweep", *words)
    launch("sweep", *words, "sampling.eval_sequences=140")
    run_facts = importlib.import_module("report_run")
    config = presets.build(LanguageConfig, presets.compose(["tiny", "sampling.eval_sequences=140"]))
    records = RunFolder(tmp_path / "tiny", LANGUAGE.folders).scan().records
    facts = run_facts.RunFacts(config=config, records=records)
    names = [key.rpartition("/")[2] for key in records if key.startswith("sample-truth/eval/")]
    assert sorted(names) == ["00000", "00001", "00001-36", "00002-12"]
    assert [len(read_samples([r.data])) for r in facts.all_of(arms.TRUTH_EVAL)] == [64, 64, 12]


def test_repetition_compresses_and_resembles_itself() -> None:
    words = [f"w{i}" for i in np.random.default_rng(0).integers(0, 1000, 4000)]
    varied = [" ".join(words[i : i + 20]) for i in range(0, 4000, 20)]
    alike = [" ".join(words[:20])] * 200
    assert diversity.compression_ratio(alike) > 5 * diversity.compression_ratio(varied)
    assert diversity.self_bleu(alike[:20]) == pytest.approx(100.0)
    assert diversity.self_bleu(varied[:20]) < 10.0
