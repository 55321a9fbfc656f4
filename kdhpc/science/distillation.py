"""Scores of students in the mixture simulation, and the terms of the theory.

Shapes: N points, K components, D dimensions. Log-densities and entropies are in nats per point.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdhpc.science.gaussian import (
    Bools,
    Estimate,
    Facts,
    Floats,
    Mixture,
    alignments,
    component_log_prob,
    entropy,
    expected_log_prob,
    log_prob,
    mix,
    monte_carlo,
    weight_entropy,
)

EMPHASISED_MASS = 0.95
"""Total weight that the emphasised components of a teacher reach."""
MODE_RADIUS = 2.0
"""Mahalanobis distance within which a component covers a mode."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """The student's loss L on the teacher, its bound J, and the terms of J.

    By Jensen's inequality, L = -E_{x~p'}[log sum_k'' alpha''_k'' N''_k''(x)] is at most
    J = -sum a' b'. A teacher component with a small weight has a small a', so its terms contribute
    little to J however badly the student fits it. The student may ignore such terms.

    Source: reconstructed from the terms that section 3 of the paper names.
    """

    joint_weights: Floats
    """a' = alpha'_k' alpha''_k'', [K', K''], which sums to 1."""
    alignments: Floats
    """b' = E_{x~N'_k'}[log N''_k''(x)], [K', K''] in nats."""
    bound: float
    """J in nats."""
    gap: Estimate
    """J - L in nats, which is at least 0, and exactly 0 for a student of one component."""

    @property
    def loss(self) -> float:
        """L in nats; its standard error is that of the gap."""
        return self.bound - self.gap.value


def bound(teacher: Mixture, student: Mixture, points: Floats) -> Bound:
    """Compute loss, bound and terms.

    Args:
        teacher: p' at beta.
        student: p''.
        points: [N, D] drawn from the teacher; the gap is averaged over them.
    """
    joint = np.outer(teacher.weights, student.weights)
    aligned = alignments(teacher, student)
    gap = Estimate(value=0.0)
    if student.num_components > 1:
        log_probs = component_log_prob(student, points)
        # Jensen's inequality holds at every point; the maximum removes violations by rounding.
        gap = monte_carlo(np.maximum(mix(student, log_probs) - log_probs @ student.weights, 0.0))
    return Bound(
        joint_weights=joint,
        alignments=aligned,
        bound=-float((joint * aligned).sum()),
        gap=gap,
    )


def emphasised(mixture: Mixture) -> Bools:
    """Return the smallest set of components whose weights sum to at least 0.95.

    Returns:
        [K] bool.
    """
    order = np.argsort(-mixture.weights, kind="stable")
    count = 1 + int(np.searchsorted(np.cumsum(mixture.weights[order]), EMPHASISED_MASS))
    selected = np.zeros(mixture.num_components, dtype=bool)
    selected[order[:count]] = True
    return selected


def covered(mixture: Mixture, truth: Mixture, components: Bools | None = None) -> Bools:
    """Return the modes of the truth whose centre is within Mahalanobis distance 2 of a component.

    Args:
        mixture: mixture whose components cover modes.
        truth: mixture whose means are the modes.
        components: [K] bool, the components to consider; all if not given.

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
"""Function from a mixture and the name of a stream to evaluation points [N, D]."""


def score_student(
    truth: Mixture, student: Mixture, train_points: Floats, points_of: Sampler
) -> Facts:
    """Score a student against p* and D.

    Args:
        truth: p*.
        student: p''.
        train_points: the points of D, [N, D]; the released code averages recall over them.
        points_of: draws evaluation points, from the streams `truth` and `student`.

    Returns:
        Numbers and arrays by name. Names with `as_defined` are scored under p* or averaged over it.
        Names with `error` are Monte Carlo standard errors, 0 if the value is a closed form.
    """
    student_points, truth_points = points_of(student, "student"), points_of(truth, "truth")
    precision = expected_log_prob(student, truth, student_points)
    recall = expected_log_prob(truth, student, truth_points)
    sampled_recall = monte_carlo(log_prob(student, truth_points))
    student_entropy, truth_entropy = entropy(student, student_points), entropy(truth, truth_points)
    return {
        "precision_as_defined": precision.value,
        "precision_error": precision.error,
        "recall_as_defined": recall.value,
        "recall_error": recall.error,
        "recall_monte_carlo": sampled_recall.value,
        "recall_monte_carlo_error": sampled_recall.error,
        "recall_as_published": float(log_prob(student, train_points).mean()),
        "student_entropy_nats": student_entropy.value,
        "truth_entropy_nats": truth_entropy.value,
        # precision = -H(p'') - KL(p''||p*) and recall = -H(p*) - KL(p*||p'')
        "kl_student_truth_nats": -student_entropy.value - precision.value,
        "kl_truth_student_nats": -truth_entropy.value - recall.value,
        "covered_modes": covered(student, truth),
    }


def score_distillation(
    truth: Mixture, teacher: Mixture, student: Mixture, direct: Mixture, points_of: Sampler
) -> Facts:
    """Score a student against its sharpened teacher.

    Args:
        truth: p*.
        teacher: p' at beta.
        student: p'', fitted to points of that teacher.
        direct: the student that was fitted to D.
        points_of: draws evaluation points, from the streams `student`, `direct` and `teacher`.

    Returns:
        Numbers and arrays by name. `precision_as_published` is scored under the sharpened teacher,
        as in the released code. This holds for the direct student too, so its value depends on
        beta.
    """
    teacher_points = points_of(teacher, "teacher")
    terms = bound(teacher, student, teacher_points)
    emphasised_components = emphasised(teacher)
    modes = covered(teacher, truth, emphasised_components)
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
        "emphasised": emphasised_components,
        "emphasised_modes": modes,
        "difficulty": int(modes.sum()) - student.num_components,
        "joint_weights": terms.joint_weights,
        "alignments": terms.alignments,
        "bound_nats": terms.bound,
        "loss_nats": terms.loss,
        "gap_nats": terms.gap.value,
        "gap_error_nats": terms.gap.error,
    }
