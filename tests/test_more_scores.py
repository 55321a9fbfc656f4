"""Scores that a finished run may gain: temperatures, damaged samples, averages, end tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, launch
from models_for_tests import llama_of, small_model
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.experiment import arms
from kdhpc.pipeline import LANGUAGE
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.corruption import corrupt
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.scorer import score
from kdhpc.selection import Selection
from kdhpc.storage.results import read_results
from kdhpc.storage.token_shards import Samples, read_samples

DIRECT = "student-s0-small-direct"
PROMPT = 3
"""Number of bytes of the prompt of `tiny`."""


def oracle(path: Path, samples: Samples, temperature: float) -> NDArray[np.float64]:
    """Return log-probabilities [N, L - prompt] of a float64 loop; 0 beyond the end of a row."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    ids = torch.from_numpy(samples.ids.astype(np.int64))
    with torch.inference_mode():
        log_p = (model(ids).logits / temperature).log_softmax(-1)
    picked = log_p[:, PROMPT - 1 : -1].gather(2, ids[:, PROMPT:, None])[..., 0].numpy()
    drawn = np.arange(PROMPT, ids.shape[1]) < samples.length[:, None]
    return np.where(drawn, picked, 0.0)


def model_of(run: Path, stage: str, name: str) -> Path:
    record = json.loads((run / stage / name / "00000.json").read_text())
    return run / stage / name / str(record["data"])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_end_tokens_are_kept_apart_whether_they_count_or_not(temperature: float) -> None:
    torch.set_num_threads(1)
    model = llama_of(small_model(12, 24))
    parts = []
    for count_eos in (True, False):
        counting = Counting(num_prompt=2, eos=0, other_ends=(5,), count_eos=count_eos)
        sampler = Sampler(
            model, prompts=[Prompt(ids=(2, 0))], length=24, batch_rows=64, draw="inverse_cdf",
            selection=Selection(tau=temperature), counting=counting, per_token=True,
        )  # fmt: skip
        samples = sample(sampler, rows=range(100), seed=0, stream="test")
        scores = score(
            model, samples, counting=counting, batch_rows=32, head_tokens=100, per_token=True,
            temperatures=tuple({1.0, temperature}),
        )  # fmt: skip
        parts.append((samples, scores))
    (learn, learnt), (mask, masked) = parts
    assert np.array_equal(learn.ids, mask.ids)
    ended = learn.length < 24
    assert 50 < ended.sum() < 100
    for samples, scores in parts:
        [at_one, at_tau] = [scores[t] for t in (1.0, temperature)]
        for mine, own in ((at_one, samples.end_log_prob), (at_tau, samples.end_log_prob_tau)):
            assert mine.end_log_prob is not None
            assert own is not None
            assert (mine.end_log_prob[ended] < 0).all()
            assert np.allclose(mine.end_log_prob, own, atol=1e-5)
        tokens, own_tokens = at_tau.token_log_prob, samples.token_log_prob_tau
        assert tokens is not None
        assert own_tokens is not None
        assert np.allclose(tokens, own_tokens, atol=1e-5, equal_nan=True)
        assert np.allclose(np.nansum(own_tokens, 1), samples.log_prob_tau_sum, atol=1e-4)
        assert np.array_equal((~np.isnan(own_tokens)).sum(1), at_tau.num_tokens)
    # Ending is all that the two policies disagree about.
    last = {t: learnt[t].log_prob_sum - masked[t].log_prob_sum for t in learnt}
    for t, difference in last.items():
        expected = masked[t].end_log_prob
        assert expected is not None
        assert np.allclose(difference, expected, atol=1e-9)


def test_a_finished_run_gains_temperatures_and_keeps_what_it_has(
    extended_run: tuple[Path, set[str]],
) -> None:
    run, new = extended_run
    new = {name for name in new if "expected" not in name and "swap" not in name}
    direct, one, sharp = (f"student-s0-small-{arm}" for arm in ("direct", "tau1", "tau0.6"))
    samplers = {f"{direct}-T0.7", f"{direct}-T1.3", f"{one}-T0.7", f"{one}-T1.3", f"{sharp}-T1.3"}
    recalls = {f"truth-under-{name}-T1.3-0.7" for name in (direct, one, sharp)}
    assert new == samplers | {f"{name}-under-truth" for name in samplers} | recalls | {
        "truth-under-teacher-s0-T1.3-0.7-0.6"
    }
    results = read_results(run / "8-merge" / "results.h5")
    truth = read_samples(sorted((run / "2-sample-truth" / "eval").glob("*.arrow")))
    for name, stage, temperatures in (
        (direct, "3-train-on-truth", (1.0, 0.7, 1.3)),
        (sharp, "5-train-students", (1.0, 0.7, 1.3)),
        ("teacher-s0", "3-train-on-truth", (0.6,)),
    ):
        for temperature in temperatures:
            scores = results.scores["truth", arms.at_temperature(name, temperature)]
            expected = oracle(model_of(run, stage, name), truth, temperature)
            assert np.abs(scores.log_prob_sum - expected.sum(1)).max() < 1e-4
    path = model_of(run, "3-train-on-truth", direct)
    drawn = read_samples(sorted((run / "6-sample-students" / f"{direct}-T0.7").glob("*.arrow")))
    own = results.scores[f"{direct}-T0.7", "self"]
    assert np.abs(own.log_prob_sum - oracle(path, drawn, 0.7).sum(1)).max() < 1e-4
    assert own.token_log_prob is not None
    launch("verify", str(run))
    rows = (line.split("|") for line in (ROOT / "docs" / "results.md").read_text().splitlines())
    documented = {
        row[1].strip(" `"): (row[2].strip(), row[3].strip()) for row in rows if len(row) == 6
    }
    for scores in results.scores.values():
        assert len(scores.arrays()) == 3 + (scores.token_log_prob is not None)
        for array, values in scores.arrays().items():
            shape = f"[{', '.join('NL'[: values.ndim])}]"
            assert documented[array] == (str(values.dtype), shape)


def test_scores_averaged_over_the_next_token_have_the_mean_of_the_others(
    extended_run: tuple[Path, set[str]],
) -> None:
    run, new = extended_run
    scores = read_results(run / "8-merge" / "results.h5").scores
    itself = scores["truth", "truth-expected"]
    assert itself.divergence_sum is not None
    assert itself.token_log_prob is not None
    assert np.abs(itself.divergence_sum).max() < 1e-4
    entropy = -np.nansum(itself.token_log_prob, axis=1)
    assert (entropy > 0).all()
    assert entropy.mean() == pytest.approx(-scores["truth", "self"].log_prob_sum.mean(), rel=0.05)
    for sampler, other in (("student-s0-small-tau0.6", "truth"), ("truth", DIRECT)):
        assert f"{sampler}-under-{other}-expected" in new
        averaged = scores[sampler, f"{other}-expected"].divergence_sum
        drawn = scores[sampler, "self"].log_prob_sum - scores[sampler, other].log_prob_sum
        assert averaged is not None
        difference = averaged - drawn  # of the same sequences
        error = difference.std(ddof=1) / np.sqrt(len(difference))
        assert abs(difference.mean()) < 4.5 * error
        assert averaged.mean() > 0.0


def test_every_model_scores_damaged_samples(extended_run: tuple[Path, set[str]]) -> None:
    run, _ = extended_run
    scores = read_results(run / "8-merge" / "results.h5").scores
    scorers = {scorer for sampler, scorer in scores if sampler == "truth-swap"}
    assert scorers == {"truth", "teacher-s0"} | {
        f"student-s0-small-{arm}" for arm in ("direct", "tau1", "tau0.6")
    }
    whole, damaged = scores["truth", "self"], scores["truth-swap", "truth"]
    assert damaged.log_prob_sum.sum() < whole.log_prob_sum.sum()
    truth = read_samples(sorted((run / "2-sample-truth" / "eval").glob("*.arrow")))
    counting = Counting(num_prompt=PROMPT, eos=0, count_eos=True)
    changed = corrupt(truth, "swap", seed=0, rows=range(len(truth)), counting=counting)
    exact = oracle(model_of(run, "1-truth", "truth"), changed, 1.0).sum(1)
    assert np.abs(damaged.log_prob_sum - exact).max() < 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode_temperatures=[1.0]"], "1 is always scored"),
        (["decode_temperatures=[1.0000001]"], "1 is always scored"),
        (["decode_temperatures=[0.7,0.7]"], "duplicate decode_temperature 0.7"),
        (["decode_temperatures=[0]"], "decode_temperatures"),
    ],
)
def test_temperatures_that_cannot_be_are_refused_in_one_line(
    words: list[str], message: str
) -> None:
    refused = launch("sweep", "tiny", "cluster=local", *words, code=2)
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_truncated_teachers_and_sharp_students_have_only_the_mirror() -> None:
    words = ["tiny", "decode_temperatures=[0.5,1.5]", "sampling.truncations=[top_k=5]"]
    config = presets.build(LanguageConfig, presets.compose(words))
    names = {s.arm for s in arms.sample_sets(config) if s.arm.endswith(("T0.5", "T1.5"))}
    assert names == {
        "student-s0-small-direct-T0.5", "student-s0-small-direct-T1.5",
        "student-s0-small-tau1-T0.5", "student-s0-small-tau1-T1.5",
        "student-s0-small-tau0.6-T1.5", "student-s0-small-topk5-T1.5",
    }  # fmt: skip


def test_a_seed_is_the_same_in_a_run_that_starts_with_it() -> None:
    words = ["tiny", "decode_temperatures=[0.5]"]
    both, second = (
        LANGUAGE.plan(presets.build(LanguageConfig, presets.compose([*words, *more]))).shards
        for more in (["seeds=2"], ["first_seed=1"])
    )
    merged = {key for key in both if key.startswith("merge/")}
    of_first = {key for key in both if "s0" in key}
    assert of_first
    assert {key for key in second if not key.startswith("merge/")} == {*both} - of_first - merged
    assert all(both[key].recipe == shard.recipe for key, shard in second.items() if key in both)
