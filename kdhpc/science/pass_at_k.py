"""The probability that at least one of k answers is right, without bias.

Source: M. Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374), eq. 1.
"""

import numpy as np
from numpy.typing import NDArray


def pass_at_k(
    num_right: NDArray[np.integer], num_drawn: NDArray[np.integer], k: int
) -> NDArray[np.float64]:
    """Estimate pass@k of each prompt from n answers, c of them right: 1 - C(n-c, k) / C(n, k).

    Args:
        num_right: [P] c.
        num_drawn: [P] n, at least k.
        k: number of answers, at least 1.

    Returns:
        [P].

    Raises:
        ValueError: if a prompt has fewer than k answers.
    """
    if k < 1 or num_drawn.min() < k:
        raise ValueError(f"pass@{k}: a prompt has {num_drawn.min()} answers; expected at least {k}")
    # C(n-c, k) / C(n, k) is the product of 1 - k / m for m from n-c+1 to n; with fewer than k wrong
    # answers, one of k is right for sure.
    fails = [
        float(np.prod(1.0 - k / np.arange(n - c + 1.0, n + 1.0))) if n - c >= k else 0.0
        for c, n in zip(num_right.tolist(), num_drawn.tolist(), strict=True)
    ]
    return 1.0 - np.array(fails)
