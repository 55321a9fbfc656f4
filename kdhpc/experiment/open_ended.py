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
    on_prompt: Callable[[int], None] = lambda prompts_done: None,
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
        on_prompt: called after each prompt with the number of prompts done so far.

    Returns:
        Arrays of N = P x 16 continuations: `log_prob` [N] float64, log-probability under the truth
        in nats per counted token; `distinct` [N] float64, the mean over its 4-grams of 1 / number
        of times that the continuations of its prompt have it; NaN where there is no such token or
        4-gram; `cluster` [N] int32, the prompt.
    """
    import numpy as np
    import torch

    from kdhpc.sampling.sampler import sample, sampler_for
    from kdhpc.science.diversity import distinct_shares
    from kdhpc.scoring.scorer import score
    from kdhpc.selection import Selection

    sampler = sampler_for(
        loaded,
        prompt_ids=tuple(prompts[0]),
        length=length,
        batch_rows=CONTINUATIONS,
        selection=Selection(),
        draw=draw,
        counting=counting,
        engine=engine,
    )
    num_prompt = counting.num_prompt
    log_probs, distinct = [], []
    for index, prompt in enumerate(prompts):
        sampler.prompt = torch.tensor(prompt, device=sampler.device)
        samples = sample(sampler, rows=range(CONTINUATIONS), seed=seed, stream=f"{stream}/{index}")
        [scores] = score(
            truth, samples, counting=counting, batch_rows=CONTINUATIONS, head_tokens=head_tokens
        ).values()
        count = scores.num_tokens
        log_probs.append(np.where(count > 0, scores.log_prob_sum / np.maximum(count, 1), np.nan))
        distinct.append(
            distinct_shares(samples.ids[:, num_prompt:], samples.length - num_prompt, NGRAM)
        )
        on_prompt(index + 1)
    loaded.sampler = None  # it has the last of these prompts now
    return {
        "log_prob": np.concatenate(log_probs),
        "distinct": np.concatenate(distinct),
        CLUSTER: np.repeat(np.arange(len(prompts), dtype=np.int32), CONTINUATIONS),
    }
