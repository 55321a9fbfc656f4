"""Attention: torch's fused kernels on GPUs, blocks of queries on CPUs.

torch's CPU kernel takes a quarter of a training step and runs at a fraction of the matrix rate.
Computing the same sums as batched matrix products, 64 queries at a time against the keys before
them, takes less than half as long (`benchmarks/training.py`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdhpc.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME, TRIAL = "kdhpc_causal", "kdhpc_trial"
HARMLESS = ("position_ids", "cache_position", "is_causal")
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
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        cap: float | None,
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        q = (query * scale).reshape(-1, groups, *query.shape[2:])  # [n, G, L, D]
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (key, value))  # [n, L, D]
        out = torch.empty_like(q)
        for block in _blocks(q, window):
            p = _masked(_scores(q, k, block, cap), q, block, window).softmax(-1, dtype=q.dtype)
            part = out[:, :, block.start : block.stop]
            part.copy_((p @ v[:, block.first : block.stop]).view_as(part))
        ctx.save_for_backward(q, k, v, out)
        ctx.scale, ctx.window, ctx.cap = scale, window, cap
        ctx.shapes = query.shape, key.shape, value.shape
        return out.view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        grad_out = grads[0].reshape(q.shape)
        # The gradient of softmax subtracts sum(grad_out * out) of each row.
        common = (grad_out.float() * out.float()).sum(-1, keepdim=True)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (k, v))
        for block in _blocks(q, ctx.window):
            seen = slice(block.first, block.stop)
            scores = _scores(q, k, block, ctx.cap)
            # The slope of the cap where it was applied.
            slope = None if ctx.cap is None else 1.0 - (scores.float() / ctx.cap).square()
            p = _masked(scores, q, block, ctx.window).softmax(-1, dtype=torch.float32)
            grad = _rows(grad_out, block)
            grad_v[:, seen] += p.to(q.dtype).transpose(1, 2) @ grad
            grad_p = (grad @ v[:, seen].transpose(1, 2)).float()
            grad_s = grad_p.sub_(_rows(common, block)).mul_(p)
            scores = (grad_s if slope is None else grad_s.mul_(slope)).to(q.dtype)
            part = grad_q[:, :, block.start : block.stop]
            part.copy_((scores @ k[:, seen]).view_as(part))
            grad_k[:, seen] += scores.transpose(1, 2) @ _rows(q, block)
        gradients = (grad_q.mul_(ctx.scale), grad_k.to(k.dtype), grad_v.to(v.dtype))
        grad_q, grad_k, grad_v = (x.view(s) for x, s in zip(gradients, ctx.shapes, strict=True))
        return grad_q, grad_k, grad_v, None, None, None


class _Block(NamedTuple):
    """Queries from `start` to `stop`, which see keys from `first` to `stop`."""

    first: int
    start: int
    stop: int


def _blocks(q: Tensor, window: int | None) -> list[_Block]:
    length = q.shape[2]
    return [
        _Block(max(0, start + 1 - (window or length)), start, min(start + BLOCK, length))
        for start in range(0, length, BLOCK)
    ]


def _rows(x: Tensor, block: _Block) -> Tensor:
    """Return the queries of a block of [n, G, L, D] as [n, G x positions, D]."""
    return x[:, :, block.start : block.stop].reshape(x.shape[0], -1, x.shape[3])


def _scores(q: Tensor, k: Tensor, block: _Block, cap: float | None) -> Tensor:
    """Return the scores [n, G x positions, keys] of a block, capped softly; `q` is scaled."""
    scores = _rows(q, block) @ k[:, block.first : block.stop].transpose(1, 2)
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _masked(scores: Tensor, q: Tensor, block: _Block, window: int | None) -> Tensor:
    """Set, in place, the scores of keys that a query does not see to minus infinity.

    A query sees the keys up to its own position, or the last `window` of them.
    """
    size = block.stop - block.start
    view = scores.view(*q.shape[:2], size, block.stop - block.first)
    hidden = torch.full((size, size), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    view[..., block.start - block.first :] += hidden
    if window is not None:
        keys = torch.arange(block.first, block.stop, device=q.device)
        queries = torch.arange(block.start, block.stop, device=q.device)
        view.masked_fill_(keys <= queries[:, None] - window, -torch.inf)
    return scores


def causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
) -> Tensor:
    """Attend from every position to itself and the positions before it.

    Args:
        query: [B, H, L, D].
        key: [B, H_kv, L, D]; H is a multiple of H_kv.
        value: [B, H_kv, L, D].
        scale: factor of the scores; 1 / sqrt(D) if None.
        window: number of positions that a query sees, its own included; all if None.
        cap: `cap * tanh(score / cap)` takes the place of a score; None for no cap.

    Returns:
        [B, H, L, D].

    Raises:
        InputError: if a GPU has no fused kernel for these tensors.
    """
    window = None if window is None or window >= query.shape[2] else window
    # torch's fused kernels know neither windows nor caps.
    if query.device.type == "cpu" or window is not None or cap is not None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        attended: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
            query, key, value, scale, window, cap
        )
        return attended
    groups = query.shape[1] // key.shape[1]
    # In float32, torch's memory-efficient kernel does not accept grouped heads.
    if query.dtype == torch.float32:
        key, value, groups = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), 1
    return fused(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)


def over_used(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    used: Tensor,
    starts: tuple[Tensor, Tensor],
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attend with one query per row to the positions of a cache that are used, by FlashAttention.

    How many they are is read on the device. Sums are not split over keys, so that a row's result
    does not depend on the others.

    Args:
        query: [B, H, D] in 16 bits.
        keys: [B, L, H_kv, D].
        values: [B, L, H_kv, D].
        used: [B] int32 number of positions.
        starts: where rows start if queries, and if keys, of all rows are one list, [B + 1] int32.
        scale: factor of the scores.
        window: number of last positions that are seen; all if None.

    Returns:
        [B, H, D].
    """
    from torch.nn.attention import varlen  # older versions of torch do not have it

    attended = varlen.varlen_attn(
        query, keys.flatten(0, 1), values.flatten(0, 1), *starts, 1, keys.shape[1],
        scale=scale, window_size=(-1, -1) if window is None else (window - 1, 0), enable_gqa=True,
        seqused_k=used, num_splits=1,
    )  # fmt: skip
    return cast(Tensor, attended)


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
    sliding_window: int | None = None,
    softcap: float | None = None,
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
        sliding_window: number of positions that a query sees; all if None.
        softcap: soft cap of the scores.
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
    attended = causal(query, key, value, scaling, sliding_window, softcap)
    return attended.transpose(1, 2).contiguous(), None


def use_causal(model: "PreTrainedModel", length: int) -> None:
    """Make a model of transformers attend by `causal` if that is what its attention computes.

    Otherwise it keeps its own attention: if it has sinks, or if it cannot be replaced. On a GPU,
    where `causal` has no fused kernel for them, so does a model whose windows or caps matter in
    rows of this length.

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
        known = query.shape[3] == value.shape[3] and _is_known(attention_mask, length, more)
        calls.append(known)
        return query.new_zeros((len(query), length, query.shape[1], value.shape[3])), None

    AttentionInterface.register(NAME, attend)
    AttentionInterface.register(TRIAL, noted)
    AttentionMaskInterface.register(TRIAL, eager_mask)
    model.set_attn_implementation(TRIAL)
    with torch.no_grad():
        ids = torch.zeros((1, length), dtype=torch.int64, device=model.device)
        model.base_model(ids, use_cache=False)
    model.set_attn_implementation(NAME if calls and all(calls) else own)


def _is_known(mask: Tensor | None, length: int, more: Mapping[str, Any]) -> bool:
    """Return whether `attend` computes, on this device, what a call of an attention asks for.

    Args:
        mask: what transformers adds to the scores, [1, 1, L, L].
        length: number of tokens of the row, L.
        more: what else it passes.
    """
    window, cap = more.get("sliding_window"), more.get("softcap")
    known = (*HARMLESS, "sliding_window", "softcap")
    others = [value for name, value in more.items() if name not in known]
    if mask is None or any(isinstance(value, Tensor) or value for value in others):
        return False
    if mask.device.type != "cpu" and ((window or length) < length or cap is not None):
        return False
    seen = torch.ones((length, length), dtype=torch.bool, device=mask.device).tril_()
    if window is not None:
        seen.triu_(1 - window)
    return mask.shape[2:] == seen.shape and bool(((mask == 0) == seen).all())
