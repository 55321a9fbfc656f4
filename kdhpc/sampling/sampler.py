"""Exact ancestral sampling with a static cache: from prompts to ids and their log-probabilities.

All rows of a batch start together and are always at the same position. While a row is inside its
prompt, the prompt's token is taken in place of the drawn one. Rows that have ended are masked; no
other row takes their place. A row's ids depend on its own prompt and random stream and on the shape
of the batch, never on the other rows. A step only reads and writes buffers, so on GPUs it is
captured once for each bucket of positions and then replayed.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from kdhpc.models.devices import exact_matmuls
from kdhpc.models.loading import LanguageModel, Loaded
from kdhpc.sampling.decoding import Decoder, decoder_for
from kdhpc.sampling.draws import DRAWS, Draw
from kdhpc.scoring.counting import Counting
from kdhpc.selection import Selection
from kdhpc.storage.token_shards import Ids, Samples, id_type

log = logging.getLogger(__name__)

LOOK_EVERY = 64
"""Number of positions between two checks whether every row has ended. These checks are the only
points where the host waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What sequences start with."""

    ids: tuple[int, ...]
    """At least one id."""
    stream: str = ""
    """Name of its random stream inside that of the sample set; empty for the only prompt."""
    answer: str | None = None
    """The last line of a right sequence, if it is known."""
    reference: str | None = None
    """What somebody else wrote after the prompt, if it is known."""


class Sampler:
    """Draws batches of sequences from one model, reusing its buffers for every batch."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        prompts: Sequence[Prompt],
        length: int,
        batch_rows: int,
        selection: Selection,
        draw: str,
        counting: Counting,
        engine: str = "torch",
        per_token: bool = False,
    ) -> None:
        """Allocate the buffers of a batch.

        Args:
            model: a causal language model on its device.
            prompts: P prompts; sequence i is sample i // P of prompt i % P.
            length: number of tokens of a sequence, the prompt included.
            batch_rows: number of rows that are decoded together.
            selection: temperature and truncation.
            draw: `inverse_cdf` or `gumbel`.
            counting: which id ends a sequence, and which tokens the sums are over.
            engine: `torch`, or `native` for the extension if it can be used.
            per_token: whether to keep the log-probability of every token besides the sums.
        """
        self.device = device = model.device
        self.prompts, self.batch_rows = prompts, batch_rows
        sizes = {len(prompt.ids) for prompt in prompts}
        self.shortest, self.mixed = min(sizes), len(sizes) > 1
        self.num_prompt = torch.zeros(batch_rows, dtype=torch.int64, device=device)
        self.counting, self.id_type = counting, id_type(model.vocab_size)
        self.decoder, self.draw = _parts(model, batch_rows, length, selection, draw, engine)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.zeros((length, batch_rows), dtype=torch.int64, device=device)
        self.length = torch.zeros(batch_rows, dtype=torch.int32, device=device)
        sums = torch.zeros((4, batch_rows), dtype=torch.float64, device=device)
        self.sums = sums
        self.log_prob, self.log_prob_tau, self.end_log_prob, self.end_log_prob_tau = sums
        self.token_log_prob_tau = (
            torch.full((length, batch_rows), torch.nan, device=device) if per_token else None
        )
        self.alive = torch.ones(batch_rows, dtype=torch.bool, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        # All graphs share one memory pool, because the results of a step are in buffers outside it.
        self.pool: Any = None
        self.capture = device.type == "cuda" and self.decoder.capturable
        if self.capture:
            self.draw.settle(torch.zeros((batch_rows, model.vocab_size), device=device))

    @torch.inference_mode()
    def batch(self, seed: int, stream: str, rows: Sequence[int]) -> Samples:
        """Draw the sequences `rows` of a stream, exactly `batch_rows` of them."""
        length = len(self.ids)
        self._load(seed, stream, rows)
        self.decoder.restart()
        for numbers in (self.sums, self.position):
            numbers.zero_()
        if self.token_log_prob_tau is not None:
            self.token_log_prob_tau.fill_(torch.nan)
        self.alive.fill_(True)
        with exact_matmuls():
            for position in range(self.shortest - 1):
                self.decoder.step(
                    self.ids[position], self.position, self.decoder.num_keys(position)
                )
                self.position += 1
            for position in range(self.shortest - 1, length - 1):
                if position % LOOK_EVERY == 0 and not bool(self.alive.any()):
                    break
                self._replay(self.decoder.num_keys(position))
        return Samples(
            ids=cast(Ids, self.ids.T.cpu().numpy().astype(self.id_type)),
            length=self.length.cpu().numpy().copy(),
            log_prob_sum=self.log_prob.cpu().numpy().copy(),
            log_prob_tau_sum=self.log_prob_tau.cpu().numpy().copy(),
            end_log_prob=self.end_log_prob.cpu().numpy().copy(),
            end_log_prob_tau=self.end_log_prob_tau.cpu().numpy().copy(),
            token_log_prob_tau=None
            if self.token_log_prob_tau is None
            else np.array(self.token_log_prob_tau.T.cpu().numpy(), order="C"),
            num_prompt=self.num_prompt.cpu().numpy().astype(np.int32)
            if any(prompt.stream for prompt in self.prompts)
            else None,
        )

    def _load(self, seed: int, stream: str, rows: Sequence[int]) -> None:
        """Put the prompts and random numbers of the sequences `rows` into the buffers."""
        ids = np.zeros(self.ids.shape, np.int64)
        num_prompt, sequences = [], []
        for column, row in enumerate(rows):
            sample, which = divmod(row, len(self.prompts))
            prompt = self.prompts[which]
            ids[: len(prompt.ids), column] = prompt.ids
            num_prompt.append(len(prompt.ids))
            sequences.append((f"{stream}/{prompt.stream}" if prompt.stream else stream, sample))
        self.draw.load(seed, sequences)
        self.ids.copy_(torch.from_numpy(ids))
        self.num_prompt.copy_(torch.tensor(num_prompt))
        self.length.copy_(self.num_prompt)

    def step(self, num_keys: int) -> None:
        """Feed the tokens at the current position, draw the next ones and advance the position."""
        logits = self.decoder.step(
            self.ids.index_select(0, self.position)[0], self.position, num_keys
        )
        self.position += 1
        token, log_prob_tau, log_prob = self.draw(logits, self.position)
        ended, drawn = self.counting.ends(token), self.alive
        if self.mixed:
            inside = self.position < self.num_prompt
            token = torch.where(inside, self.ids.index_select(0, self.position)[0], token)
            ended, drawn = ended & ~inside, drawn & ~inside
        self.length += drawn
        counts = self.counting.at(self.position, self.length, ended, self.num_prompt)
        self.log_prob += log_prob.masked_fill(~counts, 0.0)
        self.log_prob_tau += log_prob_tau.masked_fill(~counts, 0.0)
        ends_now = self.alive & ended
        self.end_log_prob += log_prob.masked_fill(~ends_now, 0.0)
        self.end_log_prob_tau += log_prob_tau.masked_fill(~ends_now, 0.0)
        if self.token_log_prob_tau is not None:
            token_log_prob = log_prob_tau.float().masked_fill(~counts, torch.nan)
            self.token_log_prob_tau.index_copy_(0, self.position, token_log_prob[None])
        self.ids.index_copy_(0, self.position, token.masked_fill(~self.alive, 0)[None])
        self.alive &= ~ended

    def _replay(self, num_keys: int) -> None:
        """Do one step; on GPUs, replay a CUDA graph from the second step of a bucket on."""
        if graph := self.graphs.get(num_keys):
            graph.replay()
            return
        self.step(num_keys)  # also warms up: capture requires that every operation has run once
        if not self.capture:
            return
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(num_keys)
            self.graphs[num_keys] = graph
        except RuntimeError as error:
            log.warning("a decoding step cannot be captured as a CUDA graph; runs eager: %s", error)
            self.capture = False


def _parts(
    model: LanguageModel, rows: int, length: int, selection: Selection, draw: str, engine: str
) -> tuple[Decoder, Draw]:
    """Return the decoder and the draw of a sampler."""
    if engine == "native":
        from kdhpc.sampling import native

        if native.usable(model, "sampling.engine"):
            return (
                native.NativeDecoder(model, rows, length),
                native.DRAWS[draw](selection, rows, length, model.device),
            )
    return decoder_for(model, rows, length), DRAWS[draw](selection, rows, length, model.device)


def sampler_for(loaded: Loaded, **options: Any) -> Sampler:
    """Return a sampler of a loaded model; the last one is kept, so that a task allocates once."""
    if loaded.sampler is None or loaded.sampler[0] != options:
        loaded.sampler = None  # frees the old buffers before new ones are allocated
        loaded.sampler = (options, Sampler(loaded.model, **options))
    sampler: Sampler = loaded.sampler[1]
    return sampler


def sample(
    sampler: Sampler,
    *,
    rows: range,
    seed: int,
    stream: str,
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> Samples:
    """Draw the sequences `rows` of a stream.

    Sequence i is always in row i % batch_rows of batch i // batch_rows, and a batch always has
    `batch_rows` rows, so the result does not depend on how the sequences are cut into shards.

    Args:
        sampler: the sampler of a model.
        rows: sequence indices; the first must be a multiple of the sampler's `batch_rows`.
        seed: seed of the run.
        stream: name of the random stream.
        on_batch: called after each batch with the number of sequences drawn so far.

    Raises:
        ValueError: if the first row is not the start of a batch.
    """
    size = sampler.batch_rows
    if rows.start % size:
        raise ValueError(f"rows start at {rows.start}; expected a multiple of batch_rows={size}")
    batches = []
    for start in range(rows.start, rows.stop, size):
        batches.append(sampler.batch(seed, stream, range(start, start + size)))
        on_batch(min(start + size, rows.stop) - rows.start)
    return Samples.join(batches)[: len(rows)]
