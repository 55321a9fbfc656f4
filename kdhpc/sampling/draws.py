"""Exact draws of tokens from logits: the method and its random numbers.

Nothing here looks at a value from Python: a draw is the same sequence of tensor operations for
every input, so that a GPU never waits for the host.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc import seeding
from kdhpc.selection import Selection

BLOCK = 256
"""Vocabulary entries summed together in the first level of an inverse CDF."""


def select(logits: Tensor, selection: Selection) -> Tensor:
    """Logits of the distribution to draw from, -inf where nothing may be drawn. [B, V]."""
    chosen = logits / selection.tau if selection.tau != 1.0 else logits
    if selection.top_k:
        least = chosen.topk(min(selection.top_k, chosen.shape[1]), dim=1).values[:, -1:]
        chosen = chosen.masked_fill(chosen < least, -torch.inf)
    if selection.top_p < 1.0:
        ordered, order = chosen.sort(dim=1, descending=True)
        probability = ordered.double().softmax(dim=1)
        late = probability.cumsum(dim=1) - probability >= selection.top_p
        dropped = torch.zeros_like(late).scatter(1, order, late)
        chosen = chosen.masked_fill(dropped, -torch.inf)
    return chosen


class Draw(Protocol):
    """A way to draw one token a row, with the random numbers of a batch of sequences."""

    def load(self, seed: int, stream: str, rows: range) -> None:
        """Take the random numbers of these sequences of a stream."""
        ...

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the tokens at `position`.

        Args:
            logits: [B, V] float32 of the model, -inf where a token is impossible.
            position: [1] int64.

        Returns:
            ids [B] int64; their log-probabilities [B] float64 in nats under what is drawn from, and
            under the model at temperature 1.
        """
        ...


class InverseCdf:
    """One uniform number of 53 bits a token."""

    def __init__(self, selection: Selection, rows: int, length: int, device: torch.device) -> None:
        self.selection = selection
        self.uniform = torch.zeros((length, rows), dtype=torch.float64, device=device)

    def load(self, seed: int, stream: str, rows: range) -> None:
        found = seeding.uniforms(seed, stream, rows, len(self.uniform))
        self.uniform.copy_(torch.from_numpy(found.T.copy()))

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        uniform = self.uniform.index_select(0, position)[0]
        token, log_prob_tau = invert_cdf(select(logits, self.selection), uniform)
        if self.selection.keeps_all:
            return token, log_prob_tau, log_prob_tau
        return token, log_prob_tau, log_prob_of(logits, token)


def invert_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw by inverting the cumulative distribution: first a block of the vocabulary, then in it.

    Probabilities are float32 and so are the sums of blocks; what is added up over blocks, and
    inside the one that is drawn, is float64. Inside a block the uniform's rest is stretched to the
    exact sum, so that rounding of a block's sum, a relative 1e-7, never cuts off its last tokens.

    Args:
        logits: [B, V] float32, -inf where a token is impossible.
        uniform: [B] float64 in [0, 1).

    Returns:
        ids [B] int64 and their log-probabilities [B] float64 in nats.
    """
    rows, vocab_size = logits.shape
    weight = logits.softmax(dim=1)
    if vocab_size % BLOCK:
        weight = functional.pad(weight, (0, -vocab_size % BLOCK))
    weight = weight.view(rows, -1, BLOCK)
    ends = weight.sum(dim=2).double().cumsum(dim=1)
    total = ends[:, -1:]
    target = uniform[:, None] * total
    block = _first_above(ends, target)
    end = ends.gather(1, block)
    start = functional.pad(ends, (1, 0)).gather(1, block)
    inside = weight.gather(1, block[:, :, None].expand(rows, 1, BLOCK)).squeeze(1).double()
    inner_ends = inside.cumsum(dim=1)
    token = _first_above(inner_ends, (target - start) / (end - start) * inner_ends[:, -1:])
    log_prob = inside.gather(1, token).log() - total.log()
    return (block * BLOCK + token).squeeze(1), log_prob.squeeze(1)


def _first_above(ends: Tensor, target: Tensor) -> Tensor:
    """Index of the first of the rising `ends` above `target`; such a one always has weight."""
    below_last = torch.nextafter(ends[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(ends, torch.minimum(target, below_last), right=True)


class Gumbel:
    """One number of 53 bits a vocabulary entry: the largest of logits plus Gumbel noise.

    The noise is made where the logits are, and is the same on every device: Philox4x32-10 counts
    pairs of vocabulary entries, positions and sequences under a key of seed and stream.
    """

    def __init__(self, selection: Selection, rows: int, length: int, device: torch.device) -> None:
        self.selection = selection
        self.key = torch.zeros(2, dtype=torch.int64, device=device)
        self.sequence = torch.zeros((rows, 1), dtype=torch.int64, device=device)

    def load(self, seed: int, stream: str, rows: range) -> None:
        digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
        words = [int.from_bytes(digest[at : at + 4], "little") for at in (0, 4)]
        self.key.copy_(torch.tensor(words))
        self.sequence.copy_(torch.arange(rows.start, rows.stop)[:, None])

    def noise(self, position: Tensor, vocab: range) -> Tensor:
        """Standard Gumbel numbers [B, V] float64 of the vocabulary entries, from an even one on."""
        pairs = torch.arange(vocab.start // 2, (vocab.stop + 1) // 2, device=self.key.device)[None]
        counter = (pairs, position, self.sequence & MASK, self.sequence >> 32)
        words = philox(counter, self.key.unbind())
        raw = torch.stack([(hi << 21) | (lo >> 11) for hi, lo in (words[:2], words[2:])], dim=2)
        uniform = (raw.flatten(1).double() + 0.5).mul_(2.0**-53)
        # Small exponentials make large noise: they are the exact end of the uniforms.
        exponential = uniform.neg_().log1p_().neg_()
        return exponential.log_().neg_()[:, : len(vocab)]

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen, vocab_size = select(logits, self.selection), logits.shape[1]
        # What is worked on at once: on CPUs it should stay in the cache, on GPUs it takes memory.
        width = 2 * ((2**21 if logits.is_cuda else 2**15) // len(logits) + 1)
        best = [
            (chosen[:, at : at + width].double() + self.noise(position, vocab)).max(dim=1)
            for at in range(0, vocab_size, width)
            for vocab in [range(at, min(at + width, vocab_size))]
        ]
        part = torch.stack([found.values for found in best]).argmax(dim=0)
        inside = torch.stack([found.indices for found in best]).gather(0, part[None])[0]
        token = part * width + inside
        log_prob = log_prob_of(logits, token)
        if self.selection.keeps_all:
            return token, log_prob, log_prob
        return token, log_prob_of(chosen, token), log_prob


MASK = 2**32 - 1
ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of 32 random bits.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counter: four int64 tensors of words below 2^32 that broadcast against each other.
        key: two, likewise.

    Returns:
        Four int64 tensors.
    """
    words, (k0, k1) = list(counter), key
    for _ in range(ROUNDS):
        # Products wrap to 64 bits; the mask takes the sign off what is shifted down.
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [
            ((second >> 32) & MASK) ^ words[1] ^ k0,
            second & MASK,
            ((first >> 32) & MASK) ^ words[3] ^ k1,
            first & MASK,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return words


def log_prob_of(logits: Tensor, token: Tensor) -> Tensor:
    """Log-probability [B] float64 in nats of tokens [B] under logits [B, V]."""
    return logits.log_softmax(dim=1).gather(1, token[:, None]).squeeze(1).double()


DRAWS: dict[str, type[InverseCdf] | type[Gumbel]] = {"inverse_cdf": InverseCdf, "gumbel": Gumbel}
"""By the config's name."""
