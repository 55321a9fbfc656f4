"""Terms of the theory, and scores of students of the mixture simulation.

Shapes: N points, K components, D dimensions. Log-probabilities and entropies are in nats a point.
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
MODE_RADIUS = 2.0
"""Mahalanobis distance within which a component covers a mode."""


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
        gap = monte_carlo(np.maximum(mix(student, log_probs) - log_probs @ student.weights, 0.0))
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
