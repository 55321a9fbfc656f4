"""The attention and the loss of training agree with torch's own."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from kdhpc.models.attention import attend, causal
from kdhpc.models.head import Logits
from kdhpc.training.loss import Soft, loss_of_chunk, summed_nll


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def backward(out: Tensor, *inputs: Tensor, by: Tensor) -> list[Tensor]:
    return [x.detach() for x in (out, *torch.autograd.grad(out, inputs, by))]


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 200),
    heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    window=st.sampled_from([None, 1, 5, 64, 90, 300]),
    cap=st.sampled_from([None, 1.5]),
)
def test_blocks_give_the_attention_and_gradients_of_torch(
    length: int, heads: int, groups: int, window: int | None, cap: float | None
) -> None:
    torch.manual_seed(length)
    q = random(2, heads * groups, length, 8)
    k, v = random(2, heads, length, 8), random(2, heads, length, 8)
    by = torch.randn(2, heads * groups, length, 8, dtype=torch.float64)
    out, weights = attend(
        nn.Identity(), q, k, v, None, scaling=0.3, sliding_window=window, softcap=cap
    )
    if cap is None and window is None:
        expected = scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3, enable_gqa=groups > 1
        )
    else:
        scores = 0.3 * q @ k.repeat_interleave(groups, 1).transpose(2, 3)
        scores = scores if cap is None else cap * torch.tanh(scores / cap)
        seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - (window or length))
        scores = scores.masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ v.repeat_interleave(groups, 1)
    assert weights is None
    gradients = backward(out.transpose(1, 2), q, k, v, by=by)
    # The softmax and the sums are float32.
    for ours, theirs in zip(gradients, backward(expected, q, k, v, by=by), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_bfloat16_blocks_are_near_exact_attention() -> None:
    q, k, v = (torch.randn(2, 2, 150, 48).bfloat16() for _ in range(3))
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (causal(q, k, v) - exact).square().mean().sqrt() < 0.01


def test_blocks_refuse_masks_and_caches() -> None:
    q, k = random(1, 2, 4, 8), random(1, 2, 6, 8)
    with pytest.raises(ValueError, match="causal over whole rows"):
        attend(nn.Identity(), q, q, q, torch.ones(4, 4))
    with pytest.raises(ValueError, match="causal over whole rows"):
        attend(nn.Identity(), q, k, k, None)


@pytest.mark.parametrize("head_tokens", [1, 7, 40, 99])
def test_the_loss_by_chunks_has_the_value_and_gradients_of_cross_entropy(head_tokens: int) -> None:
    torch.manual_seed(0)
    hidden, weight = random(40, 8, dtype=torch.float32), random(50, 8, dtype=torch.float32)
    targets = torch.randint(50, (40,))
    targets[::3] = -100
    loss = summed_nll(hidden, weight, targets, head_tokens=head_tokens, gain=0.125)
    expected = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    by = torch.tensor(0.125)
    for ours, theirs in zip(
        backward(loss, hidden, weight, by=by), backward(expected, hidden, weight, by=by),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


FORMS = {
    "a bias": (True, Logits()),
    "a factor": (False, Logits(factor=0.125)),
    "a cap": (False, Logits(cap=3.0)),
    "all of them": (True, Logits(factor=1.5, cap=2.0)),
}


@pytest.mark.parametrize("is_soft", [False, True], ids=["tokens", "soft labels"])
@pytest.mark.parametrize("head_tokens", [7, 99])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("compiled", [False, True])
def test_logits_of_every_known_form_are_learnt_as_in_a_float64_reference(
    compiled: bool, name: str, head_tokens: int, is_soft: bool
) -> None:
    has_bias, form = FORMS[name]
    hidden, weight, targets, soft, wanted = soft_case(head_tokens, 0.8)
    torch.compiler.reset()
    traced = torch.compile(loss_of_chunk, backend="eager", dynamic=False)
    bias = random(50, dtype=torch.float32) if has_bias else None
    inputs = [hidden, weight, *([] if bias is None else [bias])]
    loss = summed_nll(
        hidden, weight, targets, bias=bias, form=form, head_tokens=head_tokens, gain=0.125,
        soft=soft if is_soft else None,
        chunk=traced if compiled else loss_of_chunk,
    )  # fmt: skip
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    logits = logits * form.factor
    if form.cap is not None:
        logits = form.cap * (logits / form.cap).tanh()
    if is_soft:
        expected = -(wanted * logits.log_softmax(1)).sum(1)[targets >= 0].sum()
    else:
        expected = cross_entropy(logits, targets, reduction="sum")
    by = torch.tensor(0.125)
    for ours, theirs in zip(
        backward(loss, *inputs, by=by), backward(expected, *inputs, by=by.double()), strict=True
    ):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-5)


def test_a_chunk_is_compiled_once_for_gains_of_every_step() -> None:
    """Steps have other numbers of tokens, and so other gains."""
    counter = CompileCounter()
    chunk = torch.compile(loss_of_chunk, backend=counter, dynamic=False)
    hidden, weight, targets, _, _ = soft_case(20, 1.0)
    for gain in (0.5, 0.25, 0.125):
        for head_tokens in (20, 30):  # the last chunk is smaller with 30
            summed_nll(
                hidden, weight, targets, head_tokens=head_tokens, gain=gain, chunk=chunk
            ).backward()  # type: ignore[no-untyped-call]
    assert counter.frame_count == 3  # for 20, 30 and 10 positions
    torch.compiler.reset()


def soft_case(head_tokens: int, tau: float) -> tuple[Tensor, Tensor, Tensor, Soft, Tensor]:
    """Return hidden states, weight, targets, a teacher, and its float64 distributions."""
    torch.manual_seed(1)
    hidden, weight = random(40, 8, dtype=torch.float32), random(50, 8, dtype=torch.float32)
    targets = torch.randint(50, (40,))
    targets[::3] = -100
    theirs = torch.randn(50, 6)
    soft = Soft(
        hidden=torch.randn(40, 6), head=lambda rows: rows @ theirs.T, tau=tau, left_out=(4, 9)
    )
    logits = soft.hidden.double() @ theirs.double().T / tau
    logits[:, [4, 9]] = -torch.inf
    return hidden, weight, targets, soft, logits.softmax(1)


@pytest.mark.parametrize("tau", [1.0, 0.6])
@pytest.mark.parametrize("head_tokens", [1, 7, 40, 99])
def test_soft_labels_have_the_value_and_gradients_of_a_float64_reference(
    head_tokens: int, tau: float
) -> None:
    hidden, weight, targets, soft, wanted = soft_case(head_tokens, tau)
    loss = summed_nll(hidden, weight, targets, head_tokens=head_tokens, gain=0.125, soft=soft)
    log_q = (hidden.double() @ weight.double().T).log_softmax(1)
    expected = -(wanted * log_q).sum(1)[targets >= 0].sum()
    by = torch.tensor(0.125)
    for ours, theirs in zip(
        backward(loss, hidden, weight, by=by), backward(expected, hidden, weight, by=by.double()),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_soft_labels_are_the_mean_of_all_hard_ones() -> None:
    hidden, weight, targets, soft, wanted = soft_case(8, 0.8)
    mean = sum(
        (wanted[:, token] * position_losses(hidden, weight, token))[targets >= 0].sum()
        for token in range(50)
    )
    loss = summed_nll(hidden, weight, targets, head_tokens=8, soft=soft)
    assert float(loss.detach()) == pytest.approx(float(mean), rel=1e-5)


def position_losses(hidden: Tensor, weight: Tensor, token: int) -> Tensor:
    """Return the loss of a token at each position."""
    one = torch.full((1,), token)
    losses = [summed_nll(row[None], weight, one, head_tokens=1) for row in hidden.detach()]
    return torch.stack(losses).detach().double()


def test_a_student_that_equals_its_teacher_has_its_entropy_and_no_gradient() -> None:
    hidden, weight = random(12, 8, dtype=torch.float32), random(50, 8, dtype=torch.float32)
    soft = Soft(hidden=hidden.detach(), head=lambda rows: rows @ weight.detach().T, tau=1.0)
    loss = summed_nll(hidden, weight, torch.zeros(12, dtype=torch.int64), head_tokens=5, soft=soft)
    p = (hidden.double() @ weight.double().T).softmax(1)
    assert float(loss.detach()) == pytest.approx(float(-(p * p.log()).sum().detach()), rel=1e-6)
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.abs().max() < 1e-5


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_logits_of_the_whole_batch_are_made() -> None:
    hidden, weight = random(512, 4, dtype=torch.float32), random(300, 4, dtype=torch.float32)
    largest = Largest()
    with largest:
        summed_nll(hidden, weight, torch.zeros(512, dtype=torch.int64), head_tokens=16).backward()  # type: ignore[no-untyped-call]
    assert largest.numel == 16 * 300


@pytest.mark.parametrize("head_tokens", [16, 64])
def test_memory_of_soft_labels_grows_with_the_chunk_alone(head_tokens: int) -> None:
    hidden, weight = random(512, 4, dtype=torch.float32), random(300, 4, dtype=torch.float32)
    theirs = torch.randn(300, 8)
    soft = Soft(hidden=torch.randn(512, 8), head=lambda rows: rows @ theirs.T, tau=0.8)
    targets = torch.zeros(512, dtype=torch.int64)
    largest = Largest()
    with largest:
        summed_nll(hidden, weight, targets, head_tokens=head_tokens, soft=soft).backward()  # type: ignore[no-untyped-call]
    assert largest.numel == head_tokens * 300
