"""Decode one token per row at a time with a static cache of keys and values; logits are float32.

All rows are at the same position, which is stored in a tensor. A step therefore consists of the
same operations for every position of a bucket, so that a GPU can replay it and never waits for the
host.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from kdhpc.models import attention
from kdhpc.models.dense import Dense, turn
from kdhpc.models.devices import Linear, exact_matmuls, synchronize, try_or_undo
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

    def num_keys(self, position: int) -> int:
        """Return the number of keys that the step at `position` reads; see `bucket_of`."""
        ...

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        """Feed one token per row.

        Args:
            ids: [B] int64.
            position: [1] int64, the position of all these tokens.
            num_keys: number of keys to read, which decides the shapes of this step.

        Returns:
            [B, V] float32 logits of the next token.
        """
        ...


ATTENDS = {"products": (3, 2), "fused": (2, 2), "used": (1, 1)}
"""Ways to attend, with the dimensions of positions in keys and values, the rows being the first.

`products`: batched matrix products; keys are columns, which products read without copying. With few
queries and many heads they take half as long as torch's CPU kernel.
`fused`: torch's fused kernel with a mask, over the keys of a bucket.
`used`: FlashAttention over the positions that are used; their number is on the device, so that one
graph serves all positions.
"""


class DenseDecoder:
    """A dense transformer with one preallocated cache of keys and values.

    On GPUs, what lies between the matrix products is compiled into few kernels.
    """

    name = "dense"
    capturable = True

    def __init__(self, model: Dense, rows: int, length: int, *, settles: bool = True) -> None:
        """Allocate a cache.

        Args:
            model: the model.
            rows: number of rows.
            length: number of positions.
            settles: whether to look for faster kernels on a GPU, which takes about a minute.
        """
        self.model, self.head_size, self.length = model, model.head_size, length
        self.head = self._head()
        self.rows, self.key_size = rows, rows * model.kv_heads * self.head_size
        size = (2, model.num_layers, self.key_size * length)
        self.buffer = torch.zeros(size, dtype=model.dtype, device=model.device)
        self.rotary = model.rotary(length)
        rows_before = torch.arange(rows + 1, dtype=torch.int32, device=model.device)
        self.starts = rows_before, rows_before * length
        """Where rows start if the queries, and the keys, of all rows are one list."""
        self.add_norm: Callable[..., tuple[Tensor, Tensor]] = model.add_norm
        self.place: Callable[..., Tensor] = self._place
        self.activate: Callable[..., Tensor] = model.activate
        self.attend_by("products" if model.device.type == "cpu" else "fused")
        if model.device.type == "cuda" and settles:
            self.settle()

    @property
    def is_compiled(self) -> bool:
        """Whether what lies between products is compiled."""
        return self.place != self._place

    def attend_by(self, way: str) -> None:
        """Attend in one of the ways `ATTENDS` from the next sequence on."""
        self.attends = way
        self.keys, self.values = self._cache_views(self.length)

    def settle(self) -> None:
        """Take the fastest kernels that run here; the log names those that do not, and why."""
        if self.model.dtype != torch.float32 and self.model.score_cap is None:
            try_or_undo(
                lambda: self._try(lambda: self.attend_by("used")),
                lambda: self.attend_by("fused"),
                what="attention over the used length",
                instead="attention with a mask",
            )
        torch.compiler.reset()  # the sizes of an earlier model count against a limit
        eager: list[Any] = [self.add_norm, self.place, self.activate]
        compiled = [torch.compile(piece, fullgraph=True, dynamic=False) for piece in eager]

        def take(pieces: list[Any]) -> None:
            self.add_norm, self.place, self.activate = pieces

        try_or_undo(
            lambda: self._try(lambda: take(compiled)),
            lambda: take(eager),
            what="compiling what lies between products",
            instead="a kernel for each operation",
        )
        self.restart()

    def _try(self, change: Callable[[], None]) -> None:
        """Make a change, then do a step at the first and one at the last position."""
        change()
        ids = torch.zeros(self.rows, dtype=torch.int64, device=self.model.device)
        for index in (0, self.length - 1):
            self.step(ids, torch.full_like(ids[:1], index), self.num_keys(index))
        synchronize(self.model.device)

    def restart(self) -> None:
        """Clear the cache: masked keys get weight 0, but 0 times a NaN left there would be NaN."""
        self.buffer.zero_()

    def num_keys(self, position: int) -> int:
        if self.attends == "used":
            return self.length
        return bucket_of(position, self.model.device, self.length)

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        model, rows = self.model, len(ids)
        if self.attends == "products" and num_keys != self.values.shape[3]:
            self._resize_cache(num_keys)
        tables = [[table.index_select(0, position) for table in pair] for pair in self.rotary]
        seen = self._seen(position, num_keys)
        x, delta, after = model.embed(ids), None, None
        for layer, keys, values in zip(model.layers, self.keys, self.values, strict=True):
            x, normed = self.add_norm(x, delta, after, layer.norm)
            mixed = layer.qkv(normed)
            cos, sin = tables[layer.kind]
            query = self.place(mixed, layer.query_norm, cos, sin, position, keys, values)
            attended = self._attend(
                query, keys, values, seen[layer.kind], model.windows[layer.kind]
            )
            out = layer.out(attended.reshape(rows, -1))
            x, normed = self.add_norm(x, out, layer.out_norm, layer.mlp_norm)
            delta, after = layer.down(self.activate(layer.gate_up(normed))), layer.down_norm
        return self.head(self.add_norm(x, delta, after, model.final_norm)[1])

    def _place(
        self,
        mixed: Tensor,
        query_norm: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        position: Tensor,
        keys: Tensor,
        values: Tensor,
    ) -> Tensor:
        """Turn queries and keys, and write keys and values of a position to the cache of a layer.

        Returns:
            Queries [B, H_kv, G, D]; the G heads that share keys are next to each other.
        """
        heads, kv_heads = self.model.heads, self.model.kv_heads
        turning, new_values = self.model.split(mixed, query_norm)
        turned = turn(turning, cos, sin)
        of_keys, of_values = ATTENDS[self.attends]
        keys.index_copy_(of_keys, position, turned[:, heads:].unsqueeze(of_keys))
        values.index_copy_(of_values, position, new_values.unsqueeze(of_values))
        return turned[:, :heads].reshape(len(mixed), kv_heads, -1, self.head_size)

    def _seen(self, position: Tensor, num_keys: int) -> list[Tensor]:
        """Return, for each kind of layer, which keys are seen.

        Returns:
            What is added to their scores [num_keys], or for `used` how many they are, [B] int32.
        """
        if self.attends == "used":
            used = (position + 1).to(torch.int32).repeat(self.rows)
            return [used] * len(self.model.windows)
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
            Keys and values [layers, B, H_kv, D] with L positions as `ATTENDS` says.
        """
        views = []
        for part, dim in zip(self.buffer, ATTENDS[self.attends], strict=True):
            shape = [self.model.num_layers, self.rows, self.model.kv_heads, self.head_size]
            shape.insert(1 + dim, num_keys)
            views.append(part[:, : self.key_size * num_keys].view(shape))
        return views[0], views[1]

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

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, window: int | None
    ) -> Tensor:
        """Attend with queries [B, H_kv, G, D] of the current position.

        Args:
            query: queries; the G heads that share keys are rows of one product.
            keys: keys of this layer.
            values: values of this layer.
            seen: the keys that are seen, as `_seen` returns them.
            window: number of positions that are seen at most.

        Returns:
            B x H_kv x G x D numbers in this order.
        """
        scale, cap = self.model.scale, self.model.score_cap
        if self.attends == "used":
            return attention.over_used(
                query.flatten(1, 2), keys, values, seen, self.starts, scale=scale, window=window
            )
        if self.attends == "fused":
            keys, values = keys[:, :, : len(seen)], values[:, :, : len(seen)]
            if cap is None:
                mask = seen.expand(*query.shape[:3], -1)
                return attention.fused(query, keys, values, attn_mask=mask, scale=scale)
            keys = keys.transpose(2, 3)  # fused kernels have no cap
        scores = (query * scale).flatten(0, 1) @ keys.flatten(0, 1)
        if cap is not None:
            scores.div_(cap).tanh_().mul_(cap)
        attended: Tensor = scores.add_(seen).softmax(-1) @ values.flatten(0, 1)
        return attended


class TransformersDecoder:
    """Any causal language model of transformers with its own cache; slower than `DenseDecoder`."""

    name = "transformers"
    capturable = False

    def __init__(self, model: "TransformersModel", rows: int, length: int) -> None:
        self.body, self.head = model.model.base_model, model.head
        self.past: object | None = None

    def restart(self) -> None:
        self.past = None

    def num_keys(self, position: int) -> int:
        return position + 1

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        out = self.body(ids[:, None], past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        return self.head(out.last_hidden_state[:, -1])


def decoder_for(model: LanguageModel, rows: int, length: int, *, settles: bool = True) -> Decoder:
    """Return the decoder for this model; see `DenseDecoder.settle`."""
    if isinstance(model, Dense):
        return DenseDecoder(model, rows, length, settles=settles)
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
    decoder = decoder_for(model, rows, length, settles=False)  # two rows are not worth compiling
    decoder.restart()
    position = torch.zeros(1, dtype=torch.int64, device=model.device)
    steps = []
    with exact_matmuls():
        for index in range(length - 1):
            logits = decoder.step(ids[:, index], position, decoder.num_keys(index))
            steps.append(logits.log_softmax(1).gather(1, ids[:, index + 1, None]))
            position += 1
    [whole] = token_log_probs(model, ids, head_tokens=1024)
    return float((torch.cat(steps, 1) - whole[:, 1:]).abs().mean())
