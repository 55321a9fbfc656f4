"""Dense decoder-only transformers for inference in plain torch: Llama, and families like it.

Sampling and scoring then need not import transformers. Weights come from an ordinary checkpoint
folder. `kdhpc.sampling.decoding` feeds a model one token per row at a time, `Dense.hidden` takes
whole rows.

All these models have grouped-query attention with rotary positions and gated feed-forward layers,
as in Llama (Touvron et al., arXiv 2302.13971). What else differs is data: `FAMILIES` says where a
family normalises, and config.json which products have biases, which layers see only a window, and
what is capped.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.models import attention
from kdhpc.models.devices import Linear, frozen_head, frozen_linear
from kdhpc.models.head import PLAIN, Logits
from kdhpc.types import Json

CPU_BODY_TOKENS = 1024
"""Number of tokens that go through the layers together on CPUs, so that activations stay in the
cache."""
ROPE_TYPES = ("default", "linear", "llama3")
ACTIVATIONS: dict[str, Linear] = {
    "silu": functional.silu,
    "gelu_pytorch_tanh": functools.partial(functional.gelu, approximate="tanh"),
}
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the blocks of a family differ from Llama's, beyond what config.json says."""

    norms: tuple[str | None, str | None, str | None, str | None] = (
        "input_layernorm", None, "post_attention_layernorm", None,
    )  # fmt: skip
    """Names of the norms of what attention reads and returns, and of what the feed-forward layer
    reads and returns; None where there is no norm."""
    query_norm: Literal["head", "whole"] | None = None
    """Whether queries and keys are normalised, by head or over all heads."""
    qkv_bias: bool | None = None
    """Whether queries, keys and values have biases; None if `attention_bias` says whether they and
    the output do."""
    wide: bool = False
    """Whether norms multiply by their weights before they round to 16 bits."""
    gemma: bool = False
    """Whether weights of norms are stored as differences from 1, embeddings are multiplied by the
    square root of their size, and `query_pre_attn_scalar`, `hidden_activation` and
    `final_logit_softcapping` count."""
    wide_rotary: bool = False
    """Whether rotary positions are applied in float32."""
    mlp_bias: bool = False
    """Whether `mlp_bias` counts."""
    caps_scores: bool = False
    """Whether attention caps its scores at `attn_logit_softcapping`."""
    window: Literal["all", "listed"] | None = None
    """Which layers see the last `sliding_window` positions only: all of them, or those that
    `layer_types` lists."""


_GEMMA = Family(
    norms=(
        "input_layernorm", "post_attention_layernorm",
        "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
    wide=True,
    gemma=True,
    window="listed",
)  # fmt: skip
FAMILIES = {
    "llama": Family(mlp_bias=True),
    "mistral": Family(qkv_bias=False, window="all"),
    "qwen2": Family(qkv_bias=True, window="listed"),
    "qwen3": Family(query_norm="head", window="listed"),
    "olmo2": Family(
        norms=(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
        query_norm="whole",
        wide=True,
        wide_rotary=True,
    ),
    "gemma2": replace(_GEMMA, caps_scores=True),
    "gemma3_text": replace(_GEMMA, query_norm="head"),
}
"""By the model type of transformers."""


def fits(config: Mapping[str, Json]) -> bool:
    """Return whether this module supports the model that a checkpoint's config.json describes.

    It does not support other model types, activations or rotary types, attention to later
    positions, or quantised weights.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None or _activation(config, family) not in ACTIVATIONS:
        return False
    if family.window == "listed" and not {*(config.get("layer_types") or [None])} <= {
        FULL,
        SLIDING,
    }:
        return False
    ropes = [_rope(config, kind) for kind in (FULL, SLIDING)]
    return (
        config.get("quantization_config") is None
        and not config.get("use_bidirectional_attention")
        and config.get("is_causal", True)
        and all(rope.get("rope_type") in ROPE_TYPES for rope in ropes)
        and all(rope.get("partial_rotary_factor", 1.0) == 1.0 for rope in ropes)
    )


def _activation(config: Mapping[str, Json], family: Family) -> str:
    if family.gemma:
        return str(config.get("hidden_activation", "gelu_pytorch_tanh"))
    return str(config.get("hidden_act", "silu"))


def _rope(config: Mapping[str, Json], kind: str) -> Mapping[str, Json]:
    """Return the rotary parameters of the layers of a kind; some families have one for each."""
    rope: Mapping[str, Json] = config.get("rope_parameters") or {}
    return rope.get(kind) or rope


class Layer(NamedTuple):
    """Weights of the norms and matrix products of one layer; None where there is no norm."""

    kind: int
    """Index of the layer's kind in `Dense.windows`."""
    norm: Tensor | None
    """[H]"""
    qkv: Linear
    """Maps H to (heads + 2 kv_heads) D: queries, keys and values."""
    query_norm: Tensor | None
    """[heads + kv_heads, D], for queries and keys."""
    out: Linear
    out_norm: Tensor | None
    mlp_norm: Tensor | None
    gate_up: Linear
    """Maps H to 2 F: gate and up."""
    down: Linear
    down_norm: Tensor | None


class Dense:
    """A dense transformer for inference; its weights are stored in the layout of its products."""

    def __init__(
        self,
        config: Mapping[str, Json],
        weights: Callable[[str], Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Build the model from the weights of a checkpoint.

        Args:
            config: the checkpoint's config.json, for which `fits` returns True.
            weights: returns a tensor by the name that transformers gives it.
            dtype: dtype of weights and hidden states.
            device: device to compute on.

        Raises:
            KeyError: if a field or tensor is missing.
            TypeError: if a field is not a number.
            ValueError: if a weight has another shape than the config says.
        """
        self.dtype, self.device, self.kind = dtype, device, str(config["model_type"])
        self.family = family = FAMILIES[self.kind]
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.hidden_size, self.ffn = config["hidden_size"], config["intermediate_size"]
        self.head_size = config.get("head_dim") or self.hidden_size // self.heads
        self.vocab_size, self.num_layers = config["vocab_size"], config["num_hidden_layers"]
        self.eps = float(config["rms_norm_eps"])
        self.activation = _activation(config, family)
        scalar = config["query_pre_attn_scalar"] if family.gemma else self.head_size
        self.scale = float(scalar) ** -0.5
        """Factor of the scores of attention."""
        self.score_cap = config.get("attn_logit_softcapping") if family.caps_scores else None
        self.logits = Logits(cap=config["final_logit_softcapping"] if family.gemma else None)
        """What is made of the products with the head."""
        usual = SLIDING if family.window == "all" else FULL
        kinds = config["layer_types"] if family.window == "listed" else [usual] * self.num_layers
        names = sorted(set(kinds))
        self.windows = [config["sliding_window"] if kind == SLIDING else None for kind in names]
        """By kind of layer, the number of positions that are seen; None for all."""
        self.frequencies = [
            _frequency(self.head_size, _rope(config, kind)).to(device) for kind in names
        ]
        """By kind of layer, [D / 2] float32 rotary frequencies."""
        hidden, ffn = self.hidden_size, self.ffn
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        biased = bool(config.get("attention_bias"))
        qkv_bias = biased if family.qkv_bias is None else family.qkv_bias
        out_bias = biased and family.qkv_bias is None
        mlp_bias = family.mlp_bias and bool(config.get("mlp_bias"))

        def get(name: str, *shape: int) -> Tensor:
            # Copy, because the tensor that was read may be a view of the file.
            tensor = weights(name).to(device=device, dtype=dtype, copy=True)
            if tensor.shape != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}; the config says {list(shape)}")
            return tensor

        def linear(names: Mapping[str, int], size: int, *, bias: bool) -> Linear:
            parts = [get(f"{name}.weight", out, size) for name, out in names.items()]
            biases = [get(f"{name}.bias", out) for name, out in names.items() if bias]
            return frozen_linear(torch.cat(parts), torch.cat(biases) if bias else None)

        def norm(name: str, size: int) -> Tensor:
            weight = get(f"{name}.weight", size)
            weight = weight.float() if family.wide else weight
            return weight + 1.0 if family.gemma else weight

        def query_norm(at: str) -> Tensor | None:
            if family.query_norm is None:
                return None
            parts = []
            for name, heads in (("q_norm", self.heads), ("k_norm", self.kv_heads)):
                own = heads if family.query_norm == "whole" else 1
                weight = norm(f"{at}.{name}", own * self.head_size)
                parts.append(weight.view(own, self.head_size).expand(heads, -1))
            return torch.cat(parts)

        def layer(index: int) -> Layer:
            at = f"model.layers.{index}"
            attend, mlp = f"{at}.self_attn", f"{at}.mlp"
            norms = [
                None if name is None else norm(f"{at}.{name}", hidden) for name in family.norms
            ]
            projections = {f"{attend}.q_proj": q, f"{attend}.k_proj": kv, f"{attend}.v_proj": kv}
            return Layer(
                kind=names.index(kinds[index]),
                norm=norms[0],
                qkv=linear(projections, hidden, bias=qkv_bias),
                query_norm=query_norm(attend),
                out=linear({f"{attend}.o_proj": hidden}, q, bias=out_bias),
                out_norm=norms[1],
                mlp_norm=norms[2],
                gate_up=linear(
                    {f"{mlp}.gate_proj": ffn, f"{mlp}.up_proj": ffn}, hidden, bias=mlp_bias
                ),
                down=linear({f"{mlp}.down_proj": hidden}, ffn, bias=mlp_bias),
                down_norm=norms[3],
            )

        self.embedding = get("model.embed_tokens.weight", self.vocab_size, hidden)
        self.embedding_scale = float(torch.tensor(hidden**0.5).to(dtype)) if family.gemma else None
        self.layers = [layer(index) for index in range(self.num_layers)]
        self.final_norm = norm("model.norm", hidden)
        tied = config.get("tie_word_embeddings", False)
        self.head_weight = (
            self.embedding if tied else get("lm_head.weight", self.vocab_size, hidden)
        )

    @functools.cached_property
    def head(self) -> Linear:
        """Function from hidden states [N, H] to float32 logits [N, V]."""
        return self.capped(frozen_head(self.head_weight))

    def capped(self, head: Linear) -> Linear:
        """Return a head whose logits are capped as the config says."""
        form = self.logits
        return head if form == PLAIN else lambda x: form.from_products(head(x))

    def rotary(self, length: int) -> list[tuple[Tensor, Tensor]]:
        """Return cosines and sines [length, D] of the rotary angles of all positions.

        There is a pair for each kind of layer. The first half of the sines is negated, as `turn`
        needs it.
        """
        positions = torch.arange(length, device=self.device).float()
        dtype, tables = torch.float32 if self.family.wide_rotary else self.dtype, []
        for frequency in self.frequencies:
            angle = torch.outer(positions, frequency)
            cos, sin = angle.cos(), angle.sin()
            tables.append((torch.cat([cos, cos], 1).to(dtype), torch.cat([-sin, sin], 1).to(dtype)))
        return tables

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [N, H] of ids [N]."""
        x = functional.embedding(ids, self.embedding)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Apply a root-mean-square norm over the last dimension, if there is one.

        The mean is float32.
        """
        if weight is None:
            return x
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return (weight * (wide * scale).to(weight.dtype)).to(x.dtype)

    def add_norm(
        self, x: Tensor, delta: Tensor | None, after: Tensor | None, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Add what a part of a layer returns to the hidden states, and normalise them for the next.

        Args:
            x: [N, H] hidden states.
            delta: [N, H] what is added; None before the first part.
            after: weight of the norm of `delta`.
            before: weight of the norm of the sum.

        Returns:
            The sum and its norm, each [N, H].
        """
        if delta is not None:
            x = x + self.norm(delta, after)
        return x, self.norm(x, before)

    def split(self, mixed: Tensor, query_norm: Tensor | None) -> tuple[Tensor, Tensor]:
        """Split projections [N, (heads + 2 kv_heads) D], and normalise queries and keys.

        Returns:
            Queries and keys [N, heads + kv_heads, D] without positions; values [N, kv_heads, D].
        """
        mixed = mixed.view(len(mixed), -1, self.head_size)
        turning, values = mixed[:, : -self.kv_heads], mixed[:, -self.kv_heads :]
        if query_norm is not None and self.family.query_norm == "whole":
            own = torch.tensor_split(turning, [self.heads], 1)
            weights = torch.tensor_split(query_norm, [self.heads])
            normed = [
                self.norm(x.flatten(1), weight.flatten()).view_as(x)
                for x, weight in zip(own, weights, strict=True)
            ]
            return torch.cat(normed, 1), values
        return self.norm(turning, query_norm), values

    def activate(self, gate_up: Tensor) -> Tensor:
        """Return act(gate) * up [N, F] for the gate and up [N, 2 F] of a feed-forward layer."""
        gate, up = gate_up.chunk(2, -1)
        return ACTIVATIONS[self.activation](gate).mul_(up)

    def hidden(self, ids: Tensor) -> Tensor:
        """Return the last hidden states, normalised, under causal attention over whole rows.

        Args:
            ids: [B, L] int64, padded on the right or not at all.

        Returns:
            [B, L, H].
        """
        rows, length = ids.shape
        together = max(1, CPU_BODY_TOKENS // length) if self.device.type == "cpu" else rows
        rotary = self.rotary(length)
        return torch.cat([self._hidden(part, rotary) for part in torch.split(ids, together)])

    def _hidden(self, ids: Tensor, rotary: list[tuple[Tensor, Tensor]]) -> Tensor:
        tables = [(cos[:, None], sin[:, None]) for cos, sin in rotary]
        x, delta, after = self.embed(ids.flatten()), None, None
        for layer in self.layers:
            x, normed = self.add_norm(x, delta, after, layer.norm)
            split = self.split(layer.qkv(normed), layer.query_norm)
            turning, values = (y.view(*ids.shape, *y.shape[1:]) for y in split)
            turned = turn(turning, *tables[layer.kind])
            parts = (turned[:, :, : self.heads], turned[:, :, self.heads :], values)
            query, key, value = (y.transpose(1, 2) for y in parts)
            seen = attention.causal(  # [B, heads, L, D]
                query,
                key,
                value,
                scale=self.scale,
                window=self.windows[layer.kind],
                cap=self.score_cap,
            )
            out = layer.out(seen.transpose(1, 2).reshape(len(x), -1))
            x, normed = self.add_norm(x, out, layer.out_norm, layer.mlp_norm)
            delta, after = layer.down(self.activate(layer.gate_up(normed))), layer.down_norm
        return self.add_norm(x, delta, after, self.final_norm)[1].view(*ids.shape, -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [..., D] by the angles whose cosines and sines `Dense.rotary` returns."""
    wide = x.to(cos.dtype)
    return (wide * cos).addcmul_(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def _frequency(head_size: int, rope: Mapping[str, Json]) -> Tensor:
    """Return the rotary frequencies [D / 2], float32.

    With `linear`, all are divided by `factor`. Llama 3.1 does so with slow frequencies only and
    keeps fast ones. In between, the two are interpolated by how many turns a frequency makes within
    the context length of the original training.
    """
    powers = torch.arange(0, head_size, 2).float() / head_size
    frequency: Tensor = 1.0 / float(rope["rope_theta"]) ** powers
    if rope["rope_type"] == "default":
        return frequency
    if rope["rope_type"] == "linear":
        return frequency / float(rope["factor"])
    turns = float(rope["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    stretched: Tensor = frequency * (kept + (1.0 - kept) / float(rope["factor"]))
    return stretched
