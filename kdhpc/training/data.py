"""Training data: sequences, and global batches in an order that does not depend on the ranks."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from kdhpc import seeding
from kdhpc.config.model import Training
from kdhpc.scoring.counting import Counting
from kdhpc.storage.token_shards import Ids
from kdhpc.training.schedule import Schedule


class Rows(Protocol):
    """Token ids [N, L] that can be read by row: an array, or shards mapped into memory."""

    def __getitem__(self, rows: NDArray[np.int64], /) -> Ids: ...


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Sequences to train on."""

    ids: Rows
    """[N, L] token ids, in memory or mapped from files."""
    length: NDArray[np.int32]
    """[N] number of tokens in each row; ids beyond it are ignored."""
    counting: Counting
    """Which tokens count."""
    num_prompt: NDArray[np.int32] | None = None
    """[N] number of tokens of each row's prompt; None if it is that of every row."""

    def __len__(self) -> int:
        return len(self.length)

    def read(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Read rows by index; no token counts in rows with a negative index.

        Args:
            rows: [B] row indices.

        Returns:
            Ids [B, L] and the target of each position [B, L], -100 if the target does not count.
        """
        index = np.maximum(rows, 0)
        ids = torch.from_numpy(self.ids[index].astype(np.int64))
        length = torch.from_numpy(np.where(rows < 0, 0, self.length[index]))
        num_prompt = None if self.num_prompt is None else torch.from_numpy(self.num_prompt[index])
        counts = self.counting.of(ids, length, num_prompt)
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:].where(counts[:, 1:], -100)
        return ids, targets


@dataclass(frozen=True, kw_only=True)
class Batch:
    """This rank's share of a global batch."""

    parts: Sequence[tuple[Tensor, Tensor]]
    """Micro-batches of this rank: ids [B, L] and targets [B, L], in pinned memory for GPUs."""
    num_counted: int
    """Number of tokens that count in the whole global batch, at least 1."""


def batch_of(corpus: Corpus, rows: NDArray[np.int64], settings: Training, *, pin: bool) -> Batch:
    """Read a global batch and take this rank's share of it.

    Every rank reads all rows, a few hundred kilobytes, because each of them needs the number of
    counted tokens.
    """
    ids, targets = corpus.read(rows)
    mine = np.arange(len(rows)).reshape(settings.accumulation, settings.world_size, -1)
    parts = []
    for index in mine[:, distributed.get_rank()]:
        part = ids[index], targets[index]
        parts.append((part[0].pin_memory(), part[1].pin_memory()) if pin else part)
    return Batch(parts=parts, num_counted=max(1, int((targets >= 0).sum())))


@dataclass
class Batches:
    """The global batches in order; each is read while the one before it is trained on."""

    corpus: Corpus
    settings: Training
    schedule: Schedule
    seed: int
    stream: str
    pin: bool
    waited_s: float = 0.0
    """Seconds that the last call of `get` waited for its batch."""
    _order: tuple[int, NDArray[np.int64]] | None = None
    _next: tuple[int, Future[Batch]] | None = None
    _reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def get(self, step: int) -> Batch:
        """Return the batch of a step and start to read the next one."""
        began = time.perf_counter()
        if self._next is None or self._next[0] != step:
            self._next = step, self._reader.submit(self._read, step)
        batch = self._next[1].result()
        self._next = step + 1, self._reader.submit(self._read, step + 1)
        self.waited_s = time.perf_counter() - began
        return batch

    def _read(self, step: int) -> Batch:
        epoch, index = divmod(step, self.schedule.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = seeding.permutation(self.seed, self.stream, epoch, len(self.corpus))
            self._order = epoch, order
        size = self.settings.batch_sequences
        rows = self._order[1][index * size : (index + 1) * size]
        return batch_of(self.corpus, rows, self.settings, pin=self.pin)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)


def validation_batches(corpus: Corpus, settings: Training, *, pin: bool) -> Iterator[Batch]:
    """Yield global batches of the first sequences; rows that only fill the last do not count."""
    num_rows = min(settings.validation_sequences, len(corpus))
    for start in range(0, num_rows, settings.batch_sequences):
        rows = np.arange(start, start + settings.batch_sequences)
        yield batch_of(corpus, np.where(rows < num_rows, rows, -1), settings, pin=pin)
