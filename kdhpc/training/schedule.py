"""The steps of a training: how many there are, when it stops, and which checkpoints are kept."""

from dataclasses import dataclass

from kdhpc.config.model import Training


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a training."""

    steps_per_epoch: int
    total: int
    """Number of steps of the whole learning-rate schedule."""
    last: int
    """Number of steps after which training stops and the model is taken."""
    kept: frozenset[int] = frozenset()
    """Steps whose checkpoints are never deleted."""

    @staticmethod
    def of(settings: Training, num_sequences: int) -> "Schedule":
        """Make the schedule of a training; the last, incomplete batch of an epoch is left out."""
        per_epoch = num_sequences // settings.batch_sequences
        total = int(settings.epochs * per_epoch)
        stop = settings.stop_after_epochs
        last = total if stop is None else int(stop * per_epoch)
        kept = frozenset(int(epoch * per_epoch) for epoch in settings.keep_epochs)
        return Schedule(steps_per_epoch=per_epoch, total=total, last=max(1, last), kept=kept)

    def saves_at(self, step: int, every: int) -> bool:
        """Return whether a checkpoint is made after `step` steps, given the interval `every`."""
        return step in self.kept or (every > 0 and step % every == 0 and step < self.last)
