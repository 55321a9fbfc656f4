"""Divergences and curves agree with an enumeration of every sequence of a small vocabulary."""

import itertools

import numpy as np
import pytest
import torch
from models_for_tests import llama_of, small_model
from numpy.typing import NDArray

from kdhpc.models.dense import Dense
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.science.curves import precision_terms, prefix_log_prob, recall_terms
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.expected import score_expected
from kdhpc.scoring.scorer import score
from kdhpc.selection import Selection
from kdhpc.storage.score_shards import Scores
from kdhpc.storage.token_shards import Samples

VOCAB, NEW, NUM_SAMPLES = 6, 4, 20_000
LOG_FACTORS = np.log([0.25, 1.0, 2.0])
Numbers = NDArray[np.float64]


def every_sequence() -> list[tuple[int, ...]]:
    """Return all sequences of at most NEW tokens that end with id 0 or are full."""
    sequences = []
    for drawn in itertools.product(range(VOCAB), repeat=NEW):
        cut = drawn[: drawn.index(0) + 1] if 0 in drawn else drawn
        sequences.append(cut)
    return sorted(set(sequences))


def log_probs_of(model: Dense, sequences: list[tuple[int, ...]], temperature: float) -> Numbers:
    """Return the log-probabilities [N, NEW] of drawn tokens, 0 beyond the end, without `score`."""
    ids = torch.zeros((len(sequences), 1 + NEW), dtype=torch.int64)
    ids[:, 0] = 1
    for row, sequence in enumerate(sequences):
        ids[row, 1 : 1 + len(sequence)] = torch.tensor(sequence)
    log_p = (model.head(model.hidden(ids)) / temperature).double().log_softmax(-1)
    picked = log_p[:, :-1].gather(2, ids[:, 1:, None])[..., 0].numpy()
    inside = np.arange(NEW) < np.array([len(sequence) for sequence in sequences])[:, None]
    return np.where(inside, picked, 0.0)


@pytest.fixture(scope="module")
def models() -> tuple[Dense, Dense]:
    return tuple(llama_of(small_model(VOCAB, 1 + NEW, seed=seed)) for seed in (1, 2))  # type: ignore[return-value]  # two of them


def draw_and_score(
    models: tuple[Dense, Dense], count_eos: bool, temperature: float
) -> tuple[Samples, Scores]:
    """Sample the first model at a temperature and score its samples under the second."""
    counting = Counting(num_prompt=1, eos=0, count_eos=count_eos)
    sampler = Sampler(
        models[0], prompts=[Prompt(ids=(1,))], length=1 + NEW, batch_rows=5000, draw="inverse_cdf",
        selection=Selection(tau=temperature), counting=counting, per_token=True,
    )  # fmt: skip
    samples = sample(sampler, rows=range(NUM_SAMPLES), seed=3, stream=f"{temperature}")
    scores = score(
        models[1], samples, counting=counting, batch_rows=5000, head_tokens=5000, per_token=True
    )
    return samples, scores[1.0]


def close(values: Numbers, exact: float) -> bool:
    """Return whether the mean of values [N] is within 4.5 standard errors of an exact value."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return bool(abs(values.mean() - exact) < 4.5 * error + 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("count_eos", [True, False])
def test_divergences_and_curves_are_those_of_the_enumeration(
    models: tuple[Dense, Dense], count_eos: bool, temperature: float
) -> None:
    with torch.inference_mode():
        p = log_probs_of(models[0], every_sequence(), temperature)
        q = log_probs_of(models[1], every_sequence(), 1.0)
    weight = np.exp(p.sum(1))
    assert abs(weight.sum() - 1) < 1e-5
    samples, scores = draw_and_score(models, count_eos, temperature)
    own, under = samples.log_prob_tau_sum, scores.log_prob_sum
    own_end, end = samples.end_log_prob_tau, scores.end_log_prob
    own_tokens, tokens = samples.token_log_prob_tau, scores.token_log_prob
    assert own_end is not None
    assert end is not None
    assert own_tokens is not None
    assert tokens is not None
    # Precision is less the sampler's own log-probability by a divergence, if all tokens are there.
    whole_own, whole = (own, under) if count_eos else (own + own_end, under + end)
    assert close(whole_own, float(weight @ p.sum(1)))
    assert close(whole_own - whole, float(weight @ (p - q).sum(1)))
    if not count_eos:
        last = np.array([0 in sequence for sequence in every_sequence()])
        assert close((own_end != 0).astype(float), float(weight @ last))

    prefixes = (1, 2, NEW)
    own_prefix = prefix_log_prob(own_tokens, None if count_eos else own_end, prefixes)
    prefix = prefix_log_prob(tokens, None if count_eos else end, prefixes)
    for column, k in enumerate(prefixes):
        cut = {s[:k]: (p[i, :k].sum(), q[i, :k].sum()) for i, s in enumerate(every_sequence())}
        log_p, log_q = np.array(list(cut.values())).T
        assert abs(np.exp(log_p).sum() - 1) < 1e-5
        overlap = np.minimum(np.exp(log_p)[:, None], np.exp(log_q[:, None] + LOG_FACTORS)).sum(0)
        terms = precision_terms(prefix[:, column] - own_prefix[:, column], LOG_FACTORS)
        assert all(close(terms[:, m], overlap[m]) for m in range(len(LOG_FACTORS)))


def test_an_average_over_the_next_token_has_the_same_mean_and_less_variance(
    models: tuple[Dense, Dense],
) -> None:
    with torch.inference_mode():
        p, q = (log_probs_of(model, every_sequence(), 1.0) for model in models)
    weight = np.exp(p.sum(1))
    samples, scores = draw_and_score(models, True, 1.0)
    expected = score_expected(
        *models, samples, counting=Counting(num_prompt=1, eos=0, count_eos=False), batch_rows=5000,
        head_tokens=5000,
    )  # fmt: skip
    drawn = samples.log_prob_tau_sum - scores.log_prob_sum
    averaged = expected.divergence_sum
    assert averaged is not None
    assert close(averaged, float(weight @ (p - q).sum(1)))
    assert close(expected.log_prob_sum, float(weight @ q.sum(1)))
    assert averaged.var() < drawn.var() / 1.5
    assert np.array_equal(expected.num_tokens, samples.length - 1)


def test_precision_is_factor_times_recall(models: tuple[Dense, Dense]) -> None:
    """Samples of either model give the same overlap."""
    samples, scores = draw_and_score(models, True, 1.0)
    others, others_scores = draw_and_score((models[1], models[0]), True, 1.0)
    for column in range(2):
        mine, under, theirs, truth = (
            prefix_log_prob(array, None, (1, NEW))[:, column]
            for array in (
                samples.token_log_prob_tau, scores.token_log_prob,
                others_scores.token_log_prob, others.token_log_prob_tau,
            ) if array is not None
        )  # fmt: skip
        alpha = precision_terms(under - mine, LOG_FACTORS)
        beta = recall_terms(truth - theirs, LOG_FACTORS)
        for m, factor in enumerate(np.exp(LOG_FACTORS)):
            error = np.hypot(alpha[:, m].std(), factor * beta[:, m].std()) / np.sqrt(NUM_SAMPLES)
            assert abs(alpha[:, m].mean() - factor * beta[:, m].mean()) < 4.5 * error + 1e-6


def test_a_sequence_that_has_ended_is_its_own_prefix() -> None:
    tokens = np.array([[np.nan, -1.0, -2.0, np.nan], [np.nan, -1.0, -2.0, -4.0], [np.nan] * 4])
    end = np.array([-8.0, 0.0, -16.0])
    assert prefix_log_prob(tokens, end, (1, 2, 3)).tolist() == [
        [-1.0, -3.0, -11.0], [-1.0, -3.0, -7.0], [-16.0, -16.0, -16.0],
    ]  # fmt: skip
    assert prefix_log_prob(tokens, None, (1, 3)).tolist() == [
        [-1.0, -3.0],
        [-1.0, -7.0],
        [0.0, 0.0],
    ]
