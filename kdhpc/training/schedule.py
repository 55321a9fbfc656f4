"""Steps of a training: how many there are, where it stops, which checkpoints are kept."""

from dataclasses import dataclass

from kdhpc.config.model import Training


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Steps of a training."""

    steps_per_epoch: int
    total: int
    """Steps of the whole learning-rate schedule."""
    last: int
    """Steps after which training stops and the model is taken."""
    kept: frozenset[int] = frozenset()
    """Steps whose checkpoints are kept for good."""

    @staticmethod
    def of(recipe: Training, num_sequences: int) -> "Schedule":
        """The last, incomplete batch of an epoch is left out."""
        per_epoch = num_sequences // recipe.batch_sequences
        total = int(recipe.epochs * per_epoch)
        stop = recipe.stop_after_epochs
        last = total if stop is None else int(stop * per_epoch)
        kept = frozenset(int(epoch * per_epoch) for epoch in recipe.keep_epochs)
        return Schedule(steps_per_epoch=per_epoch, total=total, last=max(1, last), kept=kept)

    def saves_at(self, step: int, every: int) -> bool:
        """Whether a checkpoint is made after `step` steps."""
        return step in self.kept or (every > 0 and step % every == 0 and step < self.last)
