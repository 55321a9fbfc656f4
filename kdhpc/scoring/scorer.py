"""Score sequences under a model, one batch at a time."""

from collections.abc import Callable

import numpy as np
import torch

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
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> Scores:
    """Compute the log-probabilities of sequences, summed over the tokens that count.

    Args:
        model: the model that scores.
        samples: N sequences.
        counting: which tokens count.
        batch_rows: number of consecutive rows that are scored together.
        head_tokens: largest number of positions whose logits are in memory at once.
        per_token: whether to keep the log-probability of every token.
        head: function from hidden states [N, H] to float32 logits [N, V]; the model's own if None.
        on_batch: called after each batch with the number of sequences scored so far.
    """
    parts = []
    for start in range(0, len(samples), batch_rows):
        rows = slice(start, start + batch_rows)
        ids = torch.from_numpy(samples.ids[rows].astype(np.int64)).to(model.device)
        counts = counting.of(ids, torch.from_numpy(samples.length[rows].copy()).to(model.device))
        [log_probs] = token_log_probs(model, ids, head_tokens=head_tokens, head=head)
        parts.append(
            Scores(
                log_prob_sum=torch.where(counts, log_probs, 0.0).double().sum(1).cpu().numpy(),
                num_tokens=counts.sum(1, dtype=torch.int32).cpu().numpy(),
                token_log_prob=torch.where(counts, log_probs, torch.nan).cpu().numpy()
                if per_token
                else None,
            )
        )
        on_batch(min(start + batch_rows, len(samples)))
    return join_scores(parts)
