"""Scores agree with a float64 loop over a transformers model."""

import numpy as np
import torch
from models_for_tests import small_model

from kdhpc.likelihood import counted, token_log_probs
from kdhpc.sampling import Selector, sample


def test_token_log_probs_agree_with_a_float64_loop() -> None:
    model = small_model(300, 16)
    ids = torch.randint(0, 300, (7, 16))
    found = token_log_probs(model, ids, head_tokens=13)
    exact = model.double()
    assert torch.isnan(found[:, 0]).all()
    for row in range(7):
        for position in range(1, 16):
            log_p = exact(ids[row : row + 1, :position]).logits[0, -1].log_softmax(-1)
            assert abs(found[row, position].item() - log_p[ids[row, position]].item()) < 1e-4


def test_padding_changes_no_score() -> None:
    model = small_model(300, 16)
    ids = torch.randint(1, 300, (3, 16))
    padded = ids.clone()
    padded[:, 9:] = 0
    full, cut = (token_log_probs(model, x, head_tokens=64) for x in (ids, padded))
    assert torch.allclose(full[:, 1:9], cut[:, 1:9], atol=1e-6)


def test_the_samplers_own_sums_agree_with_the_scorer() -> None:
    model = small_model(300, 12)
    for count_eos in (True, False):
        for tau in (1.0, 0.7):
            samples = sample(
                model,
                prompt_ids=[2, 3],
                length=12,
                rows=range(96),
                batch_rows=32,
                selector=Selector(tau=tau),
                seed=0,
                stream="test",
                draw="inverse_cdf",
                eos=0,
                count_eos=count_eos,
            )
            ids = torch.from_numpy(samples.ids.astype(np.int64))
            length = torch.from_numpy(samples.length)
            ended = ids.gather(1, (length.long() - 1)[:, None]).squeeze(1) == 0
            counts = counted(length, 12, num_prompt=2, ended=ended, count_eos=count_eos)
            scores = token_log_probs(model, ids, head_tokens=100)
            sums = torch.where(counts, scores, 0.0).double().sum(1).numpy()
            assert np.abs(sums - samples.log_prob_sum).max() < 1e-4 * 12
            if tau == 1.0:
                assert np.allclose(samples.log_prob_sum, samples.log_prob_tau_sum, atol=1e-5)
            else:
                assert (samples.log_prob_tau_sum > samples.log_prob_sum).mean() > 0.5


def test_prompt_padding_and_masked_eos_are_not_counted() -> None:
    length = torch.tensor([5, 5, 3])
    ended = torch.tensor([True, False, True])
    learn = counted(length, 6, num_prompt=2, ended=ended, count_eos=True)
    mask = counted(length, 6, num_prompt=2, ended=ended, count_eos=False)
    assert learn.sum(1).tolist() == [3, 3, 1]
    assert mask.sum(1).tolist() == [2, 3, 0]
    assert not learn[:, :2].any()
