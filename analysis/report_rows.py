"""Rows of the figures of a report, from the statistics of a run.

A row is what a figure draws at one place: names, and numbers with the ends of their intervals. The
intervals are 95 %, over seeds and sequences (docs/statistics.md). Numbers are in nats per token
unless a title says otherwise.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from claim_terms import mean_of
from report_text import value_text
from study import (
    NUM_GROUPS,
    SELF,
    TRUTH,
    Measure,
    Student,
    Study,
    label_order,
)
from verdicts import POWER, detectable, text

from kdhpc.experiment.claims import Term
from kdhpc.science.curves import PREFIXES
from kdhpc.science.intervals import SeedMean, Statistic, over_seeds

Row: TypeAlias = dict[str, str | float]
MAX_ROWS = 5000
"""Most rows of a figure; a finer grid is made coarser."""
LARGEST_LOG_FACTOR = 10.0
"""Largest |log lambda| of the exact curves."""
CHECKED_LOG_FACTOR, CHECKED_ERROR = 2.0, 0.2
"""Largest |log lambda|, and largest relative standard error of both sides in each seed, at which
alpha = lambda beta is checked. Beyond, a side is the mean of a few rare terms, from which its error
cannot be estimated."""
NUM_FACTORS = 41
DISTILLED, TEACHER = "distilled, along tau", "teacher"
TRUTH_LINE, TRUTH_POINT = "truth", "truth itself"
ADD_TEMPERATURES = "launch/sweep.py with decode_temperatures=[0.8,0.6] adds them to a finished run"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a figure draws and says, or what the run lacks for it."""

    name: str
    """Name of the kind of figure; files are named after it."""
    title: str
    reading: str
    """How to read it."""
    needs: str
    """Scores that it needs, and how to get them."""
    rows: Sequence[Row] = ()
    """Empty if the run lacks the scores."""
    notes: tuple[str, ...] = ()
    """Lines below the figure, made from its numbers."""
    file_name: str = ""
    """Beginning of the names of its files."""
    numbers: Sequence[Mapping[str, str]] = ()
    """Its numbers as texts, for a table below it."""
    students: tuple[str, ...] = ()
    """Names of all students of the run, in whose order each has its look in every figure."""


def figures(study: Study, size: str) -> list[Figure]:
    """Return the figures about the students of a size, in the order of the page."""
    makers = (
        precision_recall,
        equal_precision,
        with_teacher,
        parts,
        by_rarity,
        by_entropy,
        curves,
        total_variation,
        best_temperature,
    )
    suffix = f"-{size}" if len(study.sizes) > 1 else ""
    of_size = f" (size {size})" if suffix else ""
    labels = sorted({label for of in study.sizes for label in study.labels(of)}, key=label_order)
    students = tuple(map(student_name, labels))
    return [
        replace(
            figure,
            title=figure.title + of_size,
            file_name=f"report-{figure.name}{suffix}",
            students=students,
        )
        for figure in (make(study, size) for make in makers)
    ]


def student_name(label: str) -> str:
    """Return the name of a student for people, such as `tau 0.8`."""
    return f"tau {label}" if label[0].isdigit() else label


def interval(mean: SeedMean, name: str = "estimate") -> Row:
    """Return an estimate and the ends of its interval as parts of a row.

    Args:
        mean: the number.
        name: what it is; the ends are `low` and `high`, or begin with another name.
    """
    before = "" if name == "estimate" else f"{name}_"
    return {name: mean.estimate, f"{before}low": mean.low, f"{before}high": mean.high}


def across(
    rows: Iterable[Row], field: str, before: str = "", *, sign: bool = False
) -> list[dict[str, str]]:
    """Return estimates as texts: a row for each student, a column for each value of a field.

    Args:
        rows: the rows.
        field: the field.
        before: beginning of the names of the columns.
        sign: whether estimates are changes, which show a plus sign.
    """
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        name = str(row["student"])
        value = row[field]
        column = before + (value if isinstance(value, str) else f"{value:g}")
        numbers = (float(row[key]) for key in ("estimate", "low", "high"))
        table.setdefault(name, {"student": name})[column] = value_text(*numbers, sign=sign)
    return list(table.values())


def by_point(rows: Iterable[Row]) -> list[dict[str, str]]:
    """Return precision and recall of each point as texts."""
    return [
        {"series": str(row["series"]), "point": str(row["label"])}
        | {name: _of_point(row, name) for name in ("precision", "recall")}
        for row in rows
        if row["label"] and "recall" in row
    ]


def _of_point(row: Row, name: str) -> str:
    return value_text(*(float(row[key]) for key in (name, f"{name}_low", f"{name}_high")))


def means(study: Study, size: str) -> list[dict[str, str]]:
    """Return precision and recall of each student, as texts for a table."""
    table = [
        {
            "student": student_name(label),
            "seeds": str(len(study.of(size, label))),
            "precision": text(study.mean(size, label, study.precision), sign=False),
            "recall": text(study.mean(size, label, study.recall), sign=False),
        }
        for label in study.labels(size)
    ]
    if (TRUTH, SELF) in study.scores:
        truth = text(over_seeds([study.truth_log_prob()]), sign=False)
        table.append({"student": "truth: E log p*", "precision": truth, "recall": truth})
    return table


ABOUT_CONTRASTS = (
    "The mean over seeds of the difference within each seed. Detectable is the smallest change "
    "that a run of this size would decide, by an interval on one side of 0, with a probability of "
    f"{POWER:.0%}; with one seed nothing is decided."
)


def contrasts(study: Study, size: str) -> list[dict[str, str]]:
    """Return the changes of precision and recall of one student against another, as texts.

    Beside each is the smallest change that this design would decide with a probability of 0.8.
    """
    table = []
    for label, against in _pairs(study, size):
        measures = {"precision": study.precision, "recall": study.recall}
        known = {"student": student_name(label), "against": student_name(against)}
        for name, measure in measures.items():
            if (change := study.contrast(size, label, against, measure)) is not None:
                known[name] = text(change)
                if change.num_seeds > 1:
                    known[f"detectable {name}"] = f"{detectable(change):.3f}"
        if len(known) > 2:
            table.append(known)
    return table


def _pairs(study: Study, size: str) -> list[tuple[str, str]]:
    """Return pairs of labels, each once: against direct, against tau 1, and each step of tau."""
    labels, taus = study.labels(size), study.taus(size)
    others = [label for label in labels if label != "direct"]
    pairs = [(label, "direct") for label in others]
    pairs += [(label, "1") for label in others if label != "1"]
    pairs += [(below, above) for above, below in pairwise(taus)]
    return list(dict.fromkeys(pairs))


ABOUT_SEQUENCES = (
    "Tokens are those that count in a sequence. A student whose texts are shorter has less of "
    "everything per sequence, but not per token."
)


def per_sequence(study: Study, size: str) -> list[dict[str, str]]:
    """Return number of tokens, entropy and both divergences of each student, as texts."""
    measures: dict[str, Measure] = {
        "tokens": lambda student: _tokens(study, student.name),
        "H(p'')": lambda student: study.entropy(student, per_sequence=True),
        "KL(p''||p*)": lambda student: study.divergence(student, per_sequence=True),
        "KL(p*||p'')": lambda student: study.missed(student, per_sequence=True),
    }
    if study.has_averages:
        measures["KL(p''||p*), next token averaged"] = study.averaged_divergence
        measures["KL(p*||p''), next token averaged"] = study.averaged_missed
    table = [
        {"student": student_name(label)}
        | {name: text(study.mean(size, label, m), sign=False) for name, m in measures.items()}
        for label in (study.labels(size) if study.has_divergences else [])
    ]
    if table:
        tokens = text(over_seeds([_tokens(study, TRUTH)]), sign=False)
        table.append({"student": "truth", "tokens": tokens})
    return table


def _tokens(study: Study, sampler: str) -> Statistic:
    """Return the mean number of counted tokens of a sampler's sequences."""
    return study.ratio(study.scores[sampler, SELF].num_tokens, rows=sampler)


def compared(studies: Mapping[str, Study]) -> list[Figure]:
    """Return precision against recall of the students of several runs, by the name of the run."""
    sizes = dict.fromkeys(size for study in studies.values() for size in study.sizes)
    made = []
    for size in sizes:
        rows: list[Row] = []
        for run, study in studies.items():
            if size in study.sizes:
                of_run = [*_students(study, size, alone=True), *_truth_line(study)]
                rows += [{"run": run, **row} for row in of_run]
        suffix = f"-{size}" if len(sizes) > 1 else ""
        made.append(
            Figure(
                name="precision-recall",
                title=f"Precision against recall by run{f' (size {size})' if suffix else ''}",
                reading="Up and right is better, up to the run's dashed line of truth. Lines join "
                "the students of a run along tau.",
                needs="students with both of their scores",
                rows=rows,
                file_name=f"report-compared-precision-recall{suffix}",
            )
        )
    return made


UP_TO_TRUTH = (
    "Right is better. Up is better as far as the dashed line of truth, E log p*: above it a "
    "model's texts are likelier under truth than truth's own texts are, which is no virtue."
)


def precision_recall(study: Study, size: str) -> Figure:
    """Return precision against recall: students, their decode temperatures, and truth."""
    rows = [*_students(study, size), *_frontiers(study, size), *_truth(study)]
    return Figure(
        name="precision-recall",
        title="Precision against recall",
        reading=f"{UP_TO_TRUTH} The grey line joins the distilled students along tau, lines in "
        "colour join one student along the temperature T of its sampling. The bars are intervals, "
        "so a point above or below a line decides nothing by itself: the next figure compares "
        "distillation with another temperature at equal precision. Truth's own recall is marked "
        "on its line, at the edge if it is further right.",
        needs="students with both of their scores",
        rows=rows,
        numbers=by_point(rows),
    )


def with_teacher(study: Study, size: str) -> Figure:
    """Return precision against recall of the teacher at each tau, beside its students."""
    teachers = list(_teachers(study))
    rows = [*_students(study, size, alone=True), *teachers, *_truth(study)] if teachers else []
    return Figure(
        name="teacher",
        title="Precision against recall: the teacher and its students",
        reading=f"{UP_TO_TRUTH} The teacher at a tau has the samples that the student of that tau "
        "learns from, and its recall is scored at the same tau.",
        needs=f"scores of the teacher: {ADD_TEMPERATURES}",
        rows=rows,
        numbers=by_point(teachers),
    )


def _point(series: str, student: str, label: str, precision: SeedMean, recall: SeedMean) -> Row:
    return {
        "series": series,
        "student": student,
        "label": label,
        **interval(precision, "precision"),
        **interval(recall, "recall"),
        "seeds": precision.num_seeds,
    }


def _students(study: Study, size: str, *, alone: bool = False) -> Iterator[Row]:
    """Yield the students; the direct one only if it is shown alone or has no temperatures."""
    for label in study.labels(size):
        measures = (study.precision, study.recall)
        precision, recall = (study.mean(size, label, measure) for measure in measures)
        name = student_name(label)
        if label[0].isdigit():
            yield _point(DISTILLED, name, name, precision, recall)
        elif label != "direct":
            yield _point("truncated teacher", name, name, precision, recall)
        elif alone or not _shared_temperatures(study, size, label)[1:]:
            yield _point("direct", name, name, precision, recall)


def _frontiers(study: Study, size: str) -> Iterator[Row]:
    """Yield the direct student and that of tau 1 at each temperature of their sampling.

    A row without a label is on its line only, as `_students` yields its point.
    """
    for label, series in (("direct", "direct, along T"), ("1", "tau 1, along T")):
        temperatures = _shared_temperatures(study, size, label)
        for temperature in temperatures if len(temperatures) > 1 else []:
            name = "direct" if label == "direct" else ""
            yield _point(
                series,
                student_name(label),
                name if temperature == 1.0 else f"T {temperature:g}",
                study.mean(size, label, _at(study.precision, temperature)),
                study.mean(size, label, _at(study.recall, temperature)),
            )


def _at(measure: Callable[[Student, float], Statistic], temperature: float) -> Measure:
    return lambda student: measure(student, temperature)


def _shared_temperatures(study: Study, size: str, label: str) -> list[float]:
    """Return the temperatures at which every seed was sampled and scored, from the highest."""
    return _shared(study.temperatures(student) for student in study.of(size, label).values())


def _shared(of_seeds: Iterable[Sequence[float]]) -> list[float]:
    sets = [set(temperatures) for temperatures in of_seeds]
    return sorted(set.intersection(*sets), reverse=True) if sets else []


def _teachers(study: Study) -> Iterator[Row]:
    """Yield the teacher at each tau at which its samples and its recall were scored."""
    models = study.results.models
    teachers = [name for name, facts in models.items() if facts["kind"] == "teacher"]
    taus = _shared(
        [
            float(sampler.removeprefix(f"{name}-tau"))
            for sampler, scorer in study.scores
            if sampler.startswith(f"{name}-tau") and scorer == TRUTH
        ]
        for name in teachers
    )
    for tau in taus:
        if all(study.has_teacher(name, tau) for name in teachers):
            both = zip(*(study.teacher(name, tau) for name in teachers), strict=True)
            precision, recall = (over_seeds(of_seeds) for of_seeds in both)
            yield _point("teacher, along tau", TEACHER, f"tau {tau:g}", precision, recall)


def _truth_line(study: Study) -> Iterator[Row]:
    if (TRUTH, SELF) in study.scores:
        mean = over_seeds([study.truth_log_prob()])
        yield {"series": TRUTH_LINE, "label": "truth: E log p*", **interval(mean, "precision")}


def _truth(study: Study) -> Iterator[Row]:
    """Yield the line of truth, and the point of a student that equals it."""
    for line in _truth_line(study):
        yield line
        mean = over_seeds([study.truth_log_prob()])
        yield line | {"series": TRUTH_POINT, "label": "truth", **interval(mean, "recall")}


def equal_precision(study: Study, size: str) -> Figure:
    """Return the recall that another decode temperature keeps, at equal precision."""
    rows: list[Row] = []
    left_out: list[str] = []
    for base in ("direct", "1"):
        if len(_shared_temperatures(study, size, base)) < 2:
            continue
        for tau in study.taus(size):
            against = student_name(base)
            if tau == base:
                continue
            if (kept := _kept(study, size, base, tau)) is None:
                left_out.append(f"{student_name(tau)} against {against} at another T")
            else:
                rows.append({"student": student_name(tau), "against": against, **interval(kept)})
    missed = f"Left out, as no T is known to be as precise in every seed: {'; '.join(left_out)}."
    return Figure(
        name="equal-precision",
        title="Recall kept by temperature instead of distillation, at equal precision",
        reading="Recall of another student, sampled at the temperature T at which it is as "
        "precise as the distilled one, less the recall of the distilled one. Above 0, another "
        "temperature is better than distilling from a teacher of that tau; below 0, worse; an "
        "interval that contains 0 decides nothing.",
        needs="the direct student or that of tau 1 at temperatures at which it is as precise as a "
        f"distilled one: {ADD_TEMPERATURES}",
        rows=rows,
        notes=(missed,) if left_out else (),
        numbers=across(rows, "against", "against ", sign=True),
    )


def _kept(study: Study, size: str, base: str, tau: str) -> SeedMean | None:
    """Return the mean over the seeds that have both students; None if it is unknown for one."""
    return mean_of(study, Term(measure="control-recall", of=tau, against=base), size)


ENTROPY, DIVERGENCE, ENDS = "entropy H(p'')", "KL(p''||p*)", "end tokens"


def parts(study: Study, size: str) -> Figure:
    """Return what precision is made of, per token."""
    measures: dict[str, Measure] = {
        "-precision": lambda student: -study.precision(student),
        ENTROPY: study.entropy,
        DIVERGENCE: study.divergence,
    }
    if not study.eos_counts:
        measures[ENDS] = study.end_part
    known = study.has_divergences
    rows: list[Row] = [
        {
            "student": student_name(label),
            "part": part,
            **interval(study.mean(size, label, measure)),
        }
        for label in (study.labels(size) if known else [])
        for part, measure in measures.items()
    ]
    also = "" if study.eos_counts else ", and the end tokens, which precision leaves out"
    return Figure(
        name="parts",
        title="What precision is made of",
        reading=f"-precision = H(p'') + KL(p''||p*){also}. A student gains precision by writing "
        "less varied texts (entropy) or texts closer to truth (KL): both are better if lower.",
        needs="log-probabilities of end tokens, which a run of an earlier version lacks",
        rows=rows,
        notes=(
            "Texts of different students differ in length, so that shares per token, as here, and "
            "per sequence, as in the table Nats per sequence, differ.",
        ),
        numbers=across(rows, "part"),
    )


def by_rarity(study: Study, size: str) -> Figure:
    """Return the change of recall against tau 1 on each fifth of truth's samples."""
    known = study.has_fifths and "1" in study.labels(size)
    rows = _fifths(study, size, study.by_rarity, ("rarest", "likeliest")) if known else []
    return Figure(
        name="rarity",
        title="Recall change against tau 1, by rarity",
        reading="Truth's samples are cut into five equal parts by their log-probability per "
        "token under truth. Below 0, the student finds such texts less likely than the student "
        "of tau 1 does.",
        needs="a student of tau 1 and another one",
        rows=rows,
        numbers=across(rows, "fifth", "fifth ", sign=True),
    )


def by_entropy(study: Study, size: str) -> Figure:
    """Return the change of recall against tau 1 on each fifth of positions, by truth's entropy."""
    known = study.has_entropies and "1" in study.labels(size)
    rows = _fifths(study, size, study.by_entropy, ("surest", "least sure")) if known else []
    return Figure(
        name="entropy",
        title="Recall change against tau 1, by how sure the truth is",
        reading="Positions in truth's samples are cut into five equal parts by the entropy of the "
        "truth's next token there. Below 0, the student finds such tokens less likely than the "
        "student of tau 1 does.",
        needs="scoring.expected=true, which launch/sweep.py adds to a finished run, and "
        "scoring.per_token=true from the start",
        rows=rows,
        numbers=across(rows, "fifth", "fifth ", sign=True),
    )


def _fifths(
    study: Study,
    size: str,
    in_fifths: Callable[[Student], Sequence[Statistic]],
    ends: tuple[str, str],
) -> list[Row]:
    """Return the change of recall against tau 1 of each student on each fifth.

    Args:
        study: the run.
        size: size of the students.
        in_fifths: returns a student's recall on each fifth.
        ends: what the first and the last fifth are.
    """

    def on(fifth: int) -> Measure:
        return lambda student: in_fifths(student)[fifth]

    words = {0: f" {ends[0]}", NUM_GROUPS - 1: f" {ends[1]}"}
    rows: list[Row] = []
    for label in study.labels(size):
        for fifth in range(NUM_GROUPS):
            change = study.contrast(size, label, "1", on(fifth))
            if label != "1" and change is not None:
                names: Row = {
                    "student": student_name(label),
                    "fifth": f"{fifth + 1}{words.get(fifth, '')}",
                }
                rows.append(names | interval(change))
    return rows


NEEDS_TOKENS = "per-token scores: a new run with scoring.per_token=true"


def curves(study: Study, size: str) -> Figure:
    """Return exact precision-recall curves by length of prefix, and check them."""
    rows: list[Row] = []
    deviations: list[float] = []
    labels = study.labels(size) if study.has_tokens else []
    log_factors = _log_factors(len(labels))
    for label in labels:
        for prefix in PREFIXES:
            students = study.of(size, label).values()
            for log_factor in log_factors:
                one = np.array([log_factor])  # all at once would take too much memory
                alpha = [study.overlaps(student, prefix, one)[0] for student in students]
                beta = [study.coverages(student, prefix, one)[0] for student in students]
                row: Row = {"student": student_name(label), "k": prefix, "log_lambda": log_factor}
                row |= interval(over_seeds(alpha), "alpha") | interval(over_seeds(beta), "beta")
                rows.append(row)
                if abs(log_factor) <= CHECKED_LOG_FACTOR:
                    deviations += _deviation(alpha, beta, math.exp(log_factor))
    return Figure(
        name="curves",
        title="Precision and recall of the first k tokens, estimated from exact probabilities",
        reading="alpha is the share of the student's mass that truth covers, beta the share of "
        "truth's mass that the student covers. Before both are compared, truth's probabilities "
        "are multiplied by lambda: a large lambda asks only whether truth would write a text at "
        "all (alpha near 1), a small one only whether the student would (beta near 1). A student "
        "equal to truth would reach the corner where both are 1. Bands are intervals of alpha.",
        needs=NEEDS_TOKENS,
        rows=rows,
        notes=(_check(deviations),),
    )


def _check(deviations: Sequence[float]) -> str:
    known = (
        f"known to {CHECKED_ERROR:.0%} in every seed (|log lambda| up to {CHECKED_LOG_FACTOR:g})"
    )
    if not deviations:
        return f"Not checked: alpha and lambda beta are nowhere both {known}."
    return (
        "Check: alpha, from the students' samples, and lambda beta, from truth's, differ by at "
        f"most {max(deviations):.1f} standard errors, where both are {known}."
    )


def _log_factors(num_labels: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return log lambda, as many as keep the figure below the largest number of rows."""
    most = MAX_ROWS // (max(1, num_labels) * len(PREFIXES))
    num_factors = min(NUM_FACTORS, most - 1 + most % 2)  # odd, so that 0 is one of them
    return np.linspace(-LARGEST_LOG_FACTOR, LARGEST_LOG_FACTOR, num_factors)


def _deviation(alpha: Sequence[Statistic], beta: Sequence[Statistic], factor: float) -> list[float]:
    """Return |alpha - lambda beta| in standard errors; nothing if a side is not known well."""
    if not all(map(_is_known, (*alpha, *beta))):
        return []
    both = zip(alpha, beta, strict=True)
    mean = over_seeds([precision - factor * recall for precision, recall in both])
    return [abs(mean.estimate) / math.sqrt(mean.sequence_variance)]


def _is_known(statistic: Statistic) -> bool:
    """Return whether a mean of terms from 0 to 1 is larger than its error by far."""
    error = math.sqrt(sum(float((rows**2).sum()) for rows in statistic.influence.values()))
    return 0.0 < error < CHECKED_ERROR * statistic.value


def total_variation(study: Study, size: str) -> Figure:
    """Return the total variation between students and truth by length of prefix."""
    rows: list[Row] = []
    for label in study.labels(size) if study.has_tokens else []:
        for prefix in PREFIXES:
            mean = study.mean(size, label, _distance(study, prefix))
            rows.append({"student": student_name(label), "k": str(prefix), **interval(mean)})
    return Figure(
        name="total-variation",
        title="Total variation from truth",
        reading="Half the sum of |p'' - p*| over all beginnings of k tokens: 0 if they are the "
        "same, 1 if they share nothing.",
        needs=NEEDS_TOKENS,
        rows=rows,
        numbers=across(rows, "k", "k = "),
    )


def _distance(study: Study, prefix: int) -> Measure:
    return lambda student: study.total_variation(student, prefix)


def best_temperature(study: Study, size: str) -> Figure:
    """Return recall against the temperature at which a student scores truth's samples."""
    rows: list[Row] = []
    for label in study.labels(size):
        names = [student.name for student in study.of(size, label).values()]
        temperatures = _shared(study.scored_temperatures(name) for name in names)
        if len(temperatures) < 2:
            continue
        means = {t: study.mean(size, label, _at(study.recall, t)) for t in temperatures}
        best = max(means, key=lambda temperature: means[temperature].estimate)
        rows += [
            {
                "student": student_name(label),
                "temperature": temperature,
                **interval(mean),
                "best": "best T" if temperature == best else "",
            }
            for temperature, mean in means.items()
        ]
    return Figure(
        name="best-temperature",
        title="Recall at other temperatures of evaluation",
        reading="Recall when a student's logits are divided by T before it scores truth's "
        "samples; rings mark the best T of each. What remains between two students at their best "
        "T is more than calibration.",
        needs=f"recall at other temperatures: {ADD_TEMPERATURES}",
        rows=rows,
        numbers=across(rows, "temperature", "T "),
    )
