"""Draw sequences from a mixture of models: a component for each, then its tokens."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from kdhpc import seeding
from kdhpc.sampling.sampler import Sampler
from kdhpc.storage.token_shards import Samples


def draw_components(
    weights: NDArray[np.float64], *, rows: range, seed: int, stream: str
) -> NDArray[np.uint8]:
    """Draw which component each sequence comes from.

    Args:
        weights: [K] weights, whose sum is 1.
        rows: indices of N sequences.
        seed: seed of the run.
        stream: name of the random stream of the sequences; components have one of their own.

    Returns:
        [N] indices of components.
    """
    uniform = seeding.uniforms(seed, f"{stream}/component", rows, 1)[:, 0]
    ends = np.cumsum(weights)
    component: NDArray[np.uint8] = np.searchsorted(ends, uniform * ends[-1], side="right").astype(
        np.uint8
    )
    return component


def sample_mixture(
    samplers: Sequence[Sampler],
    component: NDArray[np.uint8],
    *,
    rows: range,
    seed: int,
    stream: str,
    on_batch: Callable[[int], None] = lambda rows_done: None,
) -> Samples:
    """Draw the sequences `rows` of a stream, each from its component.

    Sequences of one component fill batches of the sampler's size together. The last batch repeats
    its last sequence, so a sequence depends on its component and its index alone.

    Args:
        samplers: a sampler of each component.
        component: [N] indices of components.
        rows: indices of N sequences.
        seed: seed of the run.
        stream: name of the random stream.
        on_batch: called after each batch with the number of sequences drawn so far.

    Returns:
        N sequences; their log-probabilities are those under the component alone.
    """
    parts, order, done = [], [], 0
    for index, sampler in enumerate(samplers):
        places = np.flatnonzero(component == index)
        for start in range(0, len(places), sampler.batch_rows):
            drawn = places[start : start + sampler.batch_rows]
            filled = np.pad(drawn, (0, sampler.batch_rows - len(drawn)), mode="edge")
            batch = sampler.batch(seed, stream, [rows.start + int(place) for place in filled])
            parts.append(batch[: len(drawn)])
            order.append(drawn)
            done += len(drawn)
            on_batch(done)
    joined, back = Samples.join(parts), np.argsort(np.concatenate(order))
    return Samples(**{name: array[back] for name, array in joined.arrays().items()})
