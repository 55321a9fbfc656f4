"""The open-ended task: prompts of the truth are continued by a model, several times each.

A good writer is both likely under the truth and various: continuations are scored by their
log-probability under the truth, and by how rarely their n-grams are those of other continuations of
the same prompt.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kdhpc.experiment.downstream import CLUSTER

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kdhpc.models.loading import LanguageModel, Loaded
    from kdhpc.scoring.counting import Counting

CONTINUATIONS = 16
"""Number of continuations of each prompt, at temperature 1."""
BATCH_ROWS = 64
"""Number of continuations that are decoded together."""
NGRAM = 4
"""Number of tokens of the n-grams that are counted."""


def continue_prompts(
    loaded: "Loaded",
    truth: "LanguageModel",
    prompts: Sequence[Sequence[int]],
    *,
    counting: "Counting",
    length: int,
    draw: str,
    engine: str,
    head_tokens: int,
    seed: int,
    stream: str,
    on_rows: Callable[[float], None] = lambda share_done: None,
) -> "dict[str, NDArray[np.generic]]":
    """Continue prompts with a model, and score what it writes.

    Args:
        loaded: the model that writes.
        truth: the model that stands for p*.
        prompts: ids of P prompts of equal length.
        counting: which tokens count; its prompt is as long as the prompts.
        length: number of tokens of a sequence, the prompt included.
        draw: how tokens are drawn, as in `sampling`.
        engine: what draws them, as in `sampling`.
        head_tokens: largest number of positions whose logits are in memory at once.
        seed: seed of the run.
        stream: random stream of the model; each prompt has its own part of it.
        on_rows: called after each batch with the share that is done.

    Returns:
        Arrays of N = P x 16 continuations: `log_prob` [N] float64, log-probability under the truth
        in nats per counted token; `distinct` [N] float64, the mean over its 4-grams of 1 / number
        of times that the continuations of its prompt have it; NaN where there is no such token or
        4-gram; `cluster` [N] int32, the prompt.
    """
    import numpy as np

    from kdhpc.sampling.sampler import Prompt, sample, sampler_for
    from kdhpc.science.diversity import distinct_shares
    from kdhpc.scoring.scorer import score
    from kdhpc.selection import Selection

    num_prompts, num_prompt = len(prompts), counting.num_prompt
    sampler = sampler_for(
        loaded,
        prompts=tuple(Prompt(ids=tuple(ids), stream=f"{i}") for i, ids in enumerate(prompts)),
        length=length,
        batch_rows=BATCH_ROWS,
        selection=Selection(),
        draw=draw,
        counting=counting,
        engine=engine,
    )
    num_rows = num_prompts * CONTINUATIONS
    samples = sample(
        sampler,
        rows=range(num_rows),
        seed=seed,
        stream=stream,
        on_batch=lambda done: on_rows(done / num_rows),
    )
    [scores] = score(
        truth, samples, counting=counting, batch_rows=BATCH_ROWS, head_tokens=head_tokens
    ).values()
    count = scores.num_tokens
    log_prob = np.where(count > 0, scores.log_prob_sum / np.maximum(count, 1), np.nan)
    distinct = np.empty(num_rows)
    for prompt in range(num_prompts):
        own = slice(prompt, None, num_prompts)
        distinct[own] = distinct_shares(
            samples.ids[own, num_prompt:], samples.length[own] - num_prompt, NGRAM
        )
    return {
        "log_prob": log_prob,
        "distinct": distinct,
        CLUSTER: (np.arange(num_rows) % num_prompts).astype(np.int32),
    }
