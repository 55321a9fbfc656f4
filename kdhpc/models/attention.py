"""Attention: torch's fused kernels on GPUs, blocks of queries on CPUs.

torch's CPU kernel takes a quarter of a training step and runs at a fraction of the matrix rate.
Computing the same sums as batched matrix products, 64 queries at a time against the keys before
them, takes less than half as long (`benchmarks/training.py`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdhpc.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, TRIAL = "kdhpc_causal", "kdhpc_trial"
HARMLESS = ("position_ids", "cache_position", "sliding_window", "is_causal")
"""Arguments of an attention that change nothing beside the mask."""
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
"""Kernels of torch that may be used on GPUs. The plain one is left out because it writes all scores
to memory, and torch would fall back to it without a word; cuDNN's because it makes a plan for every
shape."""
BLOCK = 64
"""Number of queries in a block, small enough that the scores of a block stay in the cache."""


class _Attend(torch.autograd.Function):
    """Compute softmax(Q K' scale) V under the causal mask.

    Probabilities are not saved; the backward pass computes them again. Shapes: n = batch x key
    heads, G query heads per key head, L positions, D head size. The G heads that share keys are
    stacked as rows of one matrix.
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
        # The gradient of softmax subtracts sum(grad_out * out) of each row.
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
        gradients = (grad_q.mul_(ctx.scale), grad_k.to(k.dtype), grad_v.to(v.dtype))
        grad_q, grad_k, grad_v = (x.view(s) for x, s in zip(gradients, ctx.shapes, strict=True))
        return grad_q, grad_k, grad_v, None


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    length = q.shape[2]
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _rows(x: Tensor, start: int, stop: int) -> Tensor:
    """Return the positions from `start` to `stop` of [n, G, L, D] as [n, G x positions, D]."""
    return x[:, :, start:stop].reshape(x.shape[0], -1, x.shape[3])


def _probabilities(q: Tensor, k: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return the attention probabilities of the queries from `start` to `stop`.

    `q` is already scaled. A query gives probability 0 to the keys after it. The softmax is computed
    in float32 and rounded to `dtype` once.

    Returns:
        [n, G x positions, stop].
    """
    scores = _rows(q, start, stop) @ k[:, :stop].transpose(1, 2)
    size = stop - start
    later = torch.full((size, size), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    scores.view(*q.shape[:2], size, stop)[..., start:] += later
    return scores.softmax(-1, dtype=dtype)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Attend from every position to itself and the positions before it.

    Args:
        query: [B, H, L, D].
        key: [B, H_kv, L, D]; H is a multiple of H_kv.
        value: [B, H_kv, L, D].
        scale: factor of the scores; 1 / sqrt(D) if None.

    Returns:
        [B, H, L, D].

    Raises:
        InputError: if a GPU has no fused kernel for these tensors.
    """
    if query.device.type == "cpu":
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        attended: Tensor = _Attend.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        return attended
    groups = query.shape[1] // key.shape[1]
    # In float32, torch's memory-efficient kernel does not accept grouped heads.
    if query.dtype == torch.float32:
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return fused(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)


def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Call torch's attention, but only its fused kernels.

    Args:
        query: [B, H, L, D].
        key: [B, H_kv, S, D].
        value: [B, H_kv, S, D].
        options: further arguments of `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        [B, H, L, D].

    Raises:
        InputError: if no fused kernel accepts these tensors; torch's warnings say why.
    """
    try:
        with sdpa_kernel(FUSED):
            return functional.scaled_dot_product_attention(query, key, value, **options)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        raise InputError(
            f"attention of heads of size {query.shape[-1]} in {query.dtype} on {query.device}: "
            "torch has no fused kernel for it; expected a size that is a multiple of 8 and at most "
            "256, or device=cpu"
        ) from error


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention with the signature that transformers calls.

    Rows must be padded on the right or not at all. `use_causal` has seen that nothing of `more`
    matters.

    Args:
        module: unused.
        query: [B, H, L, D].
        key: [B, H_kv, L, D]; H is a multiple of H_kv.
        value: [B, H_kv, L, D].
        attention_mask: must be None.
        scaling: factor of the scores; 1 / sqrt(D) if None.
        more: unused.

    Returns:
        [B, L, H, D], and None instead of the attention weights.

    Raises:
        ValueError: if there is a mask, or the numbers of keys and queries differ.
        InputError: if a GPU has no fused kernel for these tensors.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError(
            "attention is causal over whole rows; expected no attention mask and no cache, "
            f"got {'a mask' if attention_mask is not None else 'a cache'}"
        )
    return causal(query, key, value, scaling).transpose(1, 2), None


def use_causal(model: "PreTrainedModel", length: int) -> None:
    """Make a model of transformers attend by `causal` if that is what its attention computes.

    Otherwise it keeps its own attention: where a window, a cap or sinks matter in rows of this
    length, or if its attention cannot be replaced.

    transformers 5.23 makes no mask for a name that it does not know. For the names that it knows,
    it first looks for packed rows, and a GPU then waits for the host in every forward pass.

    Args:
        model: the model; one row goes through it, without its attention.
        length: number of tokens of a row.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    own, calls = model.config._attn_implementation, []

    def noted(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        calls.append(_is_plain(attention_mask, length, more))
        return query.new_zeros((len(query), length, query.shape[1], value.shape[3])), None

    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(TRIAL, noted)
    AttentionMaskInterface.register(TRIAL, eager_mask)
    model.set_attn_implementation(TRIAL)
    with torch.no_grad():
        ids = torch.zeros((1, length), dtype=torch.int64, device=model.device)
        model.base_model(ids, use_cache=False)
    model.set_attn_implementation(NAME if calls and all(calls) else own)


def _is_plain(mask: Tensor | None, length: int, more: Mapping[str, Any]) -> bool:
    """Return whether a call of an attention is causal and nothing else.

    Args:
        mask: what transformers adds to the scores, [1, 1, L, L].
        length: number of tokens of the row, L.
        more: what else it passes. A window is in the mask.
    """
    others = [value for name, value in more.items() if name not in HARMLESS]
    if mask is None or any(isinstance(value, Tensor) or value for value in others):
        return False
    causal_mask = torch.ones((length, length), dtype=torch.bool, device=mask.device).tril_()
    return mask.shape[2:] == causal_mask.shape and bool(((mask == 0) == causal_mask).all())
