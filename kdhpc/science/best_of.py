"""How good the best of k answers is on average, without bias.

Source: M. Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), eq. 1,
for answers that are right or wrong. The same mean over all choices of k answers exists for any
number that says how good an answer is.
"""

import numpy as np
from numpy.typing import NDArray


def best_of_k(
    values: NDArray[np.number], prompt: NDArray[np.integer], k: int
) -> NDArray[np.float64]:
    """Estimate the mean of the largest of k values of each prompt, over all choices of k.

    Of values that are 0 or 1 this is pass@k, the probability that one of k answers is right.

    Args:
        values: [N] how good each answer is.
        prompt: [N] whose answer it is, from 0 to P - 1.
        k: number of answers, at least 1.

    Returns:
        [P].

    Raises:
        ValueError: if a prompt has fewer than k answers.
    """
    drawn = np.bincount(prompt)
    if k < 1 or drawn.min() < k:
        raise ValueError(f"best of {k}: a prompt has {drawn.min()} answers; expected at least {k}")
    weights = {n: _weights(n, k) for n in {*drawn.tolist()}}
    order = np.lexsort((values, prompt))
    weight = np.concatenate([weights[n] for n in drawn.tolist()])
    return np.bincount(prompt[order], weight * values[order]).astype(np.float64)


def _weights(n: int, k: int) -> NDArray[np.float64]:
    """Return the share [n] of the choices of k of n values in which the i-th smallest is largest.

    It is C(i-1, k-1) / C(n, k). For i = n it is k / n; a step down multiplies by (i-k) / (i-1).
    """
    weights = np.zeros(n)
    i = np.arange(n, k, -1.0)
    weights[k - 1 :] = (k / n * np.cumprod([1.0, *(i - k) / (i - 1.0)]))[::-1]
    return weights
