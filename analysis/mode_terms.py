"""The mass of the modes of p* in what models say, where p* is a mixture of models.

`analysis/modes.py` says what a mode's mass is; here are its numbers of each model and seed.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from study import SELF, TRUTH, Study

from kdhpc.errors import InputError
from kdhpc.experiment.claims import BY_MODE, TEACHER
from kdhpc.science import modes
from kdhpc.storage.score_shards import NUM_FIRST, Scores

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Components:
    """The modes of p*, as truth's own samples show them."""

    names: tuple[str, ...]
    entropy: Floats
    """[K] nats per token of its own texts."""
    first_entropy: Floats
    """[K] nats per token of the first four tokens of its own texts."""
    least: Floats
    """[K] log-probability per token below which a text is none of its own."""
    found: Floats
    """[K] share of its own texts that are assigned to it."""
    weights: dict[int, Floats]
    """[K] weights in p*, by seed."""


def has_modes(study: Study) -> bool:
    """Return whether p* is a mixture of models, and scores under each of them are there."""
    own = study.scores.get((TRUTH, SELF))
    return own is not None and own.component_log_prob is not None


@functools.lru_cache(maxsize=8)
def components(study: Study) -> Components:
    """Return the modes of p*.

    Raises:
        InputError: if they are not known, or truth's samples have none of one of them.
    """
    own = study.scores.get((TRUTH, SELF))
    facts = {s.seed: study.results.models[s.name].get("weights") for s in study.students}
    if (
        own is None
        or own.component is None
        or own.component_log_prob is None
        or None in (*facts.values(),)
    ):
        raise InputError("p* has no modes that are known; expected a run with truth.components")
    weights = {seed: json.loads(str(of)) for seed, of in facts.items()}
    names = tuple(next(iter(weights.values())))
    log_probs, component = np.asarray(own.component_log_prob), np.asarray(own.component)
    present = np.bincount(component, minlength=len(names))
    if not present.all():
        raise InputError(
            f"truth's samples have none of the component {names[int(present.argmin())]}; expected "
            "a larger sampling.eval_sequences"
        )
    first = np.asarray(own.component_first_log_prob)
    entropy, first_entropy, found = (np.zeros(len(names)) for _ in range(3))
    num_drawn = _num_drawn(study, own)
    least = modes.floors(log_probs, num_drawn, component)
    even = np.full(len(names), 1.0 / len(names))  # weights differ between runs that are pooled
    shares = modes.assigned(log_probs, num_drawn, even, least)
    for index in range(len(names)):
        mine = component == index
        entropy[index] = -log_probs[mine, index].sum() / num_drawn[mine].sum()
        num_first = np.minimum(num_drawn[mine], NUM_FIRST).sum()
        first_entropy[index] = -first[mine, index].sum() / num_first
        found[index] = shares[mine, index].mean()
    return Components(
        names=names,
        entropy=entropy,
        first_entropy=first_entropy,
        least=least,
        found=found,
        weights={seed: np.array([*of.values()]) for seed, of in weights.items()},
    )


def sampler_of(study: Study, label: str, size: str, seed: int) -> str:
    """Return the name of the sequences of a student, or of a teacher, of a label and seed."""
    if size == TEACHER:
        return f"{TEACHER}-s{seed}-{'tau' if label[:1].isdigit() else ''}{label}"
    return study.of(size, label)[seed].name


def assigned(study: Study, label: str, size: str, seed: int) -> Floats:
    """Return how much each sequence [N, K] of a student or teacher belongs to each mode."""
    scores = study.scores[sampler_of(study, label, size, seed), TRUTH]
    known = components(study)
    if scores.component_log_prob is None:
        raise ValueError(f"{label} of {size}: no scores under the components")
    return modes.assigned(
        np.asarray(scores.component_log_prob),
        _num_drawn(study, scores),
        known.weights[seed],
        known.least,
    )


def _num_drawn(study: Study, scores: Scores) -> NDArray[np.integer]:
    """Return the number of drawn tokens [N], which has the end token whether or not it counts."""
    if study.eos_counts or scores.end_log_prob is None:
        return scores.num_tokens
    num_drawn: NDArray[np.integer] = scores.num_tokens + (scores.end_log_prob != 0.0)
    return num_drawn


def seeds(study: Study, label: str, size: str) -> list[int]:
    """Return the seeds of which a student or teacher of a label was sampled."""
    every = sorted({student.seed for student in study.students})
    if size != TEACHER:
        return sorted(study.of(size, label))
    return [s for s in every if (sampler_of(study, label, size, s), TRUTH) in study.scores]


def log_mass(study: Study, label: str, size: str) -> Floats:
    """Return log(mass / weight) [S, K] of a student or teacher in each seed."""
    known = components(study)
    return np.array(
        [
            modes.log_mass(assigned(study, label, size, seed), known.weights[seed])
            for seed in seeds(study, label, size)
        ]
    )


def slope_of(
    study: Study, measure: str, of: str, against: str | None, size: str
) -> modes.Slope | None:
    """Return how the mass of modes depends on one of their properties.

    Args:
        study: the run.
        measure: one of `BY_MODE`.
        of: label of the students, or of the teacher's tau.
        against: label of those whose masses theirs are compared with; None for the weights in p*.
        size: size of the students, or `teacher`.

    Returns:
        The coefficient; None if there are no such students, or the properties cannot be told apart.
    """
    found = regression(study, of, against, size)
    return None if found is None else found[BY_MODE.index(measure)]


@functools.lru_cache(maxsize=256)
def regression(
    study: Study, of: str, against: str | None, size: str
) -> tuple[modes.Slope, ...] | None:
    """Return the coefficients of all of `BY_MODE`, as `slope_of` does."""
    every = seeds(study, of, size)
    if not has_modes(study) or not every:
        return None
    if against is not None and seeds(study, against, size) != every:
        return None
    known = components(study)
    outcome = log_mass(study, of, size)
    if against is not None:
        outcome = outcome - log_mass(study, against, size)
    log_weights = np.log([known.weights[seed] for seed in every])
    fixed = [np.tile(of_mode, (len(every), 1)) for of_mode in (known.entropy, known.first_entropy)]
    found = modes.slopes(outcome, [*fixed, log_weights])
    return None if found is None else tuple(found)
