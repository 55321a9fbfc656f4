"""Decode one token per row at a time with a static cache of keys and values; logits are float32.

All rows are at the same position, which is stored in a tensor. A step therefore consists of the
same operations for every position of a bucket, so that a GPU can replay it and never waits for the
host.
"""

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor

from kdhpc.models import attention
from kdhpc.models.dense import Dense, turn
from kdhpc.models.devices import Linear, exact_matmuls
from kdhpc.models.loading import LanguageModel
from kdhpc.scoring.likelihood import token_log_probs

if TYPE_CHECKING:
    from kdhpc.models.huggingface import TransformersModel

BUCKET = {"cpu": 16, "cuda": 64}
"""The number of keys that a step reads is a multiple of this. It is large on GPUs, where every
number of keys needs a CUDA graph, and small on CPUs, where every key costs time."""


def bucket_of(position: int, device: torch.device, length: int) -> int:
    """Return the number of keys that a step reads when it feeds the tokens at `position`."""
    size = BUCKET.get(device.type, BUCKET["cuda"])
    return min((position // size + 1) * size, length)


class Decoder(Protocol):
    """A model that takes one token per row and returns the logits of the next."""

    name: str
    capturable: bool
    """Whether a step may be captured as a CUDA graph."""

    def restart(self) -> None:
        """Forget all keys and values, so that the next token is at position 0."""
        ...

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        """Feed one token per row.

        Args:
            ids: [B] int64.
            position: [1] int64, the position of all these tokens.
            num_keys: number of keys to read, more than `position`; see `bucket_of`.

        Returns:
            [B, V] float32 logits of the next token.
        """
        ...


class DenseDecoder:
    """A dense transformer with one preallocated cache of keys and values."""

    name = "dense"
    capturable = True

    def __init__(self, model: Dense, rows: int, length: int) -> None:
        self.model, self.head_size = model, model.head_size
        self.head = self._head()
        device, dtype = model.device, model.dtype
        # On CPUs keys are stored as columns, which batched products read without copying.
        self.columns = device.type == "cpu"
        self.rows, self.key_size = rows, rows * model.kv_heads * self.head_size
        size = self.key_size * length
        self.buffer = torch.zeros((2, model.num_layers, size), dtype=dtype, device=device)
        self.keys, self.values = self._cache_views(length)
        self.rotary = model.rotary(length)

    def restart(self) -> None:
        """Clear the cache: masked keys get weight 0, but 0 times a NaN left there would be NaN."""
        self.buffer.zero_()

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        model, heads = self.model, self.model.heads
        if self.columns and num_keys != self.values.shape[3]:
            self._resize_cache(num_keys)
        x = model.embed(ids)
        tables = [[table.index_select(0, position) for table in pair] for pair in self.rotary]
        masks = self._masks(position, num_keys)
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            turning, new_values = model.project(x, layer)
            turned = turn(turning, *tables[layer.kind])
            new_keys = turned[:, heads:, :, None]
            keys.index_copy_(
                3 if self.columns else 2,
                position,
                new_keys if self.columns else new_keys.transpose(2, 3),
            )
            values.index_copy_(2, position, new_values[:, :, None])
            query = turned[:, :heads].reshape(len(ids), model.kv_heads, -1, self.head_size)
            seen = self._attend(query, keys, values, masks[layer.kind])
            x = model.finish(x, seen.reshape(len(ids), -1), layer)
        return self.head(model.norm(x, model.final_norm))

    def _masks(self, position: Tensor, num_keys: int) -> list[Tensor]:
        """Return what is added to the scores of keys [num_keys] in each kind of layer."""
        keys, masks = torch.arange(num_keys, device=position.device), []
        for window in self.model.windows:
            unseen = keys > position
            if window is not None and window < num_keys:
                unseen = unseen | (keys <= position - window)
            mask = torch.zeros_like(unseen, dtype=self.model.dtype)
            masks.append(mask.masked_fill_(unseen, -torch.inf))
        return masks

    def _head(self) -> Linear:
        """Return the function from hidden states to float32 logits."""
        return self.model.head

    def _cache_views(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """View the start of the buffer as contiguous keys and values of `num_keys` positions.

        Returns:
            Keys and values, both [layers, B, H_kv, L, D]; on CPUs keys are [layers, B, H_kv, D, L].
        """
        outer = (self.model.num_layers, self.rows, self.model.kv_heads)
        rows, columns = (num_keys, self.head_size), (self.head_size, num_keys)
        keys, values = self.buffer[:, :, : self.key_size * num_keys]
        return keys.view(*outer, *(columns if self.columns else rows)), values.view(*outer, *rows)

    def _resize_cache(self, num_keys: int) -> None:
        """Rearrange the cache for another number of positions, as products copy strided tensors.

        Positions that are not kept are zeroed: the mask hides what remains of other rows, except
        NaN.
        """
        before = self.keys, self.values
        self.keys, self.values = self._cache_views(num_keys)
        for old, new, dim in ((before[0], self.keys, -1), (before[1], self.values, -2)):
            num_kept = min(old.shape[dim], num_keys)
            for source, target in zip(old, new, strict=True):
                kept = source.narrow(dim, 0, num_kept).clone()
                target.zero_().narrow(dim, 0, num_kept).copy_(kept)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attend with query [B, H_kv, G, D]; the G heads that share keys are rows of one product.

        Returns:
            [B, H_kv, G, D], on CPUs [B x H_kv, G, D].
        """
        scale, cap = self.model.scale, self.model.score_cap
        if not self.columns:
            keys, values = keys[:, :, : len(mask)], values[:, :, : len(mask)]
            if cap is None:
                mask = mask.expand(*query.shape[:3], -1)
                return attention.fused(query, keys, values, attn_mask=mask, scale=scale)
            keys = keys.transpose(2, 3)
        # With few queries and many heads, batched products take half as long as torch's CPU kernel,
        # and its fused kernels have no caps.
        scores = (query * scale).flatten(0, 1) @ keys.flatten(0, 1)
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        seen: Tensor = scores.add_(mask).softmax(-1) @ values.flatten(0, 1)
        return seen


class TransformersDecoder:
    """Any causal language model of transformers with its own cache; slower than `DenseDecoder`."""

    name = "transformers"
    capturable = False

    def __init__(self, model: "TransformersModel", rows: int, length: int) -> None:
        self.body, self.head = model.model.base_model, model.head
        self.past: object | None = None

    def restart(self) -> None:
        self.past = None

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        out = self.body(ids[:, None], past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return self.head(out.last_hidden_state[:, -1])


def decoder_for(model: LanguageModel, rows: int, length: int) -> Decoder:
    """Return the decoder for this model."""
    if isinstance(model, Dense):
        return DenseDecoder(model, rows, length)
    return TransformersDecoder(cast("TransformersModel", model), rows, length)


@torch.inference_mode()
def difference_of_steps(model: LanguageModel, length: int) -> float:
    """Return by how many nats a token's log-probability differs between steps and whole rows.

    Args:
        model: a causal language model.
        length: number of positions of the two rows of random ids that are compared.

    Returns:
        The mean over all tokens but the first of each row; NaN if the model gives NaN.
    """
    rows = 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (rows, length), generator=generator).to(model.device)
    decoder = decoder_for(model, rows, length)
    decoder.restart()
    position = torch.zeros(1, dtype=torch.int64, device=model.device)
    steps = []
    with exact_matmuls():
        for index in range(length - 1):
            keys = bucket_of(index, model.device, length)
            logits = decoder.step(ids[:, index], position, keys)
            steps.append(logits.log_softmax(1).gather(1, ids[:, index + 1, None]))
            position += 1
    [whole] = token_log_probs(model, ids, head_tokens=1024)
    return float((torch.cat(steps, 1) - whole[:, 1:]).abs().mean())
