"""The training loss: cross-entropy without the logits of a whole batch in memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdhpc.models.head import PLAIN, Logits

Chunk = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""The loss of a chunk and its gradients, with the arguments and results of `loss_of_chunk`."""


def loss_of_chunk(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    soft: Tensor | None,
    form: Logits,
    gains: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the loss of a chunk and its gradients, in as little memory as single operations can.

    A compiler makes few kernels of it, with less memory still.

    Args:
        hidden: [n, H] hidden states.
        weight: [V, H] weight of the head, in the same dtype.
        bias: [V] bias of the head, if it has one.
        targets: [n] int64 token ids; negative if a position does not count.
        soft: [n, V] float32 distributions that are learnt instead of tokens.
        form: what the architecture makes of the products.
        gains: [n] float32, the gradient of each loss; None if no gradients are needed.

    Returns:
        Scalar float32, the sum of the losses in nats; gradients of the products [n, V] in the
        dtype of the weight, and of the bias [V] in float32.
    """
    counts, target = targets >= 0, targets.clamp(min=0)[:, None]
    logits = form.from_products((hidden @ weight.T).float(), bias)
    log_p = torch.log_softmax(logits, dim=1)
    slope = form.slope(logits) if gains is not None else None
    del logits  # frees memory before the next large buffer is allocated
    if soft is None:
        total = -(log_p.gather(1, target).squeeze(1) * counts).sum()
    else:
        total = -((log_p * soft).sum(1) * counts).sum()
    if gains is None:
        return total, None, None
    log_p.exp_()
    if soft is not None:
        log_p.sub_(soft)
    elif torch.compiler.is_compiling():  # a scatter would need the whole matrix in memory first
        log_p.sub_((torch.arange(log_p.shape[1], device=log_p.device) == target).float())
    else:
        log_p.scatter_add_(1, target, -torch.ones_like(target, dtype=log_p.dtype))
    gradient = form.gradient(log_p.mul_(gains[:, None]), slope)
    return total, gradient.to(weight.dtype), None if bias is None else gradient.sum(0)


@dataclass(frozen=True, kw_only=True)
class Soft:
    """A teacher's distributions over the next token at N positions, made when they are needed."""

    hidden: Tensor
    """[N, H'] last hidden states of the teacher."""
    head: Callable[[Tensor], Tensor]
    """Function from hidden states [n, H'] to float32 logits [n, V]."""
    tau: float
    """Temperature of the distributions."""
    left_out: Sequence[int] = ()
    """Ids that are none of the targets that count, such as ends that are not learnt."""

    def probabilities(self, at: int, stop: int) -> Tensor:
        """Return the distributions at some positions, float32 [stop - at, V]."""
        logits = self.head(self.hidden[at:stop]) / self.tau
        for token in self.left_out:  # a list as an index would make the host wait for the device
            logits[:, token] = -torch.inf
        return torch.softmax(logits, dim=1)


class _SummedNll(torch.autograd.Function):
    """Cross-entropy whose gradients are computed while the logits of a chunk are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        form: Logits,
        head_tokens: int,
        gain: float,
        soft: Soft | None,
        chunk: Chunk,
        needs_grad: bool,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        parts: list[Tensor] = []
        # With several chunks, the gradient of the weight is summed in float32.
        several = needs_grad and len(hidden) > head_tokens
        sums = torch.zeros_like(weight, dtype=torch.float32) if several else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for at in range(0, len(hidden), head_tokens):
            rows = hidden[at : at + head_tokens]
            wanted = None if soft is None else soft.probabilities(at, at + head_tokens)
            some = targets[at : at + head_tokens]
            # A tensor, because a number would be compiled in, and it differs from step to step.
            gains = (some >= 0) * gain if needs_grad else None
            part, grad, of_bias = chunk(rows, weight, bias, some, wanted, form, gains)
            del wanted
            total += part
            if grad is None:
                continue
            if grad_bias is not None and of_bias is not None:
                grad_bias += of_bias
            parts.append(grad @ weight)
            grad_weight = grad.T @ rows
            if sums is not None:
                sums += grad_weight
        if needs_grad:
            ctx.save_for_backward(
                torch.cat(parts),
                grad_weight if sums is None else sums.to(weight.dtype),
                None if bias is None or grad_bias is None else grad_bias.to(bias.dtype),
            )
            ctx.gain = gain
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        factor = grads[0] / ctx.gain
        scaled = (None if grad is None else grad * factor for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None, None, None)


def summed_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    form: Logits = PLAIN,
    head_tokens: int,
    gain: float = 1.0,
    soft: Soft | None = None,
    chunk: Chunk = loss_of_chunk,
) -> Tensor:
    """Sum -log p(target) for training with memory for `head_tokens` x V logits, not for all.

    With soft labels it is the mean of that over targets that the teacher draws at each position,
    which is its cross-entropy: KL(teacher || student) and the teacher's entropy.

    Logits and softmax are float32 and exist for one chunk at a time. Gradients are computed in the
    same pass, so that nothing is computed twice; under `no_grad` there are none.

    Args:
        hidden: [N, H] last hidden states of N positions.
        weight: [V, H] weight of the head, in the dtype of `hidden`.
        targets: [N] int64 token ids; negative if a position does not count.
        bias: [V] bias of the head, if it has one.
        form: what the architecture makes of the product of the two.
        head_tokens: number of positions in one chunk.
        gain: gradient that the sum is expected to receive, within a few powers of two. Gradients
            are computed at that scale, so that small ones do not underflow in float16.
        soft: the teacher's distributions; `targets` then only say which positions count.
        chunk: `loss_of_chunk`, compiled or not.

    Returns:
        Scalar float32 in nats.
    """
    # Inside the function gradients are always disabled, so it has to be told.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total: Tensor = _SummedNll.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, form, head_tokens, gain, soft, chunk, needs_grad
    )
    return total
