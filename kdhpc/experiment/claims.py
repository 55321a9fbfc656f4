"""Claims that are fixed before a run is scored: read from their file, and checked against a plan.

    claims:
      - name: recall falls
        says: recall falls from tau 1 to 0.8
        test: less                  # greater, less, or within (of 0, by the margin)
        margin: 0.0                 # nats per token; may be left out but for `within`
        terms:                      # all of them have to pass the test
          - {measure: recall, of: "0.8", against: "1"}
          - {measure: recall, of: "0.8", against: "1", size: small, minus: {size: teacher}}

A term is the change of a measure from the student `against` to the student `of`, which are called
`direct`, by their tau, or by their truncation. `size` is a size of students or `teacher`; without
it the claim is tested for each size. What `minus` says differently is subtracted, seed by seed.

Measures, in nats per token unless they are from 0 to 1:

    precision, recall, divergence  that of the student; divergence is KL(p''||p*)
    divergence-beyond-share  precision's part that is less divergence, less 0.2 of precision: below
                    0, more than 0.8 of a gain in precision is lower entropy (with `eos: mask`, and
                    less of the end tokens, which precision leaves out)
    pass@1, pass@16 and the like  the probability that one of so many answers of the student is
                    right, over prompts with answers
    rouge@1, rouge@16 and the like  ROUGE-L of the best of so many texts of the student, over
                    prompts with references
    control-recall  recall of the student `against` at the temperature at which it is as precise as
                    the student `of`, less the recall of that
    mass-by-entropy, mass-by-first-tokens, mass-by-weight  how the mass of the modes that the
                    student `of` has, against that of `against`, depends on the entropy of a mode
                    per token, on that of its first four tokens alone, or on the logarithm of its
                    weight: a coefficient of one regression on all three, where p* is a mixture of
                    models (analysis/modes.py); intervals are by permutation of the modes
    held-out-precision, held-out-recall  two predictions of the change of the students of `size`
                    from those of all smaller sizes with the same training, each a power law in the
                    number of parameters: towards 0, or towards the change of their teachers. The
                    error of the first less the error of the second; above 0, the second is better
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kdhpc.config import presets
from kdhpc.config.language import LanguageConfig
from kdhpc.errors import InputError
from kdhpc.experiment.arms import selections
from kdhpc.experiment.prompts import have
from kdhpc.types import Json

TEACHER = "teacher"
"""Stands for a size: the change is then that of the teachers, sampled and scored at each tau."""
HELD_OUT = {"held-out-precision": "precision", "held-out-recall": "recall"}
OF_TEACHERS = ("precision", "recall")
MIN_MODES = 5
"""Smallest number of modes in claims about them."""
BY_MODE = ("mass-by-entropy", "mass-by-first-tokens", "mass-by-weight")
MEASURES = (
    *OF_TEACHERS, "divergence", "divergence-beyond-share", "control-recall", *HELD_OUT, *BY_MODE,
)  # fmt: skip
BEST_OF = re.compile(r"(pass|rouge)@([1-9]\d*)")
"""Measures of the best of some answers of students, by their number."""
TESTS = ("greater", "less", "within")


@dataclass(frozen=True, kw_only=True)
class Term:
    """A change of a measure from one student to another."""

    measure: str
    of: str
    against: str
    size: str | None = None
    """Size of the students, or `teacher`; None for a claim about each size."""
    minus: "Term | None" = None
    """A term that is subtracted, seed by seed."""

    def __str__(self) -> str:
        own = f"{self.measure} of {self.of} against {self.against}"
        own += f" at {self.size}" if self.size else ""
        return f"{own}, less {self.minus}" if self.minus else own

    @property
    def all(self) -> "tuple[Term, ...]":
        """The term and what is subtracted from it."""
        return (self, *(self.minus.all if self.minus else ()))


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What was claimed, and how it is tested."""

    name: str
    says: str
    test: str
    terms: tuple[Term, ...]
    margin: float = 0.0
    """In nats per token."""
    page: str = ""
    """Page that tells about it, if a file has claims of several."""

    @property
    def names_sizes(self) -> bool:
        """Whether its terms say of which size their students are."""
        return any(term.size for term in self.terms)

    @property
    def all_terms(self) -> tuple[Term, ...]:
        """Its terms and what is subtracted from them."""
        return tuple(part for term in self.terms for part in term.all)


def read_claims(path: Path) -> list[Claim]:
    """Read a file of claims.

    Raises:
        InputError: if it is not readable, or a claim is not complete.
    """
    try:
        entries = presets.from_yaml(path.read_text("utf-8"))
        if not isinstance(entries, dict) or not entries.get("claims") or len(entries) > 1:
            raise ValueError("expected one key, claims, with a list of at least one")
        claims = [_claim(entry, f"claim {n + 1}") for n, entry in enumerate(entries["claims"])]
        if len({claim.name for claim in claims}) < len(claims):
            raise ValueError("expected each claim to have a name of its own")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a file of claims: {error}") from error
    return claims


def check_claims(claims: Sequence[Claim], config: LanguageConfig) -> None:
    """Check that a run has the students that its claims are about.

    Raises:
        InputError: for the first that it has not.
    """
    for term in (term for claim in claims for term in claim.all_terms):
        if best := BEST_OF.fullmatch(term.measure):
            _check_answers(best[1], int(best[2]), term, config)
        if term.measure in BY_MODE and len(config.truth.components) < MIN_MODES:
            raise InputError(
                f"claims={config.claims}: {term}: p* has {len(config.truth.components)} modes that "
                f"are known; expected truth.components with {MIN_MODES} or more, as fewer have too "
                "few permutations to decide anything"
            )
    labels = {"direct"} | {one.name.removeprefix("tau") for one in selections(config)}
    for claim in claims:
        for term in claim.all_terms:
            for label in (term.of, term.against):
                if label not in labels:
                    raise InputError(
                        f"claims={config.claims}: {claim.name}: no students called {label}; "
                        f"expected one of {', '.join(sorted(labels))}"
                    )
            if term.size not in (None, TEACHER, *config.students):
                raise InputError(
                    f"claims={config.claims}: {claim.name}: no size {term.size}; expected one of "
                    f"{', '.join(config.students)}, or {TEACHER}"
                )


def _check_answers(kind: str, k: int, term: Term, config: LanguageConfig) -> None:
    """Check that a run has k answers that can be judged of each prompt of its evaluation sets.

    Raises:
        InputError: if it has not.
    """
    name = f"claims={config.claims}: {term}"
    if kind == "pass" and (config.prompts is None or not have("answer", config.prompts)):
        raise InputError(f"{name}: the prompts have no answers; expected prompts=addition, or such")
    if kind == "rouge" and (config.prompts is None or not have("reference", config.prompts)):
        raise InputError(
            f"{name}: the prompts have no references; expected prompts=docstrings, or such"
        )
    drawn = config.sampling.eval_sequences // max(1, config.eval_prompts)
    if drawn < k:
        raise InputError(
            f"{name}: there are {drawn} sequences of a prompt; expected at least {k}, which takes "
            f"sampling.eval_sequences={k * config.eval_prompts}"
        )


def _claim(entry: Json, where: str) -> Claim:
    known = _known(Claim, entry, where)
    where = str(known["name"])
    if not isinstance(known["terms"], list) or not known["terms"]:
        raise ValueError(f"{where}: expected a list of terms")
    terms = tuple(read_term(term, where) for term in known["terms"])
    margin = float(str(known.get("margin", 0.0)))
    claim = Claim(**{**known, "terms": terms, "margin": margin})
    for problem in _problems(claim):
        raise ValueError(f"{where}: {problem}")
    return claim


def read_term(entry: Json, where: str) -> Term:
    """Read a term; what is subtracted from it says only what differs.

    Raises:
        ValueError: if it is not complete, or has an unknown field.
    """
    known = _known(Term, entry, where)
    own: dict[str, Any] = {k: _label(value) for k, value in known.items() if k != "minus"}
    minus = known.get("minus")
    if minus is None:
        return Term(**own)
    if not isinstance(minus, dict):
        raise ValueError(f"{where}: minus: expected what differs, such as {{size: teacher}}")
    return Term(**own, minus=read_term({**own, **minus}, where))


def _known(of: type, entry: Json, where: str) -> Mapping[str, Json]:
    """Return the fields of a claim or a term, which are all there and all known."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected keys and values, got {entry!r}")
    names = {field.name for field in fields(of)}
    needed = {"name", "says", "test", "terms"} if of is Claim else {"measure", "of", "against"}
    if unknown := entry.keys() - names:
        raise ValueError(f"{where}: unknown field {min(map(str, unknown))}")
    if missing := needed - entry.keys():
        raise ValueError(f"{where}: {min(missing)} is missing")
    return entry


def _problems(claim: Claim) -> Iterator[str]:
    """Yield what is wrong with a claim, whatever the run."""
    if claim.test not in TESTS:
        yield f"test {claim.test}: expected one of {', '.join(TESTS)}"
    if not math.isfinite(claim.margin) or (claim.test == "within" and claim.margin <= 0.0):
        yield f"margin {claim.margin:g}: expected a number, above 0 for within"
    if len({term.size is None for term in claim.terms}) > 1:
        yield "expected a size in all of its terms or in none"
    for term in claim.all_terms:
        if term.measure not in MEASURES and not BEST_OF.fullmatch(term.measure):
            yield (
                f"measure {term.measure}: expected one of {', '.join(MEASURES)}, pass@1, or rouge@1"
            )
        taus = all(label[:1].isdigit() for label in (term.of, term.against))
        if term.size == TEACHER and (term.measure not in (*OF_TEACHERS, *BY_MODE) or not taus):
            yield f"{term}: of teachers, expected precision or recall at two taus"
        if term.measure in BY_MODE and term.minus is not None:
            yield f"{term}: expected no minus, as it is a regression over all seeds"
        if term.measure in HELD_OUT and (term.size is None or not taus):
            yield f"{term}: expected a size of students, and two taus"
        if term.minus is not None and term.minus == Term(
            measure=term.measure, of=term.of, against=term.against, size=term.size
        ):
            yield f"{term}: subtracts itself"


def _label(value: Json) -> str:
    """Return a label as students are called, also of a tau that is given in another way."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"expected a name or a tau, got {value!r}")
    try:
        return f"{float(value):g}"
    except ValueError:
        return str(value)
