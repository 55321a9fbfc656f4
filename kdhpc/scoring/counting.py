"""Which tokens are trained on and scored: the one rule."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Counting:
    """The prompt and padding never count; the end of a sequence counts by choice (decision 2)."""

    num_prompt: int
    """Tokens of the prompt at the start of each row."""
    eos: int
    """Id of the end-of-sequence token."""
    count_eos: bool
    """Whether that token counts where it ends a row."""

    def at(self, position: Tensor, length: Tensor, ended: Tensor) -> Tensor:
        """Whether the tokens at a position count.

        Args:
            position: int64 index in the row.
            length: int tokens of the row, its end-of-sequence token included.
            ended: bool, whether the last token of the row is the end-of-sequence token.

        Returns:
            Bool, in the shape that the arguments broadcast to.
        """
        stop = length if self.count_eos else length - ended.to(length.dtype)
        return (position >= self.num_prompt) & (position < stop)

    def of(self, ids: Tensor, length: Tensor) -> Tensor:
        """Which tokens of whole rows count.

        Args:
            ids: [B, L] int64; what is beyond a row's length means nothing.
            length: [B] tokens of each row; 0 for a row of which nothing counts.

        Returns:
            [B, L] bool.
        """
        last = ids.gather(1, (length.long() - 1).clamp(min=0)[:, None])
        position = torch.arange(ids.shape[1], device=ids.device)
        return self.at(position, length[:, None], last == self.eos)
