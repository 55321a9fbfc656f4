"""Score sequences under a model, one batch at a time."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdhpc.models.devices import Linear
from kdhpc.models.loading import LanguageModel
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.likelihood import token_log_probs
from kdhpc.storage.score_shards import Scores, join_scores
from kdhpc.storage.token_shards import Samples


def score(
    model: LanguageModel,
    samples: Samples,
    *,
    counting: Counting,
    batch_rows: int,
    head_tokens: int,
    per_token: bool = False,
    head: Linear | None = None,
    temperatures: Sequence[float] = (1.0,),
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> dict[float, Scores]:
    """Compute the log-probabilities of sequences, summed over the tokens that count.

    One pass through the model serves every temperature.

    Args:
        model: the model that scores.
        samples: N sequences.
        counting: which tokens count.
        batch_rows: number of consecutive rows that are scored together.
        head_tokens: largest number of positions whose logits are in memory at once.
        per_token: whether to keep the log-probability of every token.
        head: function from hidden states [N, H] to float32 logits [N, V]; the model's own if None.
        temperatures: temperatures of the model, each of which divides its logits.
        on_batch: called after each batch with the number of sequences scored so far.

    Returns:
        Scores by temperature.
    """
    parts: dict[float, list[Scores]] = {temperature: [] for temperature in temperatures}
    for start in range(0, len(samples), batch_rows):
        rows = slice(start, start + batch_rows)
        ids = torch.from_numpy(samples.ids[rows].astype(np.int64)).to(model.device)
        length, num_prompt = lengths_of(samples[rows], model.device)
        counts = counting.of(ids, length, num_prompt)
        end = counting.end_of(ids, length, num_prompt)
        log_probs = token_log_probs(
            model, ids, head_tokens=head_tokens, taus=temperatures, head=head
        )
        for temperature, log_prob in zip(temperatures, log_probs, strict=True):
            kept = torch.where(counts, log_prob, torch.nan).cpu().numpy() if per_token else None
            parts[temperature].append(
                Scores(
                    log_prob_sum=_masked_sum(log_prob, counts),
                    num_tokens=counts.sum(1, dtype=torch.int32).cpu().numpy(),
                    token_log_prob=kept,
                    end_log_prob=_masked_sum(log_prob, end),
                )
            )
        on_batch(min(start + batch_rows, len(samples)))
    return {temperature: join_scores(scores) for temperature, scores in parts.items()}


def lengths_of(samples: Samples, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the number of tokens of sequences [N] and of their prompts [N], as `Counting` asks."""
    length = torch.from_numpy(samples.length.copy()).to(device)
    if samples.num_prompt is None:
        return length, None
    return length, torch.from_numpy(samples.num_prompt.copy()).to(device)


def _masked_sum(log_prob: Tensor, mask: Tensor) -> NDArray[np.float64]:
    """Sum the log-probabilities [B, L] of some tokens of each row, in float64."""
    total: NDArray[np.float64] = torch.where(mask, log_prob, 0.0).double().sum(1).cpu().numpy()
    return total
