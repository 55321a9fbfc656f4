"""Exact ancestral sampling with a static cache: prompt in, ids and their log-probabilities out.

All rows of a batch start together and stand at the same position; rows that ended are masked, and
nothing is scheduled. A row's ids depend on its own random stream and on the batch shape, never on
what shares the batch. A step reads and writes buffers only: on GPUs it is captured once a bucket of
positions and replayed.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from kdhpc.models.devices import exact_matmuls
from kdhpc.models.loading import LanguageModel, Loaded
from kdhpc.sampling.decoding import Decoder, bucket_of, decoder_for
from kdhpc.sampling.draws import DRAWS, Draw
from kdhpc.scoring.counting import Counting
from kdhpc.selection import Selection
from kdhpc.storage.token_shards import Samples

log = logging.getLogger(__name__)

LOOK_EVERY = 64
"""Positions between two looks whether every row has ended: the only waits for the device."""


class Sampler:
    """Draws batches of sequences from one model; its buffers serve one batch after the other."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        prompt_ids: Sequence[int],
        length: int,
        batch_rows: int,
        selection: Selection,
        draw: str,
        counting: Counting,
        engine: str = "torch",
    ) -> None:
        """Make room for a batch.

        Args:
            model: a causal language model on its device.
            prompt_ids: what every sequence starts with.
            length: tokens of a sequence, the prompt included.
            batch_rows: rows decoded together.
            selection: temperature and truncation.
            draw: `inverse_cdf` or `gumbel`.
            counting: which id ends a sequence, and which tokens the sums are over.
            engine: `torch`, or `native` for the extension where it can be used.
        """
        self.device = device = model.device
        self.prompt, self.batch_rows = torch.tensor(prompt_ids, device=device), batch_rows
        self.counting = counting
        self.decoder, self.draw = _parts(model, batch_rows, length, selection, draw, engine)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.zeros((length, batch_rows), dtype=torch.int64, device=device)
        self.length = torch.zeros(batch_rows, dtype=torch.int32, device=device)
        self.log_prob = torch.zeros(batch_rows, dtype=torch.float64, device=device)
        self.log_prob_tau = torch.zeros(batch_rows, dtype=torch.float64, device=device)
        self.alive = torch.ones(batch_rows, dtype=torch.bool, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.pool: Any = None  # memory of all graphs: what a step leaves behind is in buffers
        self.capture = device.type == "cuda" and self.decoder.capturable

    @torch.inference_mode()
    def batch(self, seed: int, stream: str, rows: range) -> Samples:
        """Draw these sequences of a stream; as many as rows of a batch."""
        length, num_prompt = len(self.ids), len(self.prompt)
        self.draw.load(seed, stream, rows)
        self.decoder.restart()
        self.ids.zero_()
        self.ids[:num_prompt] = self.prompt[:, None]
        self.length.fill_(num_prompt)
        for sums in (self.log_prob, self.log_prob_tau, self.position):
            sums.zero_()
        self.alive.fill_(True)
        with exact_matmuls():
            for position in range(num_prompt - 1):
                self.decoder.step(
                    self.ids[position], self.position, bucket_of(position, self.device, length)
                )
                self.position += 1
            for position in range(num_prompt - 1, length - 1):
                if position % LOOK_EVERY == 0 and not bool(self.alive.any()):
                    break
                self._replay(bucket_of(position, self.device, length))
        return Samples(
            ids=self.ids.T.cpu().numpy().astype(np.uint16),
            length=self.length.cpu().numpy().copy(),
            log_prob_sum=self.log_prob.cpu().numpy().copy(),
            log_prob_tau_sum=self.log_prob_tau.cpu().numpy().copy(),
        )

    def step(self, num_keys: int) -> None:
        """Feed the tokens at `position`, draw the next ones and move on."""
        logits = self.decoder.step(
            self.ids.index_select(0, self.position)[0], self.position, num_keys
        )
        self.position += 1
        token, log_prob_tau, log_prob = self.draw(logits, self.position)
        ended = token == self.counting.eos
        self.length += self.alive
        counts = self.counting.at(self.position, self.length, ended)
        self.log_prob += log_prob.masked_fill(~counts, 0.0)
        self.log_prob_tau += log_prob_tau.masked_fill(~counts, 0.0)
        self.ids.index_copy_(0, self.position, token.masked_fill(~self.alive, 0)[None])
        self.alive &= ~ended

    def _replay(self, num_keys: int) -> None:
        """One step: on GPUs as a CUDA graph, from the second of a bucket on. Not run: no GPU."""
        if graph := self.graphs.get(num_keys):
            graph.replay()
            return
        self.step(num_keys)  # also what capture wants: everything has run once
        if not self.capture:
            return
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(num_keys)
            self.graphs[num_keys] = graph
        except RuntimeError as error:
            log.warning("no CUDA graph of a decoding step, running it eagerly: %s", error)
            self.capture = False


def _parts(
    model: LanguageModel, rows: int, length: int, selection: Selection, draw: str, engine: str
) -> tuple[Decoder, Draw]:
    """What decodes and what draws."""
    if engine == "native":
        from kdhpc.sampling import native

        if native.usable(model, "sampling.engine"):
            return (
                native.NativeDecoder(model, rows, length),
                native.DRAWS[draw](selection, rows, length, model.device),
            )
    return decoder_for(model, rows, length), DRAWS[draw](selection, rows, length, model.device)


def sampler_for(loaded: Loaded, **options: Any) -> Sampler:
    """The sampler of a loaded model; the last stays with it, so that a task makes buffers once."""
    if loaded.sampler is None or loaded.sampler[0] != options:
        loaded.sampler = None  # old buffers go before new ones come
        loaded.sampler = (options, Sampler(loaded.model, **options))
    found: Sampler = loaded.sampler[1]
    return found


def sample(
    sampler: Sampler,
    *,
    rows: range,
    seed: int,
    stream: str,
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> Samples:
    """Draw the sequences `rows` of a stream.

    Sequence i always stands in row i % batch_rows of batch i // batch_rows, whatever range is asked
    for, and a batch always has `batch_rows` rows, so that shards change nothing.

    Args:
        sampler: of a model.
        rows: sequence indices; starts at a multiple of the sampler's `batch_rows`.
        seed: of the run.
        stream: name of the random stream.
        on_batch: called with the number of sequences that exist after each batch.
    """
    size = sampler.batch_rows
    if rows.start % size:
        raise ValueError(f"rows start at {rows.start}, not a multiple of {size}")
    batches = []
    for start in range(rows.start, rows.stop, size):
        batches.append(sampler.batch(seed, stream, range(start, start + size)))
        on_batch(min(start + size, rows.stop) - rows.start)
    return Samples(
        **{
            name: np.concatenate([getattr(batch, name) for batch in batches])[: len(rows)]
            for name in ("ids", "length", "log_prob_sum", "log_prob_tau_sum")
        }
    )
