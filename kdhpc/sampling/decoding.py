"""Decode one token a row at a time with a static cache of keys and values; logits are float32.

All rows stand at the same position, which is a tensor: a step is the same operations for every
position of a bucket, so that a GPU may replay it and nothing waits for the host.
"""

from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.models.devices import Linear
from kdhpc.models.llama import Llama, turn
from kdhpc.models.loading import LanguageModel

if TYPE_CHECKING:
    from kdhpc.models.huggingface import TransformersModel

BUCKET = {"cpu": 16, "cuda": 64}
"""Keys are read up to the position rounded up to this: few shapes on GPUs, few keys on CPUs."""


def bucket_of(position: int, device: torch.device, length: int) -> int:
    """Number of keys that a step reads which feeds the token at `position`."""
    size = BUCKET.get(device.type, BUCKET["cuda"])
    return min((position // size + 1) * size, length)


class Decoder(Protocol):
    """A model that is fed one token a row and answers with the next logits."""

    name: str
    capturable: bool
    """Whether a step may be captured as a CUDA graph."""

    def restart(self) -> None:
        """Forget every key: the next token stands at position 0."""
        ...

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        """Feed one token a row.

        Args:
            ids: [B] int64.
            position: [1] int64, where all of them stand.
            num_keys: keys to read, more than `position`; the same for a bucket of positions.

        Returns:
            [B, V] float32 logits of the next token.
        """
        ...


class LlamaDecoder:
    """Llama with one preallocated cache."""

    name = "llama"
    capturable = True

    def __init__(self, model: Llama, rows: int, length: int) -> None:
        self.model, self.head_size = model, model.head_size
        self.head = self._head()
        device, dtype = model.device, model.dtype
        # On CPUs keys lie as the columns that a batched product wants.
        self.columns = device.type == "cpu"
        self.rows, self.key_size = rows, rows * model.kv_heads * self.head_size
        size = self.key_size * length
        self.room = torch.zeros((2, model.num_layers, size), dtype=dtype, device=device)
        self.keys, self.values = self._spread(length)
        self.cos, self.sin = model.rotary(length)

    def restart(self) -> None:
        """Later keys weigh nothing, but nothing times a number that is none is none."""
        self.room.zero_()

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        model, heads = self.model, self.model.heads
        if self.columns and num_keys != self.values.shape[3]:
            self._respread(num_keys)
        x = functional.embedding(ids, model.embedding)
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        later = torch.arange(num_keys, device=x.device) > position
        mask = torch.zeros_like(later, dtype=x.dtype).masked_fill_(later, -torch.inf)
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            mixed = layer.qkv(model.norm(x, layer.norm)).view(len(ids), -1, self.head_size)
            turned = turn(mixed[:, : -model.kv_heads], cos, sin)
            new_keys = turned[:, heads:, :, None]
            keys.index_copy_(
                3 if self.columns else 2,
                position,
                new_keys if self.columns else new_keys.transpose(2, 3),
            )
            values.index_copy_(2, position, mixed[:, -model.kv_heads :, None])
            query = turned[:, :heads].reshape(len(ids), model.kv_heads, -1, self.head_size)
            seen = self._attend(query, keys, values, mask)
            x = x + layer.out(seen.reshape(len(ids), -1))
            x = x + model.feed_forward(x, layer)
        return self.head(model.norm(x, model.final_norm))

    def _head(self) -> Linear:
        """Float32 logits of hidden states."""
        return self.model.head

    def _spread(self, num_keys: int) -> tuple[Tensor, Tensor]:
        """The room as keys and values that lie densely for so many positions.

        Both are [layers, B, H_kv, L, D], keys on CPUs [layers, B, H_kv, D, L].
        """
        places = (self.model.num_layers, self.rows, self.model.kv_heads)
        rows, columns = (num_keys, self.head_size), (self.head_size, num_keys)
        keys, values = self.room[:, :, : self.key_size * num_keys]
        return keys.view(*places, *(columns if self.columns else rows)), values.view(*places, *rows)

    def _respread(self, num_keys: int) -> None:
        """Lay keys and values out for another number of positions: products copy what is not dense.

        Nothing of other rows stays beside them: it would be hidden, but not if it were no number.
        """
        before = self.keys, self.values
        self.keys, self.values = self._spread(num_keys)
        for old, new, dim in ((before[0], self.keys, -1), (before[1], self.values, -2)):
            kept = min(old.shape[dim], num_keys)
            for source, target in zip(old, new, strict=True):
                found = source.narrow(dim, 0, kept).clone()
                target.zero_().narrow(dim, 0, kept).copy_(found)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """The heads that share keys, as queries of one head. [B, H_kv, G, D]."""
        if not self.columns:
            num_keys = len(mask)
            return functional.scaled_dot_product_attention(
                query,
                keys[:, :, :num_keys],
                values[:, :, :num_keys],
                attn_mask=mask.expand(*query.shape[:3], -1),
            )
        # Few queries, many heads: batched products take half the time of torch's CPU kernel.
        scores = (query * self.head_size**-0.5).flatten(0, 1) @ keys.flatten(0, 1)
        seen: Tensor = scores.add_(mask).softmax(-1) @ values.flatten(0, 1)
        return seen


class TransformersDecoder:
    """Any causal language model of transformers, through its own cache; slower."""

    name = "transformers"
    capturable = False

    def __init__(self, model: "TransformersModel", rows: int, length: int) -> None:
        self.model = model.model
        self.past: object | None = None

    def restart(self) -> None:
        self.past = None

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        out = self.model(ids[:, None], past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits


def decoder_for(model: LanguageModel, rows: int, length: int) -> Decoder:
    """What decodes this model."""
    if isinstance(model, Llama):
        return LlamaDecoder(model, rows, length)
    return TransformersDecoder(cast("TransformersModel", model), rows, length)
