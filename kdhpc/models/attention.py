"""Causal attention of whole rows: torch's kernels on GPUs, blocks of queries on CPUs.

torch's CPU kernel takes a quarter of a training step at a fraction of the matrix rate; the same
sums as batched matrix products of 64 queries against the keys before them take less than half of
that (`benchmarks/training.py`).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "kdhpc_blocks"
BLOCK = 64
"""Queries in a block: small enough that its scores stay in the cache."""


class _Attend(torch.autograd.Function):
    """Softmax(Q K' scale) V under the causal mask; probabilities are made again backwards.

    n = batch x key heads, G = query heads for each key head, L positions, D head size. The G heads
    that share keys stand below each other as rows of one matrix.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        q = (query * scale).reshape(-1, groups, *query.shape[2:])  # [n, G, L, D]
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (key, value))  # [n, L, D]
        out = torch.empty_like(q)
        for start, stop in _blocks(q):
            p = _probabilities(q, k, start, stop, q.dtype)
            out[:, :, start:stop] = (p @ v[:, :stop]).view_as(out[:, :, start:stop])
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.shapes = scale, (query.shape, key.shape, value.shape)
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out = ctx.saved_tensors
        grad_out = grads[0].reshape(q.shape)
        # The softmax's own part: what a row's gradient and its output have in common.
        common = (grad_out.float() * out.float()).sum(-1, keepdim=True)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for start, stop in _blocks(q):
            p = _probabilities(q, k, start, stop, torch.float32)
            grad = _rows(grad_out, start, stop)
            grad_v[:, :stop] += p.to(q.dtype).transpose(1, 2) @ grad
            grad_p = (grad @ v[:, :stop].transpose(1, 2)).float()
            scores = grad_p.sub_(_rows(common, start, stop)).mul_(p).to(q.dtype)
            part = grad_q[:, :, start:stop]
            part.copy_((scores @ k[:, :stop]).view_as(part))
            grad_k[:, :stop] += scores.transpose(1, 2) @ _rows(q, start, stop)
        found = (grad_q.mul_(ctx.scale), grad_k.to(k.dtype), grad_v.to(v.dtype))
        grad_q, grad_k, grad_v = (x.view(s) for x, s in zip(found, ctx.shapes, strict=True))
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    length = q.shape[2]
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Positions of [n, G, L, D] as matrices [n, G x positions, D]."""
    return x[:, :, start:stop].reshape(x.shape[0], -1, x.shape[3])


def _probabilities(q: Tensor, k: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """[n, G x positions, stop] of scaled queries; later keys of the block have none.

    Sums are float32; what comes out is rounded to `dtype` once.
    """
    scores = _rows(q, start, stop) @ k[:, :stop].transpose(1, 2)
    size = stop - start
    later = torch.full((size, size), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    scores.view(*q.shape[:2], size, stop)[..., start:] += later
    return scores.softmax(-1, dtype=dtype)


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention to the positions before and the own one.

    Args:
        query: [B, H, L, D].
        key: [B, H_kv, L, D]; H is a multiple of H_kv.
        value: the same.

    Returns:
        [B, H, L, D].
    """
    if query.device.type == "cpu":
        found: Tensor = _Attend.apply(query, key, value, query.shape[-1] ** -0.5)  # type: ignore[no-untyped-call]
        return found
    groups = query.shape[1] // key.shape[1]
    if query.dtype == torch.float32:  # no kernel that needs little memory takes grouped heads
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=groups > 1
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it; rows are padded on the right or not at all.

    Args:
        module: unused.
        query: [B, H, L, D].
        key: [B, H_kv, L, D]; H is a multiple of H_kv.
        value: the same.
        attention_mask: None.
        scaling: factor of the scores; 1 / sqrt(D) if None.
        more: unused.

    Returns:
        [B, L, H, D], and None for the weights.

    Raises:
        ValueError: for a mask, or keys of another length than the queries.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError("block attention is causal over whole rows: no mask, no cache")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _Attend.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2), None


def use_blocks(model: "PreTrainedModel") -> None:
    """Let a Llama of transformers on a CPU attend in blocks; every other model stays as it is."""
    from transformers import AttentionInterface

    if model.device.type == "cpu" and model.config.model_type == "llama":
        AttentionInterface.register(NAME, attend)
        model.set_attn_implementation(NAME)
