"""Decode one token a row at a time with a static cache of keys and values; logits are float32.

All rows stand at the same position, which is a tensor: a step is the same operations for every
position of a bucket, so that a GPU may replay it and nothing waits for the host.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdhpc.models import frozen_head, frozen_linear

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
    """Llama with one preallocated cache and fused projections, packed for a number of rows."""

    name = "llama"
    capturable = True

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        config, base = model.config, model.base_model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_dim
        self.eps = config.rms_norm_eps
        self.embedding = base.embed_tokens.weight
        self.final_norm = base.norm.weight
        self.head = frozen_head(model.get_output_embeddings().weight, rows)
        self.layers = []
        for layer in base.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            gate_up = [mlp.gate_proj.weight, mlp.up_proj.weight]
            self.layers.append(
                (
                    layer.input_layernorm.weight,
                    frozen_linear(torch.cat(qkv), rows),
                    frozen_linear(attention.o_proj.weight, rows),
                    layer.post_attention_layernorm.weight,
                    frozen_linear(torch.cat(gate_up), rows),
                    frozen_linear(mlp.down_proj.weight, rows),
                )
            )
        device, dtype = self.embedding.device, self.embedding.dtype
        # On CPUs keys lie as the columns that a batched product wants.
        self.columns = device.type == "cpu"
        places = (len(self.layers), rows, self.kv_heads)
        size = (self.head_size, length) if self.columns else (length, self.head_size)
        self.keys = torch.zeros((*places, *size), dtype=dtype, device=device)
        self.values = torch.zeros((*places, length, self.head_size), dtype=dtype, device=device)
        theta = config.rope_parameters["rope_theta"]
        powers = torch.arange(0, self.head_size, 2, device=device).float() / self.head_size
        angle = torch.outer(torch.arange(length, device=device).float(), 1.0 / theta**powers)
        cos, sin = angle.cos(), angle.sin()
        self.cos = torch.cat([cos, cos], dim=1).to(dtype)
        self.sin = torch.cat([-sin, sin], dim=1).to(dtype)  # of the other half, with its sign

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the model is a Llama as the code above knows it."""
        config = model.config
        return (
            config.model_type == "llama"
            and config.hidden_act == "silu"
            and config.rope_parameters.get("rope_type") == "default"
            and not (config.attention_bias or config.mlp_bias)
        )

    def restart(self) -> None:
        """Later keys weigh nothing, but nothing times a number that is none is none."""
        self.keys.zero_()
        self.values.zero_()

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        x = functional.embedding(ids, self.embedding)
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        later = torch.arange(num_keys, device=x.device) > position
        hidden_keys = torch.zeros(num_keys, device=x.device).masked_fill_(later, -torch.inf)
        num_turned = self.heads + self.kv_heads
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            norm, qkv, out, mlp_norm, gate_up, down = layer
            mixed = qkv(self._norm(x, norm)).view(len(ids), -1, self.head_size)
            turned = mixed[:, :num_turned]
            turned = (turned * cos).addcmul_(turned.roll(self.head_size // 2, -1), sin)
            new_keys = turned[:, self.heads :, :, None]
            keys.index_copy_(
                3 if self.columns else 2,
                position,
                new_keys if self.columns else new_keys.transpose(2, 3),
            )
            values.index_copy_(2, position, mixed[:, num_turned:, None])
            query = turned[:, : self.heads].reshape(len(ids), self.kv_heads, -1, self.head_size)
            seen = self._attend(query, keys, values, hidden_keys)
            x = x + out(seen.reshape(len(ids), -1))
            gate, up = gate_up(self._norm(x, mlp_norm)).chunk(2, -1)
            x = x + down(functional.silu(gate).mul_(up))
        return self.head(self._norm(x, self.final_norm))

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, hidden_keys: Tensor) -> Tensor:
        """The heads that share keys, as queries of one head. [B, H_kv, G, D]."""
        num_keys = len(hidden_keys)
        values = values[:, :, :num_keys]
        if not self.columns:
            mask = hidden_keys.to(query.dtype).expand(*query.shape[:3], -1)
            return functional.scaled_dot_product_attention(
                query, keys[:, :, :num_keys], values, attn_mask=mask
            )
        # Few queries, many heads: batched products take half the time of torch's CPU kernel.
        scores = query.flatten(0, 1) @ keys[..., :num_keys].flatten(0, 1)
        scores = torch.add(hidden_keys, scores, alpha=self.head_size**-0.5)
        return scores.softmax(-1).to(query.dtype) @ values.flatten(0, 1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return weight * (wide * scale).to(x.dtype)


class TransformersDecoder:
    """Any causal language model of transformers, through its own cache; slower."""

    name = "transformers"
    capturable = False

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        model.set_attn_implementation("sdpa")  # scoring may have left one without a cache
        self.model = model
        self.past: object | None = None

    def restart(self) -> None:
        self.past = None

    def step(self, ids: Tensor, position: Tensor, num_keys: int) -> Tensor:
        out = self.model(ids[:, None], past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits


def decoder_for(model: PreTrainedModel, rows: int, length: int) -> Decoder:
    """The fastest decoder that knows this architecture."""
    kind = LlamaDecoder if LlamaDecoder.fits(model) else TransformersDecoder
    return kind(model, rows, length)
