"""Damage sequences a little, to see where a model puts the mass that it takes from them.

Source: LeBrun, Sordoni and O'Donnell 2022 (arXiv 2203.12788), who perturb a known truth's samples.
"""

import numpy as np

from kdhpc import seeding
from kdhpc.scoring.counting import Counting
from kdhpc.storage.token_shards import Samples
from kdhpc.types import Corruption


def corrupt(
    samples: Samples, kind: Corruption, *, seed: int, rows: range, counting: Counting
) -> Samples:
    """Change one token of each sequence, at a place that is drawn for it.

    The prompt and the end token stay, but a sequence that is full loses its last token to a
    repeated one, even if it is the end token. Sequences with fewer than two tokens between prompt
    and end stay as they are, and so do those in which two equal tokens are exchanged.

    Args:
        samples: N sequences.
        kind: what is done to them.
        seed: seed of the run.
        rows: sequence indices of the N sequences.
        counting: the number of tokens of the prompt, and which ids end a sequence.

    Returns:
        The changed sequences; their log-probabilities are NaN.
    """
    ids, length = samples.ids.copy(), samples.length.copy()
    ends = {counting.eos, *counting.other_ends}
    prompts = samples.num_prompt
    starts = np.full(len(length), counting.num_prompt) if prompts is None else prompts
    places = seeding.uniforms(seed, f"corrupt/{kind}", rows, 1)[:, 0]
    for row, place in enumerate(places):
        start, stop = int(starts[row]), int(length[row])
        stop -= stop > start and int(ids[row, stop - 1]) in ends
        size = stop - start
        if size < 2:
            continue
        at = start + int(place * (size - (kind == "swap")))
        if kind == "swap":
            ids[row, [at, at + 1]] = ids[row, [at + 1, at]]
        elif kind == "drop":
            ids[row, at:-1] = ids[row, at + 1 :].copy()
            length[row] -= 1
        else:
            ids[row, at + 1 :] = ids[row, at:-1].copy()
            length[row] = min(length[row] + 1, ids.shape[1])
    unknown = np.full(len(length), np.nan)
    return Samples(
        ids=ids, length=length, log_prob_sum=unknown, log_prob_tau_sum=unknown, num_prompt=prompts
    )
