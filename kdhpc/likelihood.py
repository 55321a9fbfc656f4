"""Log-probabilities of stored ids under a model, without logits of a whole batch in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.devices import Linear, exact_matmuls
from kdhpc.inference import LanguageModel


def counted(
    length: Tensor, width: int, *, num_prompt: int, ended: Tensor, count_eos: bool
) -> Tensor:
    """Which tokens are trained on and scored.

    Args:
        length: [B] tokens of each row, a drawn end-of-sequence token included.
        width: columns L of the ids.
        num_prompt: tokens of the prompt, which never count.
        ended: [B] bool, whether the last token of the row is the end-of-sequence token.
        count_eos: whether that token counts.

    Returns:
        [B, L] bool.
    """
    stop = length if count_eos else length - ended.to(length.dtype)
    position = torch.arange(width, device=length.device)
    return (position >= num_prompt) & (position < stop[:, None])


CPU_HEAD_TOKENS = 128
"""Positions whose logits stay in a CPU's cache between the product and the softmax."""


@torch.inference_mode()
def token_log_probs(
    model: LanguageModel,
    ids: Tensor,
    *,
    head_tokens: int,
    taus: Sequence[float] = (1.0,),
    head: Linear | None = None,
) -> Tensor:
    """Log p(token | tokens before it) for every token but the first of each row.

    The body runs once, in the model's dtype; logits and log-softmax are float32, for `head_tokens`
    positions at a time. Rows are padded on the right; attention is causal, so padding is never
    seen.

    Args:
        model: a causal language model whose logits are a product with its head.
        ids: [B, L] int64.
        head_tokens: most positions whose logits [head_tokens, V] are in memory at once.
        taus: temperatures, each of which divides the logits.
        head: float32 logits [N, V] of hidden states [N, H]; the model's own if None.

    Returns:
        [len(taus), B, L] float32 in nats; column 0 is NaN.

    Raises:
        InputError: for a model whose logits are something else.
    """
    head, targets = head or model.head, ids[:, 1:].reshape(-1)
    size = min(head_tokens, CPU_HEAD_TOKENS) if ids.device.type == "cpu" else head_tokens
    picked = torch.empty((len(taus), len(targets)), device=ids.device)
    with exact_matmuls():
        hidden = model.hidden(ids)[:, :-1]
        flat = hidden.reshape(len(targets), -1)
        for at in range(0, len(targets), size):
            logits, wanted = head(flat[at : at + size]), targets[at : at + size, None]
            for found, tau in zip(picked, taus, strict=True):
                log_p = (logits if tau == 1.0 else logits / tau).log_softmax(1)
                found[at : at + size] = log_p.gather(1, wanted).squeeze(1)
    return functional.pad(picked.view(-1, *hidden.shape[:2]), (1, 0), value=torch.nan)


class _SummedNll(torch.autograd.Function):
    """Cross-entropy whose gradients are made while the logits of a chunk are in memory."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head_tokens: int, gain: float
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted = hidden.requires_grad or weight.requires_grad
        parts: list[Tensor] = []
        # Sums of many chunks are kept in float32.
        sums = torch.zeros_like(weight, dtype=torch.float32) if len(hidden) > head_tokens else None
        for at in range(0, len(hidden), head_tokens):
            rows, counts = hidden[at : at + head_tokens], targets[at : at + head_tokens] >= 0
            chosen = targets[at : at + head_tokens].clamp(min=0)[:, None]
            log_p = torch.log_softmax((rows @ weight.T).float(), dim=1)
            total -= (log_p.gather(1, chosen).squeeze(1) * counts).sum()
            if not wanted:
                continue
            log_p.exp_().scatter_add_(1, chosen, -torch.ones_like(chosen, dtype=log_p.dtype))
            grad = log_p.mul_((counts * gain)[:, None]).to(weight.dtype)
            del log_p  # before the next large buffers are made
            parts.append(grad @ weight)
            grad_weight = grad.T @ rows
            if sums is not None:
                sums += grad_weight
        if wanted:
            ctx.save_for_backward(
                torch.cat(parts), grad_weight if sums is None else sums.to(weight.dtype)
            )
            ctx.gain = gain
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0] / ctx.gain
        return grad_hidden * factor, grad_weight * factor, None, None, None


def summed_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, head_tokens: int, gain: float = 1.0
) -> Tensor:
    """Sum of -log p(target), for training: memory grows with `head_tokens` x V, not with B x L x V.

    Logits and softmax are float32 for one chunk at a time; gradients are made in the same pass, so
    that nothing is computed twice.

    Args:
        hidden: [N, H] last hidden states.
        weight: [V, H] of the head, in the dtype of `hidden`.
        targets: [N] int64 token ids; negative where a position does not count.
        head_tokens: positions in one chunk.
        gain: gradient that the sum is expected to receive, within a few powers of two. Gradients
            are made at that scale, so that float16 does not lose small ones.

    Returns:
        Scalar float32 in nats.
    """
    total: Tensor = _SummedNll.apply(hidden, weight, targets, head_tokens, gain)  # type: ignore[no-untyped-call]
    return total
