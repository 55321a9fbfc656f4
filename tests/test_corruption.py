"""One token of each of truth's samples is damaged, the same in every shard, and models notice."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import launch, status
from test_decode_temperatures import model_of, oracle

from kdhpc.scoring.corruption import corrupt
from kdhpc.scoring.counting import Counting
from kdhpc.storage.results import read_results
from kdhpc.storage.token_shards import Samples, read_samples
from kdhpc.types import Corruption

DIRECT = "student-s0-small-direct"
COUNTING = Counting(num_prompt=2, eos=0, count_eos=True)


def some_samples() -> Samples:
    ids = np.random.default_rng(0).integers(1, 50, (60, 12)).astype(np.uint16)
    length = np.full(60, 12, np.int32)
    for row in range(30):  # half of them end, some at once
        length[row] = 3 + row % 9
        ids[row, length[row] - 1 :] = 0
    zeros = np.zeros(60)
    return Samples(ids=ids, length=length, log_prob_sum=zeros, log_prob_tau_sum=zeros)


@pytest.mark.parametrize("kind", ["swap", "drop", "repeat"])
def test_one_token_between_prompt_and_end_is_changed(kind: Corruption) -> None:
    samples = some_samples()
    changed = corrupt(samples, kind, seed=0, rows=range(60), counting=COUNTING)
    kept = corrupt(samples[20:], kind, seed=0, rows=range(20, 60), counting=COUNTING)
    assert np.array_equal(changed.ids[20:], kept.ids)
    places = set()
    for row in range(60):
        old = samples.ids[row, : samples.length[row]].tolist()
        new = changed.ids[row, : changed.length[row]].tolist()
        end = [0] if old[-1] == 0 else []
        old_text, new_text = old[2 : len(old) - len(end)], new[2 : len(new) - len(end)]
        assert new[:2] == old[:2]
        assert new[len(new) - len(end) :] == end
        if len(old_text) < 2:
            assert new == old
        elif kind == "swap":
            assert sorted(new_text) == sorted(old_text)
            assert sum(a != b for a, b in zip(old_text, new_text, strict=True)) in {0, 2}
        elif kind == "drop":
            assert new_text in [old_text[:i] + old_text[i + 1 :] for i in range(len(old_text))]
        else:
            full = [old_text[: i + 1] + old_text[i:] for i in range(len(old_text))]
            assert new_text in [text[: len(new_text)] for text in full]
        if len(old) == 12:
            places |= {i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b}
    assert len(places) >= 9


def test_every_model_scores_damaged_samples_and_finds_them_less_likely(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "tiny")
    words = ["tiny", "cluster=local", f"runs_dir={tmp_path}", "scoring.corruptions=[swap]"]
    launch("sweep", *words, "scoring.expected=true")
    assert status(run, code=0)["complete"]
    scores = read_results(run / "8-merge" / "results.h5").scores
    for sampler, other in (("student-s0-small-tau0.6", "truth"), ("truth", DIRECT)):
        averaged = scores[sampler, f"{other}-expected"].divergence_sum
        drawn = scores[sampler, "self"].log_prob_sum - scores[sampler, other].log_prob_sum
        assert averaged is not None
        difference = averaged - drawn  # of the same sequences
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        assert abs(difference.mean()) < 4.5 * error
        assert averaged.mean() > 0.0
    scorers = {scorer for sampler, scorer in scores if sampler == "truth-swap"}
    assert scorers == {"truth", "teacher-s0"} | {
        f"student-s0-small-{arm}" for arm in ("direct", "tau1", "tau0.6")
    }
    whole, damaged = scores["truth", "self"], scores["truth-swap", "truth"]
    assert damaged.log_prob_sum.sum() < whole.log_prob_sum.sum()
    truth = read_samples(sorted((run / "2-sample-truth" / "eval").glob("*.arrow")))
    counting = Counting(num_prompt=3, eos=0, count_eos=True)
    changed = corrupt(truth, "swap", seed=0, rows=range(len(truth)), counting=counting)
    exact = oracle(model_of(run, "1-truth", "truth"), changed, 1.0).sum(1)
    assert np.abs(damaged.log_prob_sum - exact).max() < 1e-4
