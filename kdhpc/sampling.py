"""Exact ancestral sampling with a static cache: prompt in, ids and their log-probabilities out.

All rows of a batch stand at the same position, so the cache is one preallocated block and nothing
is scheduled. Logits are float32 and the draw is exact over the whole vocabulary: uniforms of 53
bits from the stream of each sequence, weights summed in float64. A row's ids depend on its own
stream and on the batch shape, never on what shares the batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from kdhpc import seeding
from kdhpc.models import exact_matmuls
from kdhpc.store import Samples

BLOCK = 256
"""Vocabulary entries summed together in the first level of the draw."""


@dataclass(frozen=True, kw_only=True)
class Selector:
    """What is drawn from: the model's distribution, sharpened or truncated."""

    tau: float = 1.0
    """Divides logits."""
    top_k: int = 0
    """Keep this many most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens that hold this much probability; 1 keeps all."""

    def select(self, logits: Tensor) -> Tensor:
        """Logits of the distribution to draw from, -inf where nothing may be drawn. [B, V]."""
        chosen = logits / self.tau if self.tau != 1.0 else logits
        if self.top_k:
            least = chosen.topk(min(self.top_k, chosen.shape[1]), dim=1).values[:, -1:]
            chosen = chosen.masked_fill(chosen < least, -torch.inf)
        if self.top_p < 1.0:
            ordered, order = chosen.sort(dim=1, descending=True)
            probability = ordered.double().softmax(dim=1)
            late = probability.cumsum(dim=1) - probability >= self.top_p
            dropped = torch.zeros_like(late).scatter(1, order, late)
            chosen = chosen.masked_fill(dropped, -torch.inf)
        return chosen


def draw_inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution.

    Blocks of the vocabulary are summed in float64, the block is found, then the token inside it.

    Args:
        logits: [B, V] float32, -inf where a token is impossible.
        uniform: [B] float64 in [0, 1).

    Returns:
        ids [B] int64 and their log-probabilities [B] float64 in nats.
    """
    rows, vocab_size = logits.shape
    weight = torch.exp(logits - logits.amax(dim=1, keepdim=True))
    weight = functional.pad(weight, (0, -vocab_size % BLOCK)).view(rows, -1, BLOCK)
    block_ends = weight.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    total = block_ends[:, -1:]
    target = uniform[:, None] * total
    block = _first_above(block_ends, target)
    start = functional.pad(block_ends, (1, 0)).gather(1, block)
    inside = weight.gather(1, block[:, :, None].expand(rows, 1, BLOCK)).squeeze(1)
    token = _first_above(inside.double().cumsum(dim=1), target - start)
    log_prob = inside.gather(1, token).double().log() - total.log()
    return (block * BLOCK + token).squeeze(1), log_prob.squeeze(1)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Index of the first of the rising `ends` above `target`; such a one always has weight."""
    below_last = torch.nextafter(ends[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(ends, torch.minimum(target, below_last), right=True)


def draw_gumbel(logits: Tensor, gumbel: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row as the largest of logits plus standard Gumbel noise.

    Args:
        logits: [B, V] float32.
        gumbel: [B, V] float64.

    Returns:
        ids [B] int64 and their log-probabilities [B] float64 in nats.
    """
    token = (logits.double() + gumbel).argmax(dim=1)
    log_prob = logits.double().log_softmax(dim=1).gather(1, token[:, None]).squeeze(1)
    return token, log_prob


class Decoder(Protocol):
    """A model that is fed one token a row and answers with the next logits."""

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Feed ids [B] at `position`; returns logits [B, V] float32."""
        ...


class LlamaDecoder:
    """Llama with one preallocated cache and fused projections."""

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        config, base = model.config, model.base_model
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.head_dim
        self.eps = config.rms_norm_eps
        self.embedding = base.embed_tokens.weight
        self.final_norm = base.norm.weight
        self.head = model.get_output_embeddings().weight.float()
        self.layers = [
            {
                "norm1": layer.input_layernorm.weight,
                "qkv": torch.cat(
                    [
                        layer.self_attn.q_proj.weight,
                        layer.self_attn.k_proj.weight,
                        layer.self_attn.v_proj.weight,
                    ]
                ),
                "out": layer.self_attn.o_proj.weight,
                "norm2": layer.post_attention_layernorm.weight,
                "gate_up": torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                "down": layer.mlp.down_proj.weight,
            }
            for layer in base.layers
        ]
        device, dtype = self.embedding.device, self.embedding.dtype
        self.cache = torch.zeros(
            (len(self.layers), 2, rows, self.kv_heads, length, self.head_size),
            dtype=dtype,
            device=device,
        )
        theta = config.rope_parameters["rope_theta"]
        powers = torch.arange(0, self.head_size, 2, device=device).float() / self.head_size
        angle = torch.outer(torch.arange(length, device=device).float(), 1.0 / theta**powers)
        angle = torch.cat([angle, angle], dim=1)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    @staticmethod
    def fits(model: PreTrainedModel) -> bool:
        """Whether the model is a Llama as the code above knows it."""
        config = model.config
        return (
            config.model_type == "llama"
            and config.rope_parameters.get("rope_type") == "default"
            and not (config.attention_bias or config.mlp_bias)
        )

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Feed ids [B] at `position`; returns logits [B, V] float32."""
        x = functional.embedding(ids, self.embedding)
        width, rows = self.head_size, len(ids)
        cos, sin = self.cos[position], self.sin[position]
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = functional.linear(self._norm(x, layer["norm1"]), layer["qkv"])
            qkv = qkv.view(rows, -1, width)
            turned = qkv[:, : self.heads + self.kv_heads]
            half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
            turned = turned * cos + half * sin
            cache[0, :, :, position] = turned[:, self.heads :]
            cache[1, :, :, position] = qkv[:, self.heads + self.kv_heads :]
            mixed = functional.scaled_dot_product_attention(
                turned[:, : self.heads, None],
                cache[0, :, :, : position + 1],
                cache[1, :, :, : position + 1],
                enable_gqa=self.heads != self.kv_heads,
            )
            x = x + functional.linear(mixed.reshape(rows, -1), layer["out"])
            gate, up = functional.linear(self._norm(x, layer["norm2"]), layer["gate_up"]).chunk(
                2, -1
            )
            x = x + functional.linear(functional.silu(gate) * up, layer["down"])
        return functional.linear(self._norm(x, self.final_norm).float(), self.head)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return weight * (wide * scale).to(x.dtype)


class TransformersDecoder:
    """Any causal language model of transformers, through its own cache; slower."""

    def __init__(self, model: PreTrainedModel, rows: int, length: int) -> None:
        self.model = model
        self.past: object | None = None

    def step(self, ids: Tensor, position: int) -> Tensor:
        """Feed ids [B] at `position`; returns logits [B, V] float32."""
        if position == 0:
            self.past = None
        out = self.model(ids[:, None], past_key_values=self.past, use_cache=True)
        self.past = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits


def decoder_for(model: PreTrainedModel, rows: int, length: int) -> Decoder:
    """The fastest decoder that knows this architecture."""
    kind = LlamaDecoder if LlamaDecoder.fits(model) else TransformersDecoder
    return kind(model, rows, length)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    *,
    prompt_ids: Sequence[int],
    length: int,
    rows: range,
    batch_rows: int,
    selector: Selector,
    seed: int,
    stream: str,
    draw: str,
    eos: int,
    count_eos: bool,
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> Samples:
    """Draw the sequences `rows` of a stream.

    Sequence i always stands in row i % batch_rows of batch i // batch_rows, whatever range is asked
    for, and a batch always has `batch_rows` rows, so that shards change nothing.

    Args:
        model: a causal language model on its device.
        prompt_ids: what every sequence starts with.
        length: tokens of a sequence, the prompt included.
        rows: sequence indices; starts at a multiple of `batch_rows`.
        batch_rows: rows decoded together.
        selector: temperature and truncation.
        seed: of the run.
        stream: name of the random stream.
        draw: `inverse_cdf` or `gumbel`.
        eos: id that ends a sequence.
        count_eos: whether a drawn end counts in the sums of log-probabilities.
        on_batch: called with the number of sequences that exist after each batch.
    """
    if rows.start % batch_rows:
        raise ValueError(f"rows start at {rows.start}, not a multiple of {batch_rows}")
    decoder = decoder_for(model, batch_rows, length)
    batches = []
    with exact_matmuls():
        for start in range(rows.start, rows.stop, batch_rows):
            wanted = min(batch_rows, rows.stop - start)
            batch = _Batch(model, range(start, start + batch_rows), prompt_ids, length)
            noise = _noise(seed, stream, batch.rows, draw, length, model.config.vocab_size)
            batch.run(decoder, selector, noise, eos=eos, count_eos=count_eos)
            batches.append(batch.samples(wanted))
            on_batch(start + wanted - rows.start)
    return Samples(
        ids=np.concatenate([b.ids for b in batches]),
        length=np.concatenate([b.length for b in batches]),
        log_prob_sum=np.concatenate([b.log_prob_sum for b in batches]),
        log_prob_tau_sum=np.concatenate([b.log_prob_tau_sum for b in batches]),
    )


Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


def _noise(
    seed: int, stream: str, rows: range, draw: str, length: int, vocab_size: int
) -> Callable[[int, torch.device], Draw]:
    """By position, a function from logits to drawn ids and their log-probabilities."""
    if draw == "gumbel":

        def at_gumbel(position: int, device: torch.device) -> Draw:
            noise = torch.from_numpy(seeding.gumbels(seed, stream, rows, position, vocab_size))
            return lambda logits: draw_gumbel(logits, noise.to(device))

        return at_gumbel
    uniform = torch.from_numpy(seeding.uniforms(seed, stream, rows, length))
    moved: dict[torch.device, Tensor] = {}

    def at_uniform(position: int, device: torch.device) -> Draw:
        if device not in moved:
            moved[device] = uniform.T.contiguous().to(device)
        return lambda logits: draw_inverse_cdf(logits, moved[device][position])

    return at_uniform


class _Batch:
    """One batch on its way from the prompt to the last position."""

    def __init__(
        self, model: PreTrainedModel, rows: range, prompt_ids: Sequence[int], length: int
    ) -> None:
        self.rows, self.num_prompt, self.width = rows, len(prompt_ids), length
        self.device = model.device
        size = len(rows)
        self.ids = torch.zeros((size, length), dtype=torch.int64, device=self.device)
        self.ids[:, : self.num_prompt] = torch.tensor(prompt_ids, device=self.device)
        self.length = torch.full((size,), self.num_prompt, dtype=torch.int32, device=self.device)
        self.log_prob = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.log_prob_tau = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.alive = torch.ones(size, dtype=torch.bool, device=self.device)

    def run(
        self,
        decoder: Decoder,
        selector: Selector,
        noise: Callable[[int, torch.device], Draw],
        *,
        eos: int,
        count_eos: bool,
    ) -> None:
        """Feed the prompt, then draw until the last position; rows that ended are masked."""
        logits = torch.empty(0)
        for position in range(self.num_prompt):
            logits = decoder.step(self.ids[:, position], position)
        for position in range(self.num_prompt, self.width):
            token, log_prob_tau = noise(position, self.device)(selector.select(logits))
            log_prob = logits.gather(1, token[:, None]).squeeze(1).double()
            log_prob -= logits.double().logsumexp(dim=1)
            ended = token == eos
            counts = self.alive if count_eos else self.alive & ~ended
            self.log_prob += torch.where(counts, log_prob, 0.0)
            self.log_prob_tau += torch.where(counts, log_prob_tau, 0.0)
            self.ids[:, position] = torch.where(self.alive, token, 0)
            self.length += self.alive
            self.alive &= ~ended
            # One look at the device every 64 positions, to stop when every row has ended.
            if position % 64 == 0 and not bool(self.alive.any()):
                break
            if position + 1 < self.width:
                logits = decoder.step(self.ids[:, position], position)

    def samples(self, wanted: int) -> Samples:
        return Samples(
            ids=self.ids[:wanted].cpu().numpy().astype(np.uint16),
            length=self.length[:wanted].cpu().numpy(),
            log_prob_sum=self.log_prob[:wanted].cpu().numpy(),
            log_prob_tau_sum=self.log_prob_tau[:wanted].cpu().numpy(),
        )
