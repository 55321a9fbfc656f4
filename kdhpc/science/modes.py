"""Which modes of a mixture of models a set of sequences has, and what their mass depends on.

A sequence belongs to the components that it is likely under: its responsibilities are their
posterior probabilities. One that is unlikely even under the likeliest of them is *unassigned*, so
that text of no kind counts for none.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdhpc.science.intervals import Alternative

Floats = NDArray[np.float64]
OWN_TEXT = 0.01
"""Share of a component's own sequences that are less likely, per token, than any that is assigned
to it."""
ALPHA = 0.05
MAX_ORDERS = 5040
"""Most permutations of components that are used."""


def responsibilities(log_probs: Floats, weights: Floats) -> Floats:
    """Return the posterior probability of each component, given each sequence.

    Args:
        log_probs: [N, K] log-probability of whole sequences under each component, in nats.
        weights: [K] weights of the components.

    Returns:
        [N, K], whose rows have the sum 1.
    """
    logits = np.log(weights) + log_probs
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def floors(
    log_probs: Floats, num_tokens: NDArray[np.integer], component: NDArray[np.integer]
) -> Floats:
    """Return the log-probability per token below which a sequence is no text of a component.

    Args:
        log_probs: [N, K] log-probability of sequences under each component.
        num_tokens: [N] numbers of their tokens.
        component: [N] component that each was drawn from; each has some.

    Returns:
        [K] quantiles `OWN_TEXT` of each component's own sequences, in nats per token.
    """
    per_token = log_probs / np.maximum(num_tokens, 1)[:, None]
    return np.array(
        [
            np.quantile(per_token[component == index, index], OWN_TEXT)
            for index in range(log_probs.shape[1])
        ]
    )


def assigned(
    log_probs: Floats, num_tokens: NDArray[np.integer], weights: Floats, least: Floats
) -> Floats:
    """Return the responsibilities of sequences [N, K], with zeros where one is unassigned.

    Args:
        log_probs: [N, K] log-probability of sequences under each component.
        num_tokens: [N] numbers of their tokens.
        weights: [K] weights of the components.
        least: [K] the result of `floors`.
    """
    shares = responsibilities(log_probs, weights)
    best = shares.argmax(axis=1)
    rows = np.arange(len(best))
    per_token = log_probs[rows, best] / np.maximum(num_tokens, 1)
    return np.where((per_token >= least[best])[:, None], shares, 0.0)


def masses(shares: Floats) -> Floats:
    """Return the mass of each component [K]: its part of all that is assigned; 0 if nothing is.

    Args:
        shares: [N, K] the result of `assigned`.
    """
    counts = shares.sum(axis=0)
    return np.asarray(counts / max(float(counts.sum()), 1e-12))


def log_mass(shares: Floats, weights: Floats) -> Floats:
    """Return log(mass_k / w_k) [K] of a set of sequences.

    Half a sequence for each component, spread as in p*, is added to what is assigned, so that a
    mode without any has a logarithm, and nothing is moved towards other weights.

    Args:
        shares: [N, K] the result of `assigned`.
        weights: [K] weights of the components in p*.
    """
    counts = shares.sum(axis=0) + 0.5 * len(weights) * weights
    return np.asarray(np.log(counts / counts.sum()) - np.log(weights))


@dataclass(frozen=True, kw_only=True)
class Slope:
    """A coefficient of a regression over components, with an interval by permutation.

    The units are the components, however many seeds there are: under the hypothesis that the
    coefficient is b0, what is left of the outcome without b0 times the regressor has nothing to do
    with which component has which value of it, so all K! assignments are equally likely; nearly so
    if the regressor goes together with others. The statistic is the partial correlation. On each
    side the interval ends where b0 is rejected first.

    Source: N. R. Draper, D. M. Stoneman, Technometrics 8 (1966), 695-699.
    """

    estimate: float
    num_seeds: int
    num_components: int
    outcome: Floats
    """[P] product of the outcome with the regressor under each of P permutations; the first is the
    identity. Regressors have length 1, and are without what the others say of them."""
    regressor: Floats
    """[P] the same products of the regressor as it is."""

    @property
    def low(self) -> float:
        return self._end(-1.0)

    @property
    def high(self) -> float:
        return self._end(1.0)

    def p_value(self, against: float = 0.0, alternative: Alternative = "two-sided") -> float:
        """Return the p-value of the hypothesis that the coefficient is `against`.

        It is at least one over the number of permutations.
        """
        products = self.outcome - against * self.regressor
        if alternative == "two-sided":
            products = np.abs(products)
        if alternative == "less":
            products = -products
        least = products[0] - 1e-9 * np.abs(self.outcome).max()  # rounding breaks no ties
        return float((products >= least).mean())

    def _end(self, side: float) -> float:
        """Return an end of the 95 % interval; infinite if nothing on that side is rejected."""
        step = abs(self.outcome[0] / self.regressor[0]) + 1.0
        far = self.estimate + side * step
        while self.p_value(far) > ALPHA:
            step *= 2.0
            far = self.estimate + side * step
            if step > 1e6:
                return side * math.inf
        near = self.estimate
        for _ in range(60):
            middle = 0.5 * (near + far)
            near, far = (middle, far) if self.p_value(middle) > ALPHA else (near, middle)
        return near


def slopes(outcome: Floats, regressors: Sequence[Floats]) -> list[Slope] | None:
    """Regress an outcome on properties of components, with a constant for each seed.

    Args:
        outcome: [S, K] of S seeds and K components.
        regressors: properties [S, K], each of which is permuted over the components in turn.

    Returns:
        A slope for each regressor; None if they cannot be told apart.
    """
    num_seeds, num_components = outcome.shape
    centred = [values - values.mean(axis=1, keepdims=True) for values in (outcome, *regressors)]
    orders = permutations(num_components)
    found = []
    for index in range(1, len(centred)):
        others = np.stack(
            [values.ravel() for place, values in enumerate(centred[1:], 1) if place != index]
            or [np.zeros(outcome.size)],
            axis=1,
        )
        basis = _basis(others)

        def left(values: Floats, basis: Floats = basis) -> Floats:
            flat = values.reshape(-1, outcome.size)
            return np.asarray(flat - flat @ basis @ basis.T)

        permuted = left(np.stack([centred[index][:, order] for order in orders]))
        lengths = np.linalg.norm(permuted, axis=1)
        if lengths[0] <= 1e-9 * max(1.0, float(np.linalg.norm(centred[index]))):
            return None
        units = permuted / np.maximum(lengths, 1e-12)[:, None]
        own, regressor = left(centred[0])[0], left(centred[index])[0]
        products = units @ regressor
        found.append(
            Slope(
                estimate=float(units[0] @ own / products[0]),
                num_seeds=num_seeds,
                num_components=num_components,
                outcome=units @ own,
                regressor=products,
            )
        )
    return found


def permutations(number: int) -> list[tuple[int, ...]]:
    """Return all orders of a number of things, or `MAX_ORDERS` random ones; the first is theirs."""
    if math.factorial(number) <= MAX_ORDERS:
        return [*itertools.permutations(range(number))]
    noise = np.random.default_rng(0)
    drawn = [tuple(noise.permutation(number).tolist()) for _ in range(MAX_ORDERS - 1)]
    return [tuple(range(number)), *drawn]


def _basis(columns: Floats) -> Floats:
    """Return an orthonormal basis of the space of some columns [N, M]."""
    left, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    return np.asarray(left[:, sizes > 1e-9 * max(1.0, float(sizes.max(initial=0.0)))])
