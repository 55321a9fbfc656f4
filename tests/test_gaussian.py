"""Mixtures agree with closed forms and with likelihoods by hand, and have general properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import multivariate_normal

from kdhpc.science import distillation, gaussian
from kdhpc.science.gaussian import Estimate, Floats, Mixture

NUM_POINTS = 20000
COUNTS, BETAS = st.integers(1, 4), st.floats(0.1, 50.0)


def made(seed: int, num_components: int, dimension: int) -> Mixture:
    """Return a random mixture with no special properties."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(num_components, dimension, dimension))
    return Mixture(
        weights=generator.dirichlet(np.full(num_components, 2.0)),
        means=generator.normal(scale=2.0, size=(num_components, dimension)),
        covariances=factors @ factors.transpose(0, 2, 1) + 0.2 * np.eye(dimension),
    )


@st.composite
def mixtures(draw: st.DrawFn, dimension: int = 2) -> Mixture:
    return made(draw(st.integers(0, 10**6)), draw(COUNTS), dimension)


def points_of(mixture: Mixture, stream: str = "points") -> Floats:
    return gaussian.draw(mixture, NUM_POINTS, seed=0, stream=stream)


def permuted(mixture: Mixture, order: NDArray[np.int64]) -> Mixture:
    return Mixture(
        weights=mixture.weights[order],
        means=mixture.means[order],
        covariances=mixture.covariances[order],
    )


def assert_agree(closed: float, sampled: Estimate) -> None:
    """Check that a closed form and a Monte Carlo estimate agree within four standard errors."""
    assert sampled.error > 0.0
    assert abs(closed - sampled.value) <= 4.0 * sampled.error


# Properties of every mixture.


@given(mixtures())
def test_beta_one_is_the_identity(mixture: Mixture) -> None:
    np.testing.assert_allclose(gaussian.sharpen(mixture, 1.0).weights, mixture.weights, rtol=1e-12)


@given(mixtures(), BETAS, BETAS)
def test_entropy_of_the_weights_falls_as_beta_rises(
    mixture: Mixture, one: float, two: float
) -> None:
    low, high = sorted((one, two))
    entropies = [gaussian.weight_entropy(gaussian.sharpen(mixture, b)) for b in (low, high)]
    assert 0.0 <= entropies[1] <= entropies[0] + 1e-9
    assert entropies[0] <= math.log(mixture.num_components) + 1e-9


@given(mixtures(), st.floats(0.5, 5.0), st.floats(0.5, 5.0))
def test_sharpening_twice_is_sharpening_by_the_product(
    mixture: Mixture, one: float, two: float
) -> None:
    twice = gaussian.sharpen(gaussian.sharpen(mixture, one), two)
    np.testing.assert_allclose(
        twice.weights, gaussian.sharpen(mixture, one * two).weights, rtol=1e-9, atol=1e-300
    )


def test_weights_that_sharpening_pushes_to_zero_stay_finite() -> None:
    mixture = Mixture(
        weights=np.array([0.9, 0.1]), means=np.eye(2), covariances=np.tile(np.eye(2), (2, 1, 1))
    )
    sharpened = gaussian.sharpen(mixture, 1e5)
    assert sharpened.weights.tolist() == [1.0, 0.0]
    assert gaussian.weight_entropy(sharpened) == 0.0
    assert np.isfinite(gaussian.log_prob(sharpened, np.zeros((1, 2)))).all()


@given(mixtures(), mixtures(), st.integers(0, 10**6))
def test_permuting_components_changes_nothing(p: Mixture, q: Mixture, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(p.num_components)
    other, points = permuted(p, order), gaussian.draw(p, 50, seed=1, stream="x")
    np.testing.assert_allclose(gaussian.log_prob(other, points), gaussian.log_prob(p, points))
    assert math.isclose(gaussian.weight_entropy(other), gaussian.weight_entropy(p), abs_tol=1e-12)
    assert np.array_equal(distillation.emphasised(other), distillation.emphasised(p)[order])
    assert np.array_equal(distillation.covered(other, q), distillation.covered(p, q))
    assert np.array_equal(distillation.covered(q, other), distillation.covered(q, p)[order])
    before, after = (distillation.bound(m, q, points) for m in (p, other))
    np.testing.assert_allclose(after.joint_weights, before.joint_weights[order])
    np.testing.assert_allclose(after.alignments, before.alignments[order])
    assert math.isclose(after.bound, before.bound, rel_tol=1e-9)
    assert math.isclose(after.loss, before.loss, rel_tol=1e-9)


@given(mixtures(), mixtures())
def test_the_bound_is_not_below_the_loss(teacher: Mixture, student: Mixture) -> None:
    points = gaussian.draw(teacher, 200, seed=0, stream="teacher")
    terms = distillation.bound(teacher, student, points)
    assert math.isclose(terms.joint_weights.sum(), 1.0, rel_tol=1e-9)
    assert math.isclose(terms.bound, -(terms.joint_weights * terms.alignments).sum())
    if student.num_components == 1:
        assert terms.gap == Estimate(value=0.0)
        assert terms.loss == terms.bound
    else:
        assert terms.gap.value > 0.0
        assert terms.gap.error > 0.0


@given(mixtures())
def test_emphasised_components_are_the_fewest_that_hold_the_mass(mixture: Mixture) -> None:
    chosen = distillation.emphasised(mixture)
    kept = mixture.weights[chosen]
    assert kept.sum() >= distillation.EMPHASISED_MASS - 1e-12
    assert kept.sum() - kept.min() < distillation.EMPHASISED_MASS
    assert not (mixture.weights[~chosen] > kept.min()).any()


@given(mixtures(), st.integers(1, 50), st.integers(1, 50))
def test_more_points_of_a_stream_begin_with_the_same_ones(
    mixture: Mixture, few: int, more: int
) -> None:
    short, long = (gaussian.draw(mixture, count, seed=3, stream="a") for count in (few, few + more))
    np.testing.assert_allclose(long[:few], short, rtol=1e-12)
    assert not np.allclose(gaussian.draw(mixture, few, seed=3, stream="b"), short)


@given(mixtures(), st.floats(0.5, 5.0), st.floats(0.5, 5.0))
def test_one_component_is_tempered_by_the_product_and_several_are_refused(
    mixture: Mixture, one: float, two: float
) -> None:
    if mixture.num_components > 1:
        with pytest.raises(ValueError, match="expected one"):
            gaussian.temper(mixture, one)
        return
    twice = gaussian.temper(gaussian.temper(mixture, one), two)
    np.testing.assert_allclose(
        twice.covariances, gaussian.temper(mixture, one * two).covariances, rtol=1e-12
    )
    np.testing.assert_array_equal(gaussian.temper(mixture, 1.0).covariances, mixture.covariances)


# Closed forms, Monte Carlo and independent libraries.


@pytest.mark.parametrize("dimension", [1, 2, 16])
def test_densities_are_those_of_scipy(dimension: int) -> None:
    mixture = made(5, 3, dimension)
    points = gaussian.draw(mixture, 40, seed=0, stream="x")
    parts = [
        weight * multivariate_normal(mean, covariance).pdf(points)
        for weight, mean, covariance in zip(
            mixture.weights, mixture.means, mixture.covariances, strict=True
        )
    ]
    np.testing.assert_allclose(gaussian.log_prob(mixture, points), np.log(sum(parts)))


@pytest.mark.parametrize("dimension", [1, 2, 16])
def test_drawn_points_have_the_moments_of_the_mixture(dimension: int) -> None:
    mixture = made(8, 3, dimension)
    points = points_of(mixture)
    mean = mixture.weights @ mixture.means
    spread = np.diagonal(mixture.covariances, axis1=1, axis2=2) + mixture.means**2
    variance = mixture.weights @ spread - mean**2
    errors = np.sqrt(variance / NUM_POINTS)
    assert (np.abs(points.mean(axis=0) - mean) <= 4.0 * errors).all()
    np.testing.assert_allclose(points.var(axis=0), variance, rtol=0.1)


@settings(max_examples=20)
@given(mixtures(dimension=3), st.integers(0, 10**6))
def test_closed_forms_agree_with_monte_carlo(truth: Mixture, seed: int) -> None:
    student = made(seed, 1, 3)
    points = points_of(truth)
    recall = gaussian.expected_log_prob(truth, student, points)
    assert recall.error == 0.0
    assert_agree(recall.value, gaussian.monte_carlo(gaussian.log_prob(student, points)))
    own = points_of(student)
    entropy = gaussian.entropy(student, own)
    assert entropy.error == 0.0
    assert_agree(-entropy.value, gaussian.monte_carlo(gaussian.log_prob(student, own)))


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_a_tempered_gaussian_and_its_scores_are_sums_over_a_grid(beta: float) -> None:
    truth, student = gaussian.grid_truth(), made(3, 1, 2)
    reach = 8.0 * math.sqrt(np.linalg.eigvalsh(student.covariances[0]).max() / min(beta, 1.0))
    axes = [np.linspace(center - reach, center + reach, 1001) for center in student.means[0]]
    points = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    log_powers = beta * gaussian.log_prob(student, points)
    log_density = log_powers - math.log(np.exp(log_powers).sum() * cell)
    narrowed = gaussian.temper(student, beta)
    np.testing.assert_allclose(gaussian.log_prob(narrowed, points), log_density, atol=1e-6)

    own = points_of(narrowed)
    truth_log_density = gaussian.log_prob(truth, points)
    precision = float(np.exp(log_density) @ truth_log_density) * cell
    recall = float(np.exp(truth_log_density) @ log_density) * cell
    entropy = -float(np.exp(log_density) @ log_density) * cell
    assert_agree(precision, gaussian.expected_log_prob(narrowed, truth, own))
    closed = gaussian.expected_log_prob(truth, narrowed, points_of(truth))
    assert math.isclose(closed.value, recall, rel_tol=1e-6)
    assert math.isclose(gaussian.entropy(narrowed, own).value, entropy, rel_tol=1e-6)


@settings(max_examples=20)
@given(mixtures(), mixtures())
def test_the_loss_is_the_cross_entropy_of_the_student_on_the_teacher(
    teacher: Mixture, student: Mixture
) -> None:
    result = distillation.bound(teacher, student, points_of(teacher, "terms"))
    fresh = gaussian.monte_carlo(gaussian.log_prob(student, points_of(teacher, "fresh")))
    assert abs(result.loss + fresh.value) <= 4.0 * math.hypot(result.gap.error, fresh.error)


@pytest.mark.parametrize(
    ("modes", "precision", "recall"),
    [((0, 3, 5), -3.34, -35.8), ((0, 3), -2.60, -36.7), ((3,), -1.224, -49.1)],
)
def test_best_students_on_a_few_modes_score_as_expected(
    modes: tuple[int, ...], precision: float, recall: float
) -> None:
    """The students are on the bottom row of the grid, on all of it or parts of it."""
    truth = gaussian.grid_truth()
    means = truth.means[list(modes)]
    assert set(means[:, 1]) == {-1.0}
    student = Mixture(
        weights=np.ones(1),
        means=means.mean(axis=0, keepdims=True),
        covariances=np.diag(means.var(axis=0) + gaussian.GRID_VARIANCE)[None],
    )
    estimate = gaussian.expected_log_prob(student, truth, points_of(student))
    assert abs(estimate.value - precision) <= 4.0 * estimate.error + 0.005
    assert math.isclose(
        gaussian.expected_log_prob(truth, student, points_of(truth)).value, recall, abs_tol=0.1
    )
    assert set(np.flatnonzero(distillation.covered(student, truth))) == set(modes)


def test_entropy_of_the_truth_is_as_expected() -> None:
    truth = gaussian.grid_truth()
    estimate = gaussian.entropy(truth, points_of(truth))
    assert abs(estimate.value - 1.22) <= 4.0 * estimate.error + 0.005


def test_a_mode_is_covered_within_mahalanobis_distance_two() -> None:
    student = Mixture(
        weights=np.ones(1), means=np.zeros((1, 2)), covariances=np.diag([0.25, 1.0])[None]
    )
    centres = np.array([[0.99, 0.0], [1.01, 0.0], [0.0, 1.99], [0.0, 2.01]])
    truth = Mixture(
        weights=np.full(4, 0.25), means=centres, covariances=np.tile(np.eye(2), (4, 1, 1))
    )
    assert distillation.covered(student, truth).tolist() == [True, False, True, False]
    assert not distillation.covered(student, truth, np.array([False])).any()


# Fits.


def fit(points: Floats, num_components: int, covariance: gaussian.Covariance) -> Mixture:
    return gaussian.fit(points, num_components, covariance, num_starts=3, seed=0, stream="fit")


def test_em_finds_what_a_likelihood_by_hand_finds() -> None:
    """For two Gaussians on a line, EM is written out here and has its own start."""
    truth = Mixture(
        weights=np.array([0.3, 0.7]),
        means=np.array([[-2.0], [2.0]]),
        covariances=np.array([[[0.4]], [[0.9]]]),
    )
    points = gaussian.draw(truth, 500, seed=0, stream="line")
    x = [float(value) for value in points[:, 0]]

    def density(value: float, mean: float, variance: float) -> float:
        return math.exp(-((value - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    share, means, variances = 0.5, [-1.0, 1.0], [1.0, 1.0]
    for _ in range(200):
        first = [share * density(v, means[0], variances[0]) for v in x]
        second = [(1 - share) * density(v, means[1], variances[1]) for v in x]
        owned = [a / (a + b) for a, b in zip(first, second, strict=True)]
        for index, weights in enumerate((owned, [1 - w for w in owned])):
            total = sum(weights)
            means[index] = sum(w * v for w, v in zip(weights, x, strict=True)) / total
            variances[index] = (
                sum(w * (v - means[index]) ** 2 for w, v in zip(weights, x, strict=True)) / total
            )
        share = sum(owned) / len(x)
    by_hand = sum(math.log(a + b) for a, b in zip(first, second, strict=True)) / len(x)

    fitted = fit(points, 2, "full")
    assert math.isclose(gaussian.log_prob(fitted, points).mean(), by_hand, abs_tol=1e-3)
    order = np.argsort(fitted.means[:, 0])
    np.testing.assert_allclose(fitted.weights[order], [share, 1 - share], atol=0.01)
    np.testing.assert_allclose(fitted.means[order, 0], means, atol=0.03)
    np.testing.assert_allclose(fitted.covariances[order, 0, 0], variances, atol=0.05)


def test_one_component_is_fitted_in_closed_form() -> None:
    points = points_of(made(2, 3, 2))
    full, diagonal = fit(points, 1, "full"), fit(points, 1, "diagonal")
    np.testing.assert_allclose(full.means[0], points.mean(axis=0))
    np.testing.assert_allclose(full.covariances[0], np.cov(points.T, bias=True), atol=2e-6)
    assert diagonal.covariances[0, 0, 1] == 0.0
    np.testing.assert_allclose(
        np.diag(diagonal.covariances[0]), np.diag(full.covariances[0]), rtol=1e-12
    )


def test_diagonal_fits_have_no_correlation_and_full_ones_are_likelier() -> None:
    points = points_of(made(4, 2, 2))
    diagonal, full = fit(points, 2, "diagonal"), fit(points, 2, "full")
    assert not diagonal.covariances[:, 0, 1].any()
    assert full.covariances[:, 0, 1].all()
    likelihoods = [gaussian.log_prob(mixture, points).mean() for mixture in (diagonal, full)]
    assert likelihoods[1] > likelihoods[0]


def test_more_starts_never_fit_worse() -> None:
    points = gaussian.draw(gaussian.grid_truth(), 100, seed=0, stream="d")
    fits = [
        gaussian.fit(points, 4, "diagonal", num_starts=n, seed=0, stream="fit") for n in (1, 10)
    ]
    one, ten = (gaussian.log_prob(mixture, points).mean() for mixture in fits)
    assert ten >= one - 1e-9


def test_the_fitted_grid_is_the_grid() -> None:
    grid = gaussian.grid_truth()
    points = gaussian.draw_evenly(grid, 8000, seed=0, stream="even")
    assert np.bincount(gaussian.component_log_prob(grid, points).argmax(axis=1)).min() > 980
    fitted = gaussian.fit(points, 8, "full", num_starts=3, seed=0, stream="fit")
    order = np.lexsort((fitted.means[:, 1].round(), fitted.means[:, 0].round()))
    np.testing.assert_allclose(fitted.means[order], grid.means, atol=0.03)
    np.testing.assert_allclose(fitted.covariances[order], grid.covariances, atol=0.005)
    np.testing.assert_allclose(fitted.weights, 1 / 8, atol=0.005)


def test_random_truths_have_the_modes_of_the_grid_elsewhere() -> None:
    one, two = (gaussian.random_truth(5, 16, seed=0, stream=s) for s in ("a", "b"))
    assert one.means.shape == (5, 16)
    assert np.abs(one.means).max() <= 1.0
    assert not np.allclose(one.means, two.means)
    np.testing.assert_array_equal(one.covariances[0], gaussian.GRID_VARIANCE * np.eye(16))
