"""Mixtures of Gaussians: draws, fits, sharpening, log-densities and expectations.

They are the parts of the simulation in section 3 of the paper: a truth p*, points D drawn from it,
a teacher p' fitted to D by EM, its weights sharpened by beta, and a student p'' fitted to points D'
of that teacher. Shapes: N points, K components, D dimensions. Log-densities and entropies use the
natural logarithm and are in nats per point.
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
"""Variance of the truth's modes in every dimension."""
VARIANCE_FLOOR = 1e-6
"""Number added to all fitted variances, as scikit-learn does."""
EM_TOLERANCE = 1e-3
"""Gain in nats per point below which EM ends. It is scikit-learn's default, which the released code
uses. Smaller tolerances make the teacher's weights a little more uneven."""
MAX_EM_STEPS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """A mixture of K Gaussians in D dimensions."""

    weights: Floats
    """[K], not negative; they sum to 1."""
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
    """Return the paper's p*: eight modes on the grid {-1, 0, 1}^2 without its centre."""
    steps = (-1.0, 0.0, 1.0)
    return _equal_modes(np.array([(x, y) for x in steps for y in steps if (x, y) != (0.0, 0.0)]))


def random_truth(num_modes: int, dimension: int, *, seed: int, stream: str) -> Mixture:
    """Draw modes with equal weights and the grid's variance; means are uniform in [-1, 1]^D."""
    return _equal_modes(2.0 * seeding.uniform_block(seed, stream, num_modes, dimension) - 1.0)


def _equal_modes(means: Floats) -> Mixture:
    num_modes, dimension = means.shape
    return Mixture(
        weights=np.full(num_modes, 1.0 / num_modes),
        means=means,
        covariances=np.tile(GRID_VARIANCE * np.eye(dimension), (num_modes, 1, 1)),
    )


def draw(mixture: Mixture, num_points: int, *, seed: int, stream: str) -> Floats:
    """Draw points of a mixture; a longer draw from a stream starts with the same points.

    Returns:
        [N, D].
    """
    dimension = mixture.means.shape[1]
    uniforms = seeding.uniform_block(seed, stream, num_points, 1 + dimension)
    component = np.searchsorted(np.cumsum(mixture.weights)[:-1], uniforms[:, 0], side="right")
    return _place(mixture, component, ndtri(uniforms[:, 1:]))


def draw_evenly(mixture: Mixture, num_points: int, *, seed: int, stream: str) -> Floats:
    """Draw the same number of points from every component, ordered by component.

    Args:
        mixture: mixture to draw from.
        num_points: number of points N, a multiple of K.
        seed: seed of the run.
        stream: name of the random stream.

    Returns:
        [N, D].
    """
    count, dimension = mixture.means.shape
    noise = ndtri(seeding.uniform_block(seed, stream, num_points, dimension))
    return _place(mixture, np.repeat(np.arange(count), num_points // count), noise)


def _place(mixture: Mixture, component: NDArray[np.intp], noise: Floats) -> Floats:
    """Transform standard normal noise [N, D] to points of the components [N]."""
    points = np.empty_like(noise)
    factors = np.linalg.cholesky(mixture.covariances)
    for index, (mean, factor) in enumerate(zip(mixture.means, factors, strict=True)):
        rows = component == index
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
    """Fit a mixture by maximum likelihood.

    One component has a closed form; for more, the best of several EM runs is taken.

    Args:
        points: [N, D].
        num_components: K.
        covariance: form of the covariances, `diagonal` or `full`.
        num_starts: number of EM runs, each from its own k-means clustering.
        seed: seed of the run.
        stream: name of the random stream of the k-means clusterings.
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

    model = GaussianMixture(
        num_components,
        covariance_type="diag" if covariance == "diagonal" else "full",
        reg_covar=VARIANCE_FLOOR,
        tol=EM_TOLERANCE,
        max_iter=MAX_EM_STEPS,
        n_init=num_starts,
        random_state=seeding.integer_seed(seed, stream) % 2**32,
    ).fit(points)
    spreads = model.covariances_
    if covariance == "diagonal":
        spreads = spreads[:, :, None] * np.eye(points.shape[1])
    return Mixture(weights=model.weights_, means=model.means_, covariances=spreads)


def sharpen(mixture: Mixture, beta: float) -> Mixture:
    """Raise the weights to the power beta and normalise them; keep means and covariances.

    Source: alpha'_k(beta) of section 3 of the paper; beta = 1 is the identity.
    """
    with np.errstate(divide="ignore"):
        logits = beta * np.log(mixture.weights)
    powers = np.exp(logits - logits.max())
    return Mixture(
        weights=powers / powers.sum(), means=mixture.means, covariances=mixture.covariances
    )


def temper(mixture: Mixture, beta: float) -> Mixture:
    """Raise the density of one Gaussian to the power beta and normalise it.

    N(m, C) becomes N(m, C / beta), which is narrower if beta is above 1; beta = 1 is the identity.

    Raises:
        ValueError: if there are several components; then the normaliser has no closed form.
    """
    if mixture.num_components > 1:
        raise ValueError(f"{mixture.num_components} components; expected one")
    return Mixture(
        weights=mixture.weights, means=mixture.means, covariances=mixture.covariances / beta
    )


def component_log_prob(mixture: Mixture, points: Floats) -> Floats:
    """Compute the log-density of every component at every point [N, D].

    Returns:
        [N, K] in nats.
    """
    log_probs = np.empty((len(points), mixture.num_components))
    factors = np.linalg.cholesky(mixture.covariances)
    for index, (mean, factor) in enumerate(zip(mixture.means, factors, strict=True)):
        scaled = (points - mean) @ np.linalg.inv(factor).T
        log_probs[:, index] = _log_peak(factor) - 0.5 * np.einsum("nd,nd->n", scaled, scaled)
    return log_probs


def _log_peak(factor: Floats) -> float:
    """Return the log-density at the mean of a Gaussian with this Cholesky factor."""
    return -0.5 * len(factor) * math.log(2.0 * math.pi) - float(np.log(np.diag(factor)).sum())


def log_prob(mixture: Mixture, points: Floats) -> Floats:
    """Compute the log-density of the mixture at every point [N, D].

    Returns:
        [N] in nats.
    """
    return mix(mixture, component_log_prob(mixture, points))


def mix(mixture: Mixture, log_probs: Floats) -> Floats:
    """Combine log-densities of the components [N, K] to log-densities of the mixture [N]."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.logaddexp.reduce(np.log(mixture.weights) + log_probs, axis=1))


def alignments(p: Mixture, q: Mixture) -> Floats:
    """Compute E_{x ~ component k of p}[log-density of component j of q at x] in closed form.

    Between teacher and student this is the paper's *geometric alignment* b'.

    Returns:
        [K of p, K of q] in nats.
    """
    expectations = np.empty((p.num_components, q.num_components))
    for j, (mean, factor) in enumerate(
        zip(q.means, np.linalg.cholesky(q.covariances), strict=True)
    ):
        inverse = np.linalg.inv(factor)
        shift = (p.means - mean) @ inverse.T
        trace = np.einsum("da,kab,db->k", inverse, p.covariances, inverse)
        squares = np.einsum("kd,kd->k", shift, shift)
        expectations[:, j] = _log_peak(factor) - 0.5 * (trace + squares)
    return expectations


def expected_log_prob(p: Mixture, q: Mixture, points: Floats) -> Estimate:
    """Compute E_{x~p}[log q(x)], in closed form if q has one component, else by Monte Carlo.

    Args:
        p: mixture to average over.
        q: mixture to score under.
        points: [N, D] drawn from p.
    """
    if q.num_components == 1:
        return Estimate(value=float(p.weights @ alignments(p, q)[:, 0]))
    return monte_carlo(log_prob(q, points))


def monte_carlo(values: Floats) -> Estimate:
    """Return the mean of independent values [N] and its standard error."""
    return Estimate(
        value=float(values.mean()), error=float(values.std(ddof=1) / math.sqrt(len(values)))
    )


def entropy(mixture: Mixture, points: Floats) -> Estimate:
    """Compute -E[log p] of a mixture from points [N, D] that were drawn from it."""
    mean_log_prob = expected_log_prob(mixture, mixture, points)
    return Estimate(value=-mean_log_prob.value, error=mean_log_prob.error)


def weight_entropy(mixture: Mixture) -> float:
    """Return the entropy of the weights in nats: log K if they are equal, 0 if one of them is 1."""
    weights = mixture.weights[mixture.weights > 0.0]
    return -float(weights @ np.log(weights))
