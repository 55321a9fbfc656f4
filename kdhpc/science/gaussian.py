"""Mixtures of Gaussians: fits, sharpening, precision and recall, and the terms of the theory.

The simulation of section 3 of the paper in arrays: a truth p*, points D drawn from it, a teacher p'
fitted to D by EM, its weights sharpened by beta, and a student p'' fitted to points D' of that
teacher. Shapes: N points, K components, D dimensions. Log-probabilities and entropies are in nats
a point, natural logarithm.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from kdhpc import seeding

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Facts = dict[str, float | Floats | Bools]
"""Numbers and arrays by name."""
Covariance = Literal["diagonal", "full"]
GRID_VARIANCE = 0.025
VARIANCE_FLOOR = 1e-6
"""Added to the fitted variances, as scikit-learn does."""
EM_TOLERANCE = 1e-3
"""EM ends when a step gains less than this many nats a point: scikit-learn's default, which the
released code keeps. Smaller ones make the teacher's weights a little more uneven."""
MAX_EM_STEPS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A mixture of K Gaussians in D dimensions."""

    weights: Floats
    """[K], not negative, with sum 1."""
    means: Floats
    """[K, D]."""
    covariances: Floats
    """[K, D, D], positive definite."""

    @property
    def num_components(self) -> int:
        return len(self.weights)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An expectation and its standard error, which is 0 for a closed form."""

    value: float
    error: float = 0.0


def grid_truth() -> Mixture:
    """The paper's p*: eight modes on the grid {-1, 0, 1}^2 without its centre."""
    steps = (-1.0, 0.0, 1.0)
    return _equal_modes(np.array([(x, y) for x in steps for y in steps if (x, y) != (0.0, 0.0)]))


def random_truth(num_modes: int, dimension: int, *, seed: int, stream: str) -> Mixture:
    """Modes of the grid's size and weight whose means are uniform in the cube [-1, 1]^D."""
    return _equal_modes(2.0 * seeding.uniform_block(seed, stream, num_modes, dimension) - 1.0)


def _equal_modes(means: Floats) -> Mixture:
    num_modes, dimension = means.shape
    return Mixture(
        weights=np.full(num_modes, 1.0 / num_modes),
        means=means,
        covariances=np.tile(GRID_VARIANCE * np.eye(dimension), (num_modes, 1, 1)),
    )


def draw(mixture: Mixture, num_points: int, *, seed: int, stream: str) -> Floats:
    """Points of a mixture; more points of a stream begin with the same ones.

    Returns:
        [N, D].
    """
    dimension = mixture.means.shape[1]
    uniforms = seeding.uniform_block(seed, stream, num_points, 1 + dimension)
    chosen = np.searchsorted(np.cumsum(mixture.weights)[:-1], uniforms[:, 0], side="right")
    return _place(mixture, chosen, ndtri(uniforms[:, 1:]))


def draw_evenly(mixture: Mixture, num_points: int, *, seed: int, stream: str) -> Floats:
    """The same number of points from every component, one component after the other.

    Returns:
        [N, D]; `num_points` is a multiple of K.
    """
    count, dimension = mixture.means.shape
    noise = ndtri(seeding.uniform_block(seed, stream, num_points, dimension))
    return _place(mixture, np.repeat(np.arange(count), num_points // count), noise)


def _place(mixture: Mixture, chosen: NDArray[np.intp], noise: Floats) -> Floats:
    """Standard normal noise [N, D] moved to each point's component."""
    points = np.empty_like(noise)
    factors = np.linalg.cholesky(mixture.covariances)
    for index, (mean, factor) in enumerate(zip(mixture.means, factors, strict=True)):
        rows = chosen == index
        points[rows] = mean + noise[rows] @ factor.T
    return points


def fit(
    points: Floats,
    num_components: int,
    covariance: Covariance,
    *,
    num_starts: int,
    seed: int,
    stream: str,
) -> Mixture:
    """Maximum likelihood: in closed form for one component, else the best of several runs of EM.

    Args:
        points: [N, D].
        num_components: K.
        covariance: `diagonal` or `full`.
        num_starts: runs of EM, each from its own k-means clustering.
        seed: of the run.
        stream: of the k-means clusterings.
    """
    if num_components == 1:
        spread = np.atleast_2d(np.cov(points, rowvar=False, bias=True))
        spread = np.diag(np.diag(spread)) if covariance == "diagonal" else spread
        floor = VARIANCE_FLOOR * np.eye(len(spread))
        return Mixture(
            weights=np.ones(1),
            means=points.mean(axis=0, keepdims=True),
            covariances=(spread + floor)[None],
        )
    from sklearn.mixture import GaussianMixture

    found = GaussianMixture(
        num_components,
        covariance_type="diag" if covariance == "diagonal" else "full",
        reg_covar=VARIANCE_FLOOR,
        tol=EM_TOLERANCE,
        max_iter=MAX_EM_STEPS,
        n_init=num_starts,
        random_state=seeding.integer_seed(seed, stream) % 2**32,
    ).fit(points)
    spreads = found.covariances_
    if covariance == "diagonal":
        spreads = spreads[:, :, None] * np.eye(points.shape[1])
    return Mixture(weights=found.weights_, means=found.means_, covariances=spreads)


def sharpen(mixture: Mixture, beta: float) -> Mixture:
    """Weights to the power beta, normalised; means and covariances stay.

    Source: alpha'_k(beta) of section 3 of the paper; beta = 1 is the identity.
    """
    with np.errstate(divide="ignore"):
        logits = beta * np.log(mixture.weights)
    powers = np.exp(logits - logits.max())
    return Mixture(
        weights=powers / powers.sum(), means=mixture.means, covariances=mixture.covariances
    )


def component_log_prob(mixture: Mixture, points: Floats) -> Floats:
    """Log-density of every component at every point [N, D].

    Returns:
        [N, K] nats.
    """
    found = np.empty((len(points), mixture.num_components))
    factors = np.linalg.cholesky(mixture.covariances)
    for index, (mean, factor) in enumerate(zip(mixture.means, factors, strict=True)):
        scaled = (points - mean) @ np.linalg.inv(factor).T
        found[:, index] = _log_peak(factor) - 0.5 * np.einsum("nd,nd->n", scaled, scaled)
    return found


def _log_peak(factor: Floats) -> float:
    """Log-density at the mean of a Gaussian with this Cholesky factor."""
    return -0.5 * len(factor) * math.log(2.0 * math.pi) - float(np.log(np.diag(factor)).sum())


def log_prob(mixture: Mixture, points: Floats) -> Floats:
    """Log-density at every point [N, D].

    Returns:
        [N] nats.
    """
    return mix(mixture, component_log_prob(mixture, points))


def mix(mixture: Mixture, log_probs: Floats) -> Floats:
    """[N] from the components' [N, K]."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp.reduce(np.log(mixture.weights) + log_probs, axis=1))


def alignments(p: Mixture, q: Mixture) -> Floats:
    """E over component k of p of the log-density of component j of q, in closed form.

    Between teacher and student this is the paper's *geometric alignment* b'.

    Returns:
        [K of p, K of q] nats.
    """
    found = np.empty((p.num_components, q.num_components))
    for j, (mean, factor) in enumerate(
        zip(q.means, np.linalg.cholesky(q.covariances), strict=True)
    ):
        inverse = np.linalg.inv(factor)
        shift = (p.means - mean) @ inverse.T
        trace = np.einsum("da,kab,db->k", inverse, p.covariances, inverse)
        found[:, j] = _log_peak(factor) - 0.5 * (trace + np.einsum("kd,kd->k", shift, shift))
    return found


def expected_log_prob(p: Mixture, q: Mixture, points: Floats) -> Estimate:
    """E_{x~p}[log q(x)]: in closed form where q has one component, else by Monte Carlo.

    Args:
        p: what is averaged over.
        q: what is scored under.
        points: [N, D] drawn from p.
    """
    if q.num_components == 1:
        return Estimate(value=float(p.weights @ alignments(p, q)[:, 0]))
    return monte_carlo(log_prob(q, points))


def monte_carlo(values: Floats) -> Estimate:
    """Mean of independent values [N] and its standard error."""
    return Estimate(
        value=float(values.mean()), error=float(values.std(ddof=1) / math.sqrt(len(values)))
    )


def entropy(mixture: Mixture, points: Floats) -> Estimate:
    """-E[log p] over a mixture that the points [N, D] were drawn from."""
    found = expected_log_prob(mixture, mixture, points)
    return Estimate(value=-found.value, error=found.error)


def weight_entropy(mixture: Mixture) -> float:
    """Entropy of the mixture's weights: log K where they are equal, 0 where one has all."""
    weights = mixture.weights[mixture.weights > 0.0]
    return -float(weights @ np.log(weights))
