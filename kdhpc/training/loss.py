"""The loss of training: cross-entropy without the logits of a whole batch in memory."""

from typing import Any

import torch
from torch import Tensor


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
