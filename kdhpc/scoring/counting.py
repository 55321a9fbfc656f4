"""The one rule for which tokens are trained on and scored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kdhpc.models.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Counting:
    """Decides which tokens count.

    The prompt and padding never count. The end-of-sequence token counts if `count_eos` is set
    (decision 2).
    """

    num_prompt: int
    """Number of tokens of the prompt at the start of each row, where rows do not say it."""
    eos: int
    """Id of the end-of-sequence token."""
    other_ends: tuple[int, ...] = ()
    """Other ids that end a sequence as well."""
    count_eos: bool
    """Whether the end-of-sequence token counts at the end of a row."""

    @staticmethod
    def with_tokenizer(tokenizer: Tokenizer, *, num_prompt: int, count_eos: bool) -> "Counting":
        """Return the rule for sequences that end as a tokenizer says."""
        return Counting(
            num_prompt=num_prompt,
            eos=tokenizer.eos,
            other_ends=tokenizer.other_ends,
            count_eos=count_eos,
        )

    def ends(self, token: Tensor) -> Tensor:
        """Return which tokens end a sequence: bool, in the shape of the int64 ids `token`."""
        ended = token == self.eos
        for end in self.other_ends:
            ended = ended | (token == end)
        return ended

    def at(
        self,
        position: Tensor,
        length: Tensor,
        ended: Tensor,
        num_prompt: Tensor | None = None,
    ) -> Tensor:
        """Return whether the tokens at a position count.

        Args:
            position: int64 index in the row.
            length: int number of tokens of the row, its end-of-sequence token included.
            ended: bool, whether the last token of the row is the end-of-sequence token.
            num_prompt: int number of tokens of the row's prompt; None if it is that of every row.

        Returns:
            Bool, in the shape to which the arguments broadcast.
        """
        stop = length if self.count_eos else length - ended.to(length.dtype)
        start = self.num_prompt if num_prompt is None else num_prompt
        return (position >= start) & (position < stop)

    def of(self, ids: Tensor, length: Tensor, num_prompt: Tensor | None = None) -> Tensor:
        """Return which tokens of whole rows count.

        Args:
            ids: [B, L] int64; ids beyond the length of a row are ignored.
            length: [B] number of tokens of each row; no token counts in a row of length 0.
            num_prompt: [B] number of tokens of each row's prompt; None if it is that of every row.

        Returns:
            [B, L] bool.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        return self.at(position, length[:, None], self._ended(ids, length), _column(num_prompt))

    def drawn(self, ids: Tensor, length: Tensor, num_prompt: Tensor | None = None) -> Tensor:
        """Return which tokens were drawn, whether they count or not: [B, L] bool, as in `of`."""
        start = self.num_prompt if num_prompt is None else num_prompt[:, None]
        position = torch.arange(ids.shape[1], device=ids.device)
        return (position >= start) & (position < length[:, None])

    def end_of(self, ids: Tensor, length: Tensor, num_prompt: Tensor | None = None) -> Tensor:
        """Return which token of each whole row ends it, if any does: [B, L] bool, as in `of`."""
        position = torch.arange(ids.shape[1], device=ids.device)
        last = position == length[:, None] - 1
        return last & self.drawn(ids, length, num_prompt) & self._ended(ids, length)

    def _ended(self, ids: Tensor, length: Tensor) -> Tensor:
        """Return whether the last token of each row ends it: [B, 1] bool."""
        return self.ends(ids.gather(1, (length.long() - 1).clamp(min=0)[:, None]))


def _column(numbers: Tensor | None) -> Tensor | None:
    """Return [B] as [B, 1], to compare it with positions."""
    return None if numbers is None else numbers[:, None]
