"""Scores agree with those of a float64 loop over a transformers model."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from commands import need
from models_for_tests import SHAPE, llama_of, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from kdhpc.models.huggingface import TransformersModel
from kdhpc.sampling import native
from kdhpc.sampling.sampler import Prompt, Sampler, sample
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.likelihood import CPU_HEAD_TOKENS, token_log_probs
from kdhpc.selection import Selection


def test_token_log_probs_agree_with_a_float64_loop() -> None:
    model = small_model(300, 16)
    ids = torch.randint(0, 300, (7, 16))
    [log_probs] = token_log_probs(llama_of(model), ids, head_tokens=13)
    exact = model.double()
    assert torch.isnan(log_probs[:, 0]).all()
    for row in range(7):
        for position in range(1, 16):
            log_p = exact(ids[row : row + 1, :position]).logits[0, -1].log_softmax(-1)
            assert abs(log_probs[row, position].item() - log_p[ids[row, position]].item()) < 1e-4


def test_several_temperatures_take_one_pass_and_agree_with_one_at_a_time() -> None:
    model = small_model(300, 16)
    ids = torch.randint(0, 300, (7, 16))
    taus = (1.0, 0.8, 0.5)
    calls = []
    model.model.register_forward_hook(lambda *of: calls.append(1))
    wrapped = TransformersModel(model)
    assert callable(wrapped.head)
    calls.clear()
    together = token_log_probs(wrapped, ids, head_tokens=50, taus=taus)
    assert len(calls) == 1
    logits = model(ids).logits[:, :-1].double()
    for tau, log_probs in zip(taus, together, strict=True):
        exact = (logits / tau).log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
        assert (log_probs[:, 1:] - exact).abs().max() < 1e-5


def test_memory_does_not_grow_with_vocabulary_times_length() -> None:
    """No tensor is as large as the logits of all positions."""
    model = llama_of(small_model(3000, 64))
    ids = torch.randint(0, 3000, (16, 64))
    assert callable(model.head)  # made before tensors are watched
    largest = 0

    class Look(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Look():  # type: ignore[no-untyped-call]
        token_log_probs(model, ids, head_tokens=10**6)
    assert 64 * 3000 < largest <= CPU_HEAD_TOKENS * 3000


def test_padding_changes_no_score() -> None:
    model = llama_of(small_model(300, 16))
    ids = torch.randint(1, 300, (3, 16))
    padded = ids.clone()
    padded[:, 9:] = 0
    full, cut = (token_log_probs(model, x, head_tokens=64)[0] for x in (ids, padded))
    assert torch.allclose(full[:, 1:9], cut[:, 1:9], atol=1e-6)


def test_the_samplers_own_sums_agree_with_the_scorer() -> None:
    model = llama_of(small_model(300, 12))
    for count_eos in (True, False):
        counting = Counting(num_prompt=2, eos=0, count_eos=count_eos)
        for tau in (1.0, 0.7):
            sampler = Sampler(
                model,
                prompts=[
                    Prompt(
                        ids=(
                            2,
                            3,
                        )
                    )
                ],
                length=12,
                batch_rows=32,
                selection=Selection(tau=tau),
                draw="inverse_cdf",
                counting=counting,
            )
            samples = sample(sampler, rows=range(96), seed=0, stream="test")
            ids = torch.from_numpy(samples.ids.astype(np.int64))
            counts = counting.of(ids, torch.from_numpy(samples.length))
            [scores] = token_log_probs(model, ids, head_tokens=100)
            sums = torch.where(counts, scores, 0.0).double().sum(1).numpy()
            assert np.abs(sums - samples.log_prob_sum).max() < 1e-4 * 12
            if tau == 1.0:
                assert np.allclose(samples.log_prob_sum, samples.log_prob_tau_sum, atol=1e-5)
            else:
                assert (samples.log_prob_tau_sum > samples.log_prob_sum).mean() > 0.5


@pytest.mark.parametrize("engine", ["torch", "native"])
def test_the_samplers_own_bfloat16_sums_agree_with_the_scorer_in_the_mean(engine: str) -> None:
    """One token at a time may be rounded differently from whole rows."""
    need(engine == "torch" or not native.missing(), f"the extension: {native.missing()}")
    shape = replace(SHAPE, hidden=192, heads=6, kv_heads=2, ffn=96)
    model = llama_of(small_model(300, 40, shape=shape).to(torch.bfloat16))
    sampler = Sampler(
        model, prompts=[Prompt(ids=(2,))], length=40, batch_rows=64, selection=Selection(),
        draw="inverse_cdf", counting=Counting(num_prompt=1, eos=-1, count_eos=True), engine=engine,
    )  # fmt: skip
    samples = sample(sampler, rows=range(128), seed=0, stream="test")
    [scores] = token_log_probs(
        model,
        torch.from_numpy(samples.ids.astype(np.int64)),
        head_tokens=1000,
        head=native.head_of(model) if engine == "native" else None,
    )
    difference = (scores[:, 1:].double().sum(1).numpy() - samples.log_prob_sum) / 39
    assert abs(difference.mean()) < 0.01
    assert np.abs(difference).mean() < 0.05


def test_prompt_padding_and_masked_eos_are_not_counted() -> None:
    length = torch.tensor([5, 5, 3])
    ids = torch.tensor([[7, 7, 7, 7, 0, 7], [7, 7, 7, 7, 7, 0], [7, 7, 0, 7, 7, 7]])
    learn, mask = (
        Counting(num_prompt=2, eos=0, count_eos=count).of(ids, length) for count in (True, False)
    )
    assert learn.sum(1).tolist() == [3, 3, 1]
    assert mask.sum(1).tolist() == [2, 3, 0]
    assert not learn[:, :2].any()
