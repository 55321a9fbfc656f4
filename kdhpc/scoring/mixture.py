"""Score sequences under a mixture of models: a pass through each component, then one sum.

The log-probability of the first t tokens is log sum_k w_k p_k(x_1..t); that of a token given those
before it is the difference of two of these. The component is drawn after the prompt, so its tokens
say nothing of it.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from kdhpc.models.mixture import LanguageMixture
from kdhpc.scoring.counting import Counting
from kdhpc.scoring.likelihood import token_log_probs
from kdhpc.scoring.scorer import lengths_of
from kdhpc.storage.score_shards import NUM_FIRST, Scores, join_scores
from kdhpc.storage.token_shards import Samples


def score_mixture(
    mixture: LanguageMixture,
    samples: Samples,
    *,
    counting: Counting,
    batch_rows: int,
    head_tokens: int,
    per_token: bool = False,
    betas: Sequence[float] = (1.0,),
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> list[Scores]:
    """Compute the log-probabilities of sequences under a mixture and under its components.

    One pass through each component serves every beta.

    Args:
        mixture: the mixture.
        samples: N sequences.
        counting: which tokens count.
        batch_rows: number of consecutive rows that are scored together.
        head_tokens: largest number of positions whose logits are in memory at once.
        per_token: whether to keep the log-probability of every token.
        betas: exponents by which the weights of the mixture are sharpened.
        on_batch: called after each batch with the number of sequences scored so far.

    Returns:
        Scores for each beta, with `component_log_prob` and `component_first_log_prob`.
    """
    parts: list[list[Scores]] = [[] for _ in betas]
    for start in range(0, len(samples), batch_rows):
        batch = samples[start : start + batch_rows]
        ids = torch.from_numpy(batch.ids.astype(np.int64)).to(mixture.device)
        length, num_prompt = lengths_of(batch, mixture.device)
        drawn = counting.drawn(ids, length, num_prompt)
        of_components = torch.stack(
            [
                token_log_probs(part.model, ids, head_tokens=head_tokens)[0]
                for part in mixture.components
            ]
        )
        sums = torch.where(drawn, of_components, 0.0).double().cumsum(2)
        counts, end = (rule(ids, length, num_prompt) for rule in (counting.of, counting.end_of))
        is_first = drawn & (drawn.cumsum(1) <= NUM_FIRST)
        first = torch.where(is_first, of_components, 0.0).double().sum(2)
        for scores, beta in zip(parts, betas, strict=True):
            weights = torch.from_numpy(mixture.sharpened(beta)).to(mixture.device)
            log_prob = token_log_prob(sums, weights)
            kept = torch.where(counts, log_prob, torch.nan).float().cpu().numpy()
            scores.append(
                Scores(
                    log_prob_sum=torch.where(counts, log_prob, 0.0).sum(1).cpu().numpy(),
                    num_tokens=counts.sum(1, dtype=torch.int32).cpu().numpy(),
                    token_log_prob=kept if per_token else None,
                    end_log_prob=torch.where(end, log_prob, 0.0).sum(1).cpu().numpy(),
                    component_log_prob=sums[:, :, -1].T.contiguous().cpu().numpy(),
                    component_first_log_prob=first.T.contiguous().cpu().numpy(),
                )
            )
        on_batch(min(start + batch_rows, len(samples)))
    return [join_scores(scores) for scores in parts]


def token_log_prob(sums: Tensor, weights: Tensor) -> Tensor:
    """Return the log-probability of each token under the mixture, given the tokens before it.

    Args:
        sums: [K, B, L] float64, log-probability of all tokens up to each under each component.
        weights: [K] float64 weights of the components, whose sum is 1.

    Returns:
        [B, L] float64 in nats.
    """
    whole = (weights.log()[:, None, None] + sums).logsumexp(0)
    return torch.diff(whole, dim=1, prepend=torch.zeros_like(whole[:, :1]))
