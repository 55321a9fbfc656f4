"""Draws are exact, and depend on a sequence's own stream only."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from models_for_tests import small_model
from scipy import stats

from kdhpc import seeding
from kdhpc.models import load_model
from kdhpc.sampling import (
    LlamaDecoder,
    Selector,
    TransformersDecoder,
    draw_gumbel,
    draw_inverse_cdf,
    sample,
)


def draw(model: Any, rows: range = range(64), **changes: Any) -> Any:
    options: dict[str, Any] = {
        "prompt_ids": [2, 3],
        "length": 10,
        "rows": rows,
        "batch_rows": 32,
        "selector": Selector(),
        "seed": 0,
        "stream": "test",
        "draw": "inverse_cdf",
        "eos": 0,
        "count_eos": True,
    }
    return sample(model, **(options | changes))


@pytest.mark.parametrize("decoder_class", [LlamaDecoder, TransformersDecoder])
def test_decoded_logits_equal_a_forward_pass(decoder_class: Any) -> None:
    model = small_model(300, 12)
    ids = torch.randint(0, 300, (5, 12))
    decoder = decoder_class(model, 5, 12)
    with torch.inference_mode():
        stepped = torch.stack([decoder.step(ids[:, t], t) for t in range(12)], dim=1)
        whole = model(ids).logits
    assert torch.allclose(stepped, whole, atol=1e-4)


@pytest.mark.parametrize("tau", [1.0, 0.8, 0.5])
@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
def test_sequences_follow_the_exact_distribution(tau: float, method: str) -> None:
    """Every sequence of three tokens over a vocabulary of five is enumerated."""
    model = small_model(5, 4)
    num, eos = 20000, 0
    samples = draw(
        model,
        range(num),
        prompt_ids=[2],
        length=4,
        batch_rows=1000,
        selector=Selector(tau=tau),
        draw=method,
    )
    expected: dict[tuple[int, ...], float] = {}
    for tokens in itertools.product(range(5), repeat=3):
        ended = tokens.index(eos) + 1 if eos in tokens else 3
        kept = tokens[:ended] + (0,) * (3 - ended)
        if kept != tokens:
            continue
        ids = torch.tensor([[2, *tokens]])
        log_p = (model(ids).logits.double() / tau).log_softmax(-1)[0]
        expected[tokens] = float(np.exp(sum(log_p[i, tokens[i]].item() for i in range(ended))))
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    counts = dict.fromkeys(expected, 0)
    for row in samples.ids[:, 1:]:
        counts[tuple(int(token) for token in row)] += 1
    common = [key for key, p in expected.items() if p * num >= 5]
    observed = [counts[key] for key in common]
    wanted = [expected[key] * num for key in common]
    observed.append(num - sum(observed))
    wanted.append(num - sum(wanted))
    if wanted[-1] < 5:
        observed[-2:], wanted[-2:] = [sum(observed[-2:])], [sum(wanted[-2:])]
    assert stats.chisquare(observed, np.array(wanted) * (num / sum(wanted))).pvalue > 1e-4


def test_a_token_of_rank_beyond_50_appears() -> None:
    model = small_model(300, 4)
    samples = draw(model, range(4096), prompt_ids=[2], length=2, batch_rows=1024)
    order = model(torch.tensor([[2]])).logits[0, -1].argsort(descending=True)
    rare = set(order[50:].tolist())
    assert sum(int(token) in rare for token in samples.ids[:, 1]) > 100


def test_a_token_of_probability_2_to_the_minus_30_is_drawn_as_often_as_it_should() -> None:
    logits = torch.tensor([[0.0, 0.0, -30 * np.log(2.0)]], dtype=torch.float32)
    share = 2.0**-30 / (2 + 2.0**-30)
    edge = torch.tensor([1 - share * 1.0001, 1 - share * 0.999], dtype=torch.float64)
    tokens, log_probs = draw_inverse_cdf(logits.expand(2, 3), edge)
    assert tokens.tolist() == [1, 2]
    assert log_probs[1].item() == pytest.approx(np.log(share), rel=1e-6)


def test_no_uniform_draws_an_impossible_token() -> None:
    logits = torch.full((4, 1000), -torch.inf)
    logits[:, 300] = logits[:, 700] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53, 0.5 - 2.0**-53], dtype=torch.float64)
    assert draw_inverse_cdf(logits, uniform)[0].tolist() == [300, 700, 700, 300]


def test_both_draws_give_the_log_probability_of_what_they_drew() -> None:
    logits = torch.randn(64, 1000) * 3
    uniform = torch.from_numpy(seeding.uniforms(0, "u", range(64), 1)[:, 0])
    gumbel = torch.from_numpy(seeding.gumbels(0, "g", range(64), 0, 1000))
    for tokens, log_probs in (draw_inverse_cdf(logits, uniform), draw_gumbel(logits, gumbel)):
        exact = logits.double().log_softmax(1).gather(1, tokens[:, None]).squeeze(1)
        assert torch.allclose(log_probs, exact, atol=1e-6)


@pytest.mark.parametrize("method", ["inverse_cdf", "gumbel"])
def test_ids_do_not_depend_on_shards_or_order(method: str) -> None:
    model = small_model(300, 10)
    whole = draw(model, range(100), draw=method)
    parts = [draw(model, r, draw=method) for r in (range(64, 100), range(32), range(32, 64))]
    again = np.concatenate([parts[1].ids, parts[2].ids, parts[0].ids])
    assert np.array_equal(whole.ids, again)
    assert np.array_equal(whole.log_prob_sum[:32], parts[1].log_prob_sum)


def test_rows_end_at_eos_and_stay_empty_after_it() -> None:
    samples = draw(small_model(5, 10), range(256))
    ended = samples.ids[np.arange(256), samples.length - 1] == 0
    assert ended.any()
    for row, length in zip(samples.ids, samples.length, strict=True):
        assert (row[length:] == 0).all()
        assert (row[2 : length - 1] != 0).all()
    assert (samples.length[~ended] == 10).all()


def test_truncations_keep_only_the_likely_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    kept = Selector(top_k=2).select(logits) > -torch.inf
    assert kept.tolist() == [[True, True, False, False]]
    kept = Selector(top_p=0.81).select(logits) > -torch.inf
    assert kept.tolist() == [[True, True, True, False]]


def test_a_saved_model_samples_the_same_ids(tmp_path: Any) -> None:
    model = small_model(300, 10)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", device=torch.device("cpu"))
    assert np.array_equal(draw(model).ids, draw(loaded).ids)
