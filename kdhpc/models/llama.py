"""Llama for inference in plain torch, so that sampling and scoring need not import transformers.

Weights come from an ordinary checkpoint folder. `kdhpc.sampling.decoding` feeds the model one token
per row at a time, `Llama.hidden` takes whole rows. The architecture is that of Touvron et al.
(arXiv 2302.13971), with grouped-query attention as in Llama 2 and, if the config has them, the
rotary frequencies of Llama 3.1.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc.models import attention
from kdhpc.models.devices import Linear, frozen_head, frozen_linear
from kdhpc.types import Json

CPU_BODY_TOKENS = 1024
"""Number of tokens that go through the layers together on CPUs, so that activations stay in the
cache."""
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""Fields of config.json, each with the only value that this module supports."""
ROPE_TYPES = ("default", "llama3")


def fits(config: Mapping[str, Json]) -> bool:
    """Return whether this module supports the model that a checkpoint's config.json describes.

    It does not support other model types, activations or rotary types, biases, or quantised
    weights.
    """
    rope = config.get("rope_parameters") or {}
    return (
        config.get("model_type") == "llama"
        and config.get("quantization_config") is None
        and all(config.get(name, value) == value for name, value in PLAIN.items())
        and rope.get("rope_type") in ROPE_TYPES
        and rope.get("partial_rotary_factor", 1.0) == 1.0
    )


class Layer(NamedTuple):
    """Weights of the norms [H] and matrix products of one layer."""

    norm: Tensor
    qkv: Linear
    """Maps H to (heads + 2 kv_heads) D: queries, keys and values."""
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    """Maps H to 2 F: gate and up."""
    down: Linear


class Llama:
    """A Llama for inference only; its weights are stored in the layout that products need."""

    kind = "llama"

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
        self.dtype, self.device = dtype, device
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        self.hidden_size, self.ffn = config["hidden_size"], config["intermediate_size"]
        self.head_size = config.get("head_dim") or self.hidden_size // self.heads
        self.vocab_size, self.num_layers = config["vocab_size"], config["num_hidden_layers"]
        self.eps = float(config["rms_norm_eps"])
        self.frequency = _frequency(self.head_size, config["rope_parameters"]).to(device)
        """[D / 2] float32 rotary frequencies."""
        hidden, ffn = self.hidden_size, self.ffn
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size

        def get(name: str, *shape: int) -> Tensor:
            # Copy, because the tensor that was read may be a view of the file.
            tensor = weights(f"{name}.weight").to(device=device, dtype=dtype, copy=True)
            if tensor.shape != shape:
                raise ValueError(f"{name} is {list(tensor.shape)}; the config says {list(shape)}")
            return tensor

        def layer(at: str) -> Layer:
            sizes = {"q": q, "k": kv, "v": kv}
            qkv = [get(f"{at}.self_attn.{x}_proj", size, hidden) for x, size in sizes.items()]
            gate_up = [get(f"{at}.mlp.{x}_proj", ffn, hidden) for x in ("gate", "up")]
            return Layer(
                norm=get(f"{at}.input_layernorm", hidden),
                qkv=frozen_linear(torch.cat(qkv)),
                out=frozen_linear(get(f"{at}.self_attn.o_proj", hidden, q)),
                mlp_norm=get(f"{at}.post_attention_layernorm", hidden),
                gate_up=frozen_linear(torch.cat(gate_up)),
                down=frozen_linear(get(f"{at}.mlp.down_proj", hidden, ffn)),
            )

        self.embedding = get("model.embed_tokens", self.vocab_size, hidden)
        self.layers = [layer(f"model.layers.{index}") for index in range(self.num_layers)]
        self.final_norm = get("model.norm", hidden)
        tied = config.get("tie_word_embeddings", False)
        self.head_weight = self.embedding if tied else get("lm_head", self.vocab_size, hidden)

    @functools.cached_property
    def head(self) -> Linear:
        """Function from hidden states [N, H] to float32 logits [N, V]."""
        return frozen_head(self.head_weight)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [length, D] of the rotary angles of all positions.

        The first half of the sines is negated, as `turn` needs it.
        """
        angle = torch.outer(torch.arange(length, device=self.device).float(), self.frequency)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([cos, cos], 1).to(self.dtype), torch.cat([-sin, sin], 1).to(self.dtype)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Apply a root-mean-square norm over the last dimension; the mean is float32."""
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(dim=-1, keepdim=True) + self.eps)
        return weight * (wide * scale).to(x.dtype)

    def feed_forward(self, x: Tensor, layer: Layer) -> Tensor:
        """Normalise hidden states [N, H] and apply the layer's SwiGLU."""
        gate, up = layer.gate_up(self.norm(x, layer.mlp_norm)).chunk(2, -1)
        return layer.down(functional.silu(gate).mul_(up))

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

    def _hidden(self, ids: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (x[:, None] for x in rotary)
        x = functional.embedding(ids.flatten(), self.embedding)
        for layer in self.layers:
            mixed = layer.qkv(self.norm(x, layer.norm)).view(*ids.shape, -1, self.head_size)
            turned = turn(mixed[:, :, : self.heads + self.kv_heads], cos, sin)
            parts = (turned[:, :, : self.heads], turned[:, :, self.heads :])
            query, key, value = (y.transpose(1, 2) for y in (*parts, mixed[:, :, -self.kv_heads :]))
            seen = attention.causal(query, key, value)  # [B, H, L, D]
            x = x + layer.out(seen.transpose(1, 2).reshape(len(x), -1))
            x = x + self.feed_forward(x, layer)
        return self.norm(x, self.final_norm).view(*ids.shape, -1)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [..., D] by the angles whose cosines and sines `Llama.rotary` returns."""
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def _frequency(head_size: int, rope: Mapping[str, Json]) -> Tensor:
    """Return the rotary frequencies [D / 2], float32.

    Llama 3.1 stretches them for long contexts: slow frequencies are divided by `factor` and fast
    ones are kept. In between, the two are interpolated by how many turns a frequency makes within
    the context length of the original training.
    """
    powers = torch.arange(0, head_size, 2).float() / head_size
    frequency: Tensor = 1.0 / float(rope["rope_theta"]) ** powers
    if rope["rope_type"] == "default":
        return frequency
    turns = float(rope["original_max_position_embeddings"]) * frequency / (2 * math.pi)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    stretched: Tensor = frequency * (kept + (1.0 - kept) / float(rope["factor"]))
    return stretched
