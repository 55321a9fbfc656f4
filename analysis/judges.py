"""How two judges of precision agree, where the truth is a corpus.

Both judges score the same texts. If they share the students' tokens, they are compared per token.
If the second one has tokens of its own, both are compared per character of the text between prompt
and end, without end tokens, over the texts that it can score.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from report_rows import student_name
from scipy import stats
from size_verdicts import across_sizes
from study import SECOND, SELF, TRUTH, Study
from verdicts import Verdict, claim_of, text, verdicts

from kdhpc.experiment.arms import at_temperature, teacher_name
from kdhpc.science.intervals import SeedMean, Statistic, over_seeds, through
from kdhpc.storage.score_shards import Scores

Numbers = NDArray[np.float64]
FIRST_COLUMN, SECOND_COLUMN = "first judge", "second judge"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A run under each of its two judges, in units in which they compare."""

    unit: Literal["token", "character"]
    first: Study
    second: Study
    num_texts: int
    """Number of texts that the first judge has scored."""
    num_left_out: int
    """Number of those that the second one cannot score: not to be written in its tokens after the
    prompt, or too long for it."""
    num_replaced: int
    """Number of those in which the second one sees replacement characters: for bytes that are no
    character, and for characters that it has no token for."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How two judges agree."""

    arms: SeedMean | None
    """Spearman's rank correlation over the arms of a seed, which are students at every temperature
    and teachers at every tau; None with fewer than three arms."""
    num_arms: int
    """Number of arms of a seed; the smallest."""
    texts: SeedMean
    """Pearson's correlation over the texts of a student, mean over the students of a seed."""
    same_order: int
    """Number of pairs of a seed and a size whose taus have the same order of precision."""
    num_orders: int
    verdicts: list[tuple[Verdict, Verdict]]
    """Verdicts that depend on the judge, by the first and by the second."""

    @property
    def same_signs(self) -> int:
        """Number of verdicts whose estimates all have the same signs."""
        return sum(_signs(one) == _signs(two) for one, two in self.verdicts)

    @property
    def other_decisions(self) -> list[tuple[Verdict, Verdict]]:
        """Verdicts that the judges decide differently."""
        return [(one, two) for one, two in self.verdicts if one.decision != two.decision]


def judged(study: Study) -> Judged | None:
    """Return a run under each judge; None if it has no second one, or not all of its scores."""
    pairs = [(student.name, SECOND) for student in study.students]
    if not study.students or not {*pairs, (TRUTH, SECOND)} <= study.scores.keys():
        return None
    counts = {
        sampler: scores.num_characters
        for (sampler, scorer), scores in study.scores.items()
        if scorer == SECOND and scores.num_characters is not None
    }
    results = [_under(study, judge, counts) for judge in (TRUTH, SECOND)]
    first, second = (Study(replace(study.results, scores=scores)) for scores in results)
    num_texts = left_out = replaced = 0
    for sampler, num_characters in counts.items():
        replacements = study.scores[sampler, SECOND].num_replaced
        replaced += 0 if replacements is None else int(np.count_nonzero(replacements))
        own = study.scores[sampler, TRUTH if sampler != TRUTH else SELF]
        num_tokens = own.num_tokens - (_ends(own) != 0.0 if study.eos_counts else 0)
        num_texts += len(num_tokens)
        left_out += int(((num_characters == 0) & (num_tokens > 0)).sum())
    return Judged(
        unit="character" if counts else "token",
        first=first,
        second=second,
        num_texts=num_texts,
        num_left_out=left_out,
        num_replaced=replaced,
    )


def _under(
    study: Study, judge: str, counts: Mapping[str, NDArray[np.int32]]
) -> dict[tuple[str, str], Scores]:
    """Return the scores of a run with a judge in place of p*.

    Args:
        study: the run.
        judge: the scorer that stands for p*.
        counts: numbers of characters by sampler; none if judges are compared per token.
    """
    scores = {}
    for (sampler, scorer), own in study.scores.items():
        is_judged = scorer == TRUTH or (sampler, scorer) == (TRUTH, SELF)
        if (sampler, SECOND) not in study.scores or scorer == SECOND:
            continue
        if is_judged and judge == SECOND:
            own = study.scores[sampler, SECOND]
        if counts and (is_judged or scorer == SELF):
            own = _by_character(own, counts[sampler], eos_counts=study.eos_counts)
        scores[sampler, scorer] = own
    return scores


def _by_character(scores: Scores, num_characters: NDArray[np.int32], *, eos_counts: bool) -> Scores:
    """Return scores of the texts alone, without end tokens, and their numbers of characters."""
    own_count = scores.num_characters is not None
    ends = 0.0 if own_count or not eos_counts else _ends(scores)
    text = np.where(num_characters > 0, scores.log_prob_sum - ends, 0.0)
    return Scores(log_prob_sum=text, num_tokens=num_characters, end_log_prob=np.zeros(len(text)))


def _ends(scores: Scores) -> Numbers:
    if scores.end_log_prob is None:
        raise ValueError("no log-probabilities of end tokens, which texts are compared without")
    return scores.end_log_prob


def agreement(both: Judged) -> Agreement:
    """Return how the two judges of a run agree."""
    first, second = both.first, both.second
    seeds = sorted({student.seed for student in first.students})
    arms = {seed: _arms(first, seed) for seed in seeds}
    num_arms = min(len(names) for names in arms.values())
    orders = [
        [_order(study, seed, size) for study in (first, second)]
        for seed in seeds
        for size in first.sizes
        if len(_of_seed(first, seed, size)) > 1
    ]
    return Agreement(
        arms=over_seeds([_rank_correlation(both, arms[seed]) for seed in seeds])
        if num_arms > 2
        else None,
        num_arms=num_arms,
        texts=over_seeds([_text_correlation(both, seed) for seed in seeds]),
        same_order=sum(one == two for one, two in orders),
        num_orders=len(orders),
        verdicts=_verdicts(both),
    )


def _arms(study: Study, seed: int) -> list[str]:
    """Return the evaluation sets of a seed that the judges have scored."""
    names = [
        at_temperature(student.name, temperature)
        for student in study.students
        if student.seed == seed
        for temperature in study.temperatures(student)
    ]
    teacher = f"{teacher_name(seed)}-"
    names += [name for name, scorer in study.scores if scorer == TRUTH and name.startswith(teacher)]
    return names


def _rank_correlation(both: Judged, names: list[str]) -> Statistic:
    """Return the rank correlation of precision over the arms of a seed, linearised."""

    def correlation(values: Numbers) -> float:
        one, two = (stats.rankdata(part) for part in np.split(values, 2))
        return float(np.corrcoef(one, two)[0, 1])

    precisions = [study.score(name, TRUTH) for study in (both.first, both.second) for name in names]
    return through(correlation, precisions)


def _text_correlation(both: Judged, seed: int) -> Statistic:
    students = [student for student in both.first.students if student.seed == seed]
    total = Statistic(value=0.0, influence={})
    for student in students:
        one, two = (study.scores[student.name, TRUTH] for study in (both.first, both.second))
        total = total + correlation(one, two, rows=student.name)
    return total / len(students)


def correlation(one: Scores, two: Scores, *, rows: str) -> Statistic:
    """Return Pearson's correlation of mean log-probabilities over texts, linearised.

    The influence of a text is (z w - r (z^2 + w^2) / 2) / N with both standardised: S. J. Devlin,
    R. Gnanadesikan, J. R. Kettenring, Biometrika 62 (1975), 531-545.

    Args:
        one: scores of N texts.
        two: other scores of the same texts.
        rows: name of the set of texts.
    """
    known = (one.num_tokens > 0) & (two.num_tokens > 0)
    z, w = (s.log_prob_sum[known] / s.num_tokens[known] for s in (one, two))
    z, w = ((x - x.mean()) / max(x.std(), np.finfo(float).tiny) for x in (z, w))
    value = float((z * w).mean())
    influence = np.zeros(len(known))
    influence[known] = (z * w - value * (z**2 + w**2) / 2.0) / max(1, len(z))
    return Statistic(value=value, influence={rows: influence})


def _of_seed(study: Study, seed: int, size: str) -> list[str]:
    return [tau for tau in study.taus(size) if seed in study.of(size, tau)]


def _order(study: Study, seed: int, size: str) -> list[str]:
    """Return the taus of a seed by precision."""
    taus = _of_seed(study, seed, size)
    return sorted(taus, key=lambda tau: study.precision(study.of(size, tau)[seed]).value)


def _verdicts(both: Judged) -> list[tuple[Verdict, Verdict]]:
    """Return the verdicts whose numbers depend on the judge, by each of the two."""
    by_judge = [
        {(verdict.name, verdict.size): verdict for verdict in (*across_sizes(s), *verdicts(s))}
        for s in (both.first, both.second)
    ]
    first, second = by_judge
    return [
        (first[key], second[key])
        for key in first
        if key in second and _estimates(first[key]) != _estimates(second[key])
    ]


def _estimates(verdict: Verdict) -> dict[str, float]:
    return {name: mean.estimate for name, mean in verdict.means.items()}


def _signs(verdict: Verdict) -> dict[str, float]:
    return {name: float(np.sign(value)) for name, value in _estimates(verdict).items()}


def said(study: Study) -> str:
    """Return how the second judge agrees with the first, in one sentence; empty if there is none.

    Raises:
        ValueError: if judges are compared per character, and end tokens are not known.
    """
    if not study.judged_by or not study.second_judge:
        return ""
    both = judged(study)
    if both is None:
        return f"second judge: {study.second_judge}, which has not scored texts of every student"
    found = agreement(both)
    num = len(found.verdicts)
    parts = []
    if found.arms is not None:
        parts.append(f"rank correlation over {found.num_arms} arms {_bounded(found.arms)}")
    parts.append(f"correlation over the texts of a student {_bounded(found.texts)}")
    if found.num_orders:
        each = "seeds and sizes" if len(study.sizes) > 1 else "seeds"
        parts.append(f"taus in the same order in {found.same_order} of {found.num_orders} {each}")
    alike = f"of {num} verdicts that depend on the judge {found.same_signs} with the same signs"
    if found.texts.num_seeds > 1:  # with one seed nothing is decided
        same = num - len(found.other_decisions)
        alike += f" and {same} with the same decision{_differing(found)}"
    parts.append(alike)
    if both.num_replaced:
        parts.append(f"{both.num_replaced} of {both.num_texts} texts with replacement characters")
    if both.num_left_out:
        parts.append(f"{both.num_left_out} of {both.num_texts} texts left out")
    return f"second judge, per {both.unit}: {study.second_judge}: {'; '.join(parts)}"


def _differing(found: Agreement) -> str:
    """Name the verdicts that the judges decide differently; empty if there are none."""
    named = [
        f"{one.name}{f' ({one.size})' if one.size else ''} {one.decision} and {two.decision}"
        for one, two in found.other_decisions
    ]
    return f" (not {', '.join(named)})" if named else ""


def _bounded(mean: SeedMean) -> str:
    """Return a correlation and its interval, which cannot be outside of -1 and 1."""
    low, high = max(-1.0, mean.low), min(1.0, mean.high)
    return f"{mean.estimate:.2f} [{low:.2f}, {high:.2f}]"


def notes(study: Study) -> list[str]:
    """Return what has to be known to read the numbers of a run, a line each."""
    return [
        line for line in (study.judged_by, said(study), study.given_prompts, study.left_out) if line
    ]


def tables(both: Judged) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return rows of two tables: precision under each judge, and verdicts that depend on it."""
    studies = {FIRST_COLUMN: both.first, SECOND_COLUMN: both.second}
    several = len(both.first.sizes) > 1
    precisions = [
        {"student": student_name(label), **({"size": size} if several else {})}
        | {
            column: text(study.mean(size, label, study.precision), sign=False)
            for column, study in studies.items()
        }
        for size in both.first.sizes
        for label in both.first.labels(size)
    ]
    decided = [
        {"claim": claim_of(one, several=several)}
        | {
            column: "; ".join([verdict.decision, *map(text, verdict.means.values())])
            for column, verdict in ((FIRST_COLUMN, one), (SECOND_COLUMN, two))
        }
        for one, two in agreement(both).verdicts
    ]
    return precisions, decided
