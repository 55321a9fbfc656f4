"""Exact draws of tokens from logits: the methods and their random numbers.

No Python code here depends on the value of a tensor. A draw is the same sequence of tensor
operations for every input, so that a GPU never waits for the host.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kdhpc import seeding
from kdhpc.models.devices import try_or_undo
from kdhpc.selection import Selection

BLOCK = 256
"""Number of vocabulary entries that the first level of an inverse CDF sums together."""


def select(logits: Tensor, selection: Selection) -> Tensor:
    """Apply temperature and truncation to logits.

    Returns:
        [B, V] logits of the distribution to draw from; -inf for tokens that may not be drawn.
    """
    selected = logits / selection.tau if selection.tau != 1.0 else logits
    if selection.top_k:
        least = selected.topk(min(selection.top_k, selected.shape[1]), dim=1).values[:, -1:]
        selected = selected.masked_fill(selected < least, -torch.inf)
    if selection.top_p < 1.0:
        ordered, order = selected.sort(dim=1, descending=True)
        probability = ordered.double().softmax(dim=1)
        late = probability.cumsum(dim=1) - probability >= selection.top_p
        dropped = torch.zeros_like(late).scatter(1, order, late)
        selected = selected.masked_fill(dropped, -torch.inf)
    return selected


class Draw(Protocol):
    """A way to draw one token per row with the random numbers of a batch of sequences."""

    def load(self, seed: int, sequences: Sequence[tuple[str, int]]) -> None:
        """Load the random numbers of sequences, given by stream and index: one for each row."""
        ...

    def settle(self, logits: Tensor) -> None:
        """Compile the draw into few kernels, if that works on the device of these logits [B, V]."""
        ...

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the tokens at `position`.

        Args:
            logits: [B, V] float32 logits of the model, -inf where a token is impossible.
            position: [1] int64.

        Returns:
            ids [B] int64, and their log-probabilities in nats, twice [B] float64: under the
            distribution that was drawn from, and under the model at temperature 1.
        """
        ...


class InverseCdf:
    """Draws by inverting the cumulative distribution with one 53-bit uniform number per token."""

    def __init__(self, selection: Selection, rows: int, length: int, device: torch.device) -> None:
        self.selection, self.invert = selection, invert_cdf
        self.uniform = torch.zeros((length, rows), dtype=torch.float64, device=device)

    def load(self, seed: int, sequences: Sequence[tuple[str, int]]) -> None:
        uniforms = seeding.uniforms_of(seed, sequences, len(self.uniform))
        self.uniform.copy_(torch.from_numpy(uniforms.T.copy()))

    def settle(self, logits: Tensor) -> None:
        def take(invert: Callable[..., tuple[Tensor, Tensor]]) -> None:
            self.invert = invert

        _settle(self, take, invert_cdf, logits)

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        uniform = self.uniform.index_select(0, position)[0]
        token, log_prob_tau = self.invert(select(logits, self.selection), uniform)
        if self.selection.keeps_all:
            return token, log_prob_tau, log_prob_tau
        return token, log_prob_tau, log_prob_of(logits, token)


def invert_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution: draw a block of the vocabulary, then a token inside it.

    Probabilities and the sums of blocks are float32. Cumulative sums over blocks and inside the
    drawn block are float64. The remainder of the uniform number is rescaled to the exact sum of the
    block, so that rounding of the block's sum (relative error 1e-7) never cuts off its last tokens.

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
    """Return the index of the first of the rising `ends` above `target`; its weight is not 0."""
    below_last = torch.nextafter(ends[:, -1:], torch.zeros_like(target))
    return torch.searchsorted(ends, torch.minimum(target, below_last), right=True)


class Gumbel:
    """Draws the token whose logit plus Gumbel noise is the largest.

    The noise uses one 53-bit number per vocabulary entry. It is generated on the device of the
    logits and is the same on every device: the counter of Philox4x32-10 is the pair of vocabulary
    entries, the position and the sequence, and its key comes from seed and stream.
    """

    def __init__(self, selection: Selection, rows: int, length: int, device: torch.device) -> None:
        self.selection = selection
        self.best: Callable[..., tuple[Tensor, Tensor]] = self._best
        self.key = torch.zeros((2, rows, 1), dtype=torch.int64, device=device)
        self.sequence = torch.zeros((rows, 1), dtype=torch.int64, device=device)

    def load(self, seed: int, sequences: Sequence[tuple[str, int]]) -> None:
        digests = [hashlib.sha256(f"{seed}/{stream}".encode()).digest() for stream, _ in sequences]
        words = [[int.from_bytes(d[at : at + 4], "little") for d in digests] for at in (0, 4)]
        self.key.copy_(torch.tensor(words)[:, :, None])
        self.sequence.copy_(torch.tensor([index for _, index in sequences])[:, None])

    def settle(self, logits: Tensor) -> None:
        def take(best: Callable[..., tuple[Tensor, Tensor]]) -> None:
            self.best = best

        _settle(self, take, self._best, logits)

    def noise(self, position: Tensor, vocab: range) -> Tensor:
        """Return standard Gumbel noise [B, len(vocab)] float64 for a range of vocabulary entries.

        The range must start at an even entry, because entries share Philox words in pairs.
        """
        pairs = torch.arange(vocab.start // 2, (vocab.stop + 1) // 2, device=self.key.device)[None]
        counter = (pairs, position, self.sequence & MASK, self.sequence >> 32)
        words = philox(counter, self.key.unbind())
        raw = torch.stack([(hi << 21) | (lo >> 11) for hi, lo in (words[:2], words[2:])], dim=2)
        uniform = (raw.flatten(1).double() + 0.5).mul_(2.0**-53)
        # log1p keeps small exponentials exact; they make the large noise that decides a draw.
        exponential = uniform.neg_().log1p_().neg_()
        return exponential.log_().neg_()[:, : len(vocab)]

    def __call__(self, logits: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        selected, vocab_size = select(logits, self.selection), logits.shape[1]
        # Entries that are processed at once: on CPUs they should fit the cache, on GPUs they cost
        # memory, unless they are compiled.
        width = 2 * ((2**21 if logits.is_cuda else 2**15) // len(logits) + 1)
        if self.best != self._best:
            width = vocab_size
        best = [
            self.best(selected[:, at : at + width], position, at)
            for at in range(0, vocab_size, width)
        ]
        part = torch.stack([maximum for maximum, _ in best]).argmax(dim=0)
        inside = torch.stack([indices for _, indices in best]).gather(0, part[None])[0]
        token = part * width + inside
        log_prob = log_prob_of(logits, token)
        if self.selection.keeps_all:
            return token, log_prob, log_prob
        return token, log_prob_of(selected, token), log_prob

    def _best(self, logits: Tensor, position: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Add noise to the logits [B, n] of the entries from `start` on, and take the largest."""
        vocab = range(start, start + logits.shape[1])
        values, indices = (logits.double() + self.noise(position, vocab)).max(dim=1)
        return values, indices


def _settle(
    draw: Draw,
    take: Callable[[Callable[..., Any]], None],
    eager: Callable[..., Any],
    logits: Tensor,
) -> None:
    """Let a draw take its function compiled, if it can then draw; otherwise as it is."""
    position = torch.zeros(1, dtype=torch.int64, device=logits.device)

    def trial() -> None:
        take(torch.compile(eager, fullgraph=True, dynamic=False))
        draw(logits, position)

    try_or_undo(
        trial, lambda: take(eager), what="compiling the draw", instead="a kernel for each operation"
    )


MASK = 2**32 - 1
ROUNDS = 10


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Generate four words of 32 random bits with Philox4x32-10.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counter: four int64 tensors of words below 2^32 that broadcast against each other.
        key: two int64 tensors of words below 2^32 that broadcast against the counter.

    Returns:
        Four int64 tensors of words below 2^32.
    """
    words, (k0, k1) = list(counter), key
    for _ in range(ROUNDS):
        # Products wrap around at 64 bits; after the shift, the mask removes the sign extension.
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
    """Return the log-probabilities [B] float64 in nats of tokens [B] under logits [B, V]."""
    return logits.log_softmax(dim=1).gather(1, token[:, None]).squeeze(1).double()


DRAWS: dict[str, type[InverseCdf] | type[Gumbel]] = {"inverse_cdf": InverseCdf, "gumbel": Gumbel}
"""Methods to draw tokens, by their names in the config."""
