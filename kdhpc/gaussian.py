"""Mixtures of Gaussians: fits, sharpening, precision and recall, and the terms of the theory.

The simulation of section 3 of the paper in arrays: a truth p*, points D drawn from it, a teacher p'
fitted to D by EM, its weights sharpened by beta, and a student p'' fitted to points D' of that
teacher. Shapes: N points, K components, D dimensions. Log-probabilities and entropies are in nats
a point, natural logarithm.
"""

import math
from collections.abc import Callable
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
EMPHASISED_MASS = 0.95
MODE_RADIUS = 2.0
"""Mahalanobis distance within which a component covers a mode."""


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
    return _mix(mixture, component_log_prob(mixture, points))


def _mix(mixture: Mixture, log_probs: Floats) -> Floats:
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """The student's loss L on the teacher, its bound J, and the terms that J is the sum of.

    L = -E_{x~p'}[log sum_k'' alpha''_k'' N''_k''(x)] is at most J = -sum a' b' (Jensen). A teacher
    component with a small weight has a small a', so whatever b' the student leaves it with adds
    little: those terms it may ignore.

    Source: reconstructed from the terms that section 3 of the paper names.
    """

    joint_weights: Floats
    """a' = alpha'_k' alpha''_k'', [K', K''], with sum 1."""
    alignments: Floats
    """b' = E_{x~N'_k'}[log N''_k''(x)], [K', K''] nats."""
    bound: float
    """J, nats."""
    gap: Estimate
    """J - L: at least 0, and 0 for a student of one component."""

    @property
    def loss(self) -> float:
        """L, nats; its standard error is the gap's."""
        return self.bound - self.gap.value


def bound(teacher: Mixture, student: Mixture, points: Floats) -> Bound:
    """Loss, bound and terms; the gap is averaged over `points` [N, D] drawn from the teacher."""
    joint = np.outer(teacher.weights, student.weights)
    aligned = alignments(teacher, student)
    gap = Estimate(value=0.0)
    if student.num_components > 1:
        log_probs = component_log_prob(student, points)
        # Jensen's inequality holds at every point; rounding must not make it fail.
        gap = monte_carlo(np.maximum(_mix(student, log_probs) - log_probs @ student.weights, 0.0))
    return Bound(
        joint_weights=joint,
        alignments=aligned,
        bound=-float((joint * aligned).sum()),
        gap=gap,
    )


def emphasised(mixture: Mixture) -> Bools:
    """The smallest set of components whose weights sum to at least 0.95.

    Returns:
        [K] bool.
    """
    order = np.argsort(-mixture.weights, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(mixture.weights[order]), EMPHASISED_MASS))
    found = np.zeros(mixture.num_components, dtype=bool)
    found[order[:count]] = True
    return found


def covered(mixture: Mixture, truth: Mixture, components: Bools | None = None) -> Bools:
    """Modes of the truth whose centre lies within Mahalanobis distance 2 of a component.

    Args:
        mixture: whose components cover.
        truth: whose means are the modes.
        components: [K] bool, which of the components count; all if not given.

    Returns:
        [K of truth] bool.
    """
    within = np.empty((mixture.num_components, truth.num_components), dtype=bool)
    factors = np.linalg.cholesky(mixture.covariances)
    for index, (mean, factor) in enumerate(zip(mixture.means, factors, strict=True)):
        scaled = (truth.means - mean) @ np.linalg.inv(factor).T
        within[index] = np.einsum("kd,kd->k", scaled, scaled) <= MODE_RADIUS**2
    return np.asarray(within[slice(None) if components is None else components].any(axis=0))


Sampler = Callable[[Mixture, str], Floats]
"""Evaluation points [N, D] of a mixture, from the stream of this name."""


def score_student(
    truth: Mixture, student: Mixture, train_points: Floats, points_of: Sampler
) -> Facts:
    """What is known of a student from p* and D alone.

    Args:
        truth: p*.
        student: p''.
        train_points: D, [N, D]; the released code takes recall over these.
        points_of: evaluation points; the streams are called `truth` and `student`.

    Returns:
        Numbers and arrays by name. `as_defined` is scored under or averaged over p*; `error` is a
        Monte Carlo standard error, 0 where `as_defined` is a closed form.
    """
    student_points, truth_points = points_of(student, "student"), points_of(truth, "truth")
    precision = expected_log_prob(student, truth, student_points)
    recall = expected_log_prob(truth, student, truth_points)
    sampled_recall = monte_carlo(log_prob(student, truth_points))
    own, truths = entropy(student, student_points), entropy(truth, truth_points)
    return {
        "precision_as_defined": precision.value,
        "precision_error": precision.error,
        "recall_as_defined": recall.value,
        "recall_error": recall.error,
        "recall_monte_carlo": sampled_recall.value,
        "recall_monte_carlo_error": sampled_recall.error,
        "recall_as_published": float(log_prob(student, train_points).mean()),
        "student_entropy_nats": own.value,
        "truth_entropy_nats": truths.value,
        # precision = -H(p'') - KL(p''||p*) and recall = -H(p*) - KL(p*||p'')
        "kl_student_truth_nats": -own.value - precision.value,
        "kl_truth_student_nats": -truths.value - recall.value,
        "covered_modes": covered(student, truth),
    }


def score_distillation(
    truth: Mixture, teacher: Mixture, student: Mixture, direct: Mixture, points_of: Sampler
) -> Facts:
    """What is known of a student from its sharpened teacher.

    Args:
        truth: p*.
        teacher: p' at beta.
        student: p'', fitted to points of that teacher.
        direct: the student that was fitted to D.
        points_of: evaluation points; the streams are called `student`, `direct` and `teacher`.

    Returns:
        Numbers and arrays by name. `precision_as_published` is scored under the teacher, as the
        released code does; for the direct student too, so it depends on beta.
    """
    teacher_points = points_of(teacher, "teacher")
    terms = bound(teacher, student, teacher_points)
    chosen = emphasised(teacher)
    modes = covered(teacher, truth, chosen)
    scored = {
        "precision_as_published": points_of(student, "student"),
        "direct_precision_as_published": points_of(direct, "direct"),
    }
    published: Facts = {
        name: float(log_prob(teacher, points).mean()) for name, points in scored.items()
    }
    return published | {
        "teacher_weights": teacher.weights,
        "weight_entropy_nats": weight_entropy(teacher),
        "teacher_entropy_nats": entropy(teacher, teacher_points).value,
        "emphasised": chosen,
        "emphasised_modes": modes,
        "difficulty": int(modes.sum()) - student.num_components,
        "joint_weights": terms.joint_weights,
        "alignments": terms.alignments,
        "bound_nats": terms.bound,
        "loss_nats": terms.loss,
        "gap_nats": terms.gap.value,
        "gap_error_nats": terms.gap.error,
    }
