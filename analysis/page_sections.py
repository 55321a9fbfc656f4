"""The tables and sentences of the pages of experiments in docs, from their scores."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import choose_tau
import claims
import costs
import diversity
import downstream
import judges
import modes
import pass_at_k
import prediction
import report_rows
from claim_terms import kept, mean_of, students_of, teachers, whole_mean
from claims import Outcome
from report_run import RunFacts
from report_text import value_text
from size_verdicts import trainings
from study import Study, at_equal_precision_smoothly
from verdicts import Decision, Verdict, capitalised, decide, gain_is_entropy, text

from kdhpc.experiment.arms import teacher_name
from kdhpc.experiment.claims import Claim, Term
from kdhpc.science.intervals import SeedMean, holm, over_seeds
from kdhpc.science.modes import Slope

REAL_DATA = Path(__file__).resolve().parents[1] / "docs" / "experiments" / "real_data"
"""Folder of the claims and scores of real data, whose claims are tested with two judges."""
PURPOSES: Mapping[str, Mapping[str, float]] = {
    "the highest precision that costs at most 0.05 nats of recall": {"recall_loss": 0.05},
    "the highest precision + recall": {"weight": 1.0},
    "the highest precision + 3 recall": {"weight": 3.0},
}
"""Purposes for which a tau is chosen, as options of analysis/choose_tau.py."""


def claim_table(outcomes: Sequence[Outcome], num_seeds: int, page: str) -> str:
    """Return the claims of a page as a table; those of other pages count in the correction."""
    corrected = holm([outcome.p_value for outcome in outcomes])
    rows = [
        (
            outcome.claim.says,
            claims.decide(outcome, p_value),
            f"{p_value:.4f}",
            "<br>".join(_terms(outcome.claim, outcome.means)) or "a term has no value",
        )
        for outcome, p_value in zip(outcomes, corrected, strict=True)
        if outcome.claim.page in ("", page)
    ]
    more = "" if len(rows) == len(outcomes) else f" ({len(outcomes)} with those of other pages)"
    seeds = f"{num_seeds} seed{'s' if num_seeds > 1 else ''}"
    title = (
        f"{len(rows)} claims{more}, corrected together; {seeds}, 95 % intervals in "
        f"{claims.unit_of(outcomes)}; `kdhpc/experiment/claims.py` says what the measures are:"
    )
    return f"{title}\n\n" + table(("claim", "decision", "p, corrected", "estimate"), rows)


def _terms(claim: Claim, means: Sequence[SeedMean | Slope]) -> list[str]:
    return [f"{t}: {text(mean)}" for t, mean in zip(claim.terms, means, strict=False)]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def run_facts(study: Study) -> str:
    """Say what was run, and what it cost."""
    provenance = study.results.provenance
    num_seeds = len({student.seed for student in study.students})
    own = sum(json.loads(provenance["seconds_by_stage"]).values()) / 3600
    reused = sum(json.loads(provenance["seconds_reused"]).values()) / 3600
    more = f", and {reused:.2f} of the run that it takes from" if reused else ""
    versions = ", ".join(f"{n} {v}" for n, v in json.loads(provenance["versions"]).items())
    apart = f", with {claims.replicates(study)}" if claims.replicates(study) else ""
    return (
        f"{len(study.students)} students, {num_seeds} seed{'s' if num_seeds > 1 else ''}{apart}, "
        f"{own:.2f} core-hours{more}, of the attempts that published "
        f"(Python {provenance['python']}, {versions})."
    )


def temperature(study: Study) -> Iterator[str]:
    """Yield what tau 1 and each other tau change, where they beat another T, and what to choose."""
    [size] = study.sizes
    collapsed = {
        verdict.name.removeprefix("collapse-"): verdict
        for verdict in diversity.collapse(
            diversity.sample_sets(study, size, RunFacts(config=None, records={})), size
        )
    }
    shares = {v.name.removeprefix("gain-is-entropy-"): v for v in gain_is_entropy(study, size)}
    rows: list[tuple[str, ...]] = []
    beats: dict[str, list[str]] = {words: [] for words in BEATS.values()}
    for tau in study.taus(size):
        controls = [
            mean_of(study, Term(measure="control-recall", of=tau, against=base), size)
            for base in ("direct", "1")
            if base != tau
        ]
        rows.append(
            (
                tau,
                *(_change(study, size, measure, tau) for measure in ("precision", "recall")),
                _share(shares[tau]) if tau in shares else "",
                *(text(mean) if mean else "not reached" for mean in controls),
                *([""] if tau == "1" else []),
                _collapse(collapsed[tau]) if tau in collapsed else "",
            )
        )
        if controls[0] is not None:
            beats[BEATS[decide([controls[0]], -1)]].append(tau)
    yield _beside_direct(study, size)
    yield (
        "By tau: the change of the student from tau 1; the part of it in precision that is lower "
        "entropy; the recall that another "
        "T of the direct student, or of the student of tau 1, keeps at the precision of the "
        "distilled student, less its recall (below 0, distillation is better); whether samples "
        "have collapsed, and the share of texts with a repeated 4-gram, less truth's.\n\n"
    ) + table(
        (
            "tau", "precision", "recall", "entropy's share", "kept by direct", "kept by tau 1",
            "samples",
        ),
        rows,
    )  # fmt: skip
    yield _smooth(study, size)
    said = [f"{words} at tau {', '.join(taus)}" for words, taus in beats.items() if taus]
    yield f"Against the direct student at another T, distillation {'; it '.join(said)}."
    yield (
        "What `analysis/choose_tau.py` chooses from the means, whose errors it does not weigh:\n\n"
    ) + "\n".join(
        f"- {purpose}: {'; '.join(choose_tau.chosen(study, size, _options(wanted)))}"
        for purpose, wanted in PURPOSES.items()
    )
    yield from _predictions(study, [size])


def _smooth(study: Study, size: str) -> str:
    """Return what other temperatures keep at equal precision, with a smooth interpolation."""
    rows = []
    for tau in study.taus(size):
        by_base = {b: _smoothly(study, size, b, tau) for b in ("direct", "1") if b != tau}
        rows.append((tau, by_base["direct"], by_base.get("1", "")))
    return (
        "The claims interpolate recall linearly between temperatures, which understates what "
        "another T keeps. With a smooth curve instead:\n\n"
    ) + table(("tau", "kept by direct", "kept by tau 1"), rows)


def _smoothly(study: Study, size: str, base: str, tau: str) -> str:
    mean = whole_mean(kept(study, tau, base, size, at_equal_precision_smoothly))
    return text(mean) if mean else "not reached"


def _share(verdict: Verdict) -> str:
    """Return the share of a gain in precision that is lower entropy; empty without a gain."""
    off = verdict.means.get("share less its estimate")
    if off is None:
        return ""
    share = verdict.means["entropy"].estimate / verdict.means["precision"].estimate
    return f"{share:.2f} [{share + off.low:.2f}, {share + off.high:.2f}]"


def _collapse(verdict: Verdict) -> str:
    """Return whether samples have collapsed, and the excess of texts with a repeated 4-gram."""
    return f"{COLLAPSE[verdict.decision]}: {text(verdict.means['excess of repeated'])}"


COLLAPSE: Mapping[Decision, str] = {
    "holds": "not collapsed", "fails": "collapsed", "undecided": "undecided",
}  # fmt: skip
BEATS: Mapping[Decision, str] = {"holds": "wins", "fails": "loses", "undecided": "is undecided"}


def _options(wanted: Mapping[str, float]) -> argparse.Namespace:
    none = dict.fromkeys(("recall_loss", "precision", "weight", "metric"))
    return argparse.Namespace(**{**none, **wanted})


def _change(study: Study, size: str, measure: str, tau: str, against: str = "1") -> str:
    """Return a change of the students as text; empty if there is none."""
    if tau == against:
        return ""
    changes = students_of(study, measure, tau, against, size)
    return text(over_seeds([*changes.values()])) if changes else "not known"


def _teacher_change(study: Study, measure: str, tau: str) -> str:
    if tau == "1":
        return ""
    changes = teachers(study, measure, tau, "1")
    return text(over_seeds([*changes.values()])) if changes else "not known"


def capacity(study: Study) -> Iterator[str]:
    """Yield changes by size and training beside the teacher's, and what predicts them."""
    lowest = study.taus(study.sizes[0])[-1]
    own = [_teacher_change(study, measure, lowest) for measure in ("precision", "recall")]
    rows = [
        (
            *_name(study, size),
            *(_change(study, size, measure, lowest) for measure in ("precision", "recall")),
            *(_control(study, size, lowest),),
        )
        for group in trainings(study).values()
        for size in group
    ]
    yield (
        f"Change from tau 1 to {lowest}; divided by {1.0 - float(lowest):.1f} it is the slope "
        f"against tau. *Kept* is the recall that the direct student at another T keeps at the "
        f"precision of the distilled one, less its recall.\n\n"
    ) + table(
        ("size", "passes", "parameters", "precision", "recall", "kept"),
        [*rows, ("teacher", "", "", *own, "")],
    )
    for group in trainings(study).values():
        yield from _predictions(study, group)


def _control(study: Study, size: str, tau: str) -> str:
    mean = mean_of(study, Term(measure="control-recall", of=tau, against="direct"), size)
    return text(mean) if mean else "not reached"


def convergence(study: Study) -> Iterator[str]:
    """Yield what sets direct apart from tau 1, and the part of divergence, by size and training."""
    lowest = study.taus(study.sizes[0])[-1]
    rows = [
        (
            *_name(study, size),
            *(_change(study, size, m, "direct") for m in ("precision", "recall")),
            _change(study, size, "divergence", lowest),
        )
        for group in trainings(study).values()
        for size in group
    ]
    yield (
        f"The direct student less that of tau 1, and the change of KL(p''\\|\\|p\\*) from tau 1 to "
        f"{lowest}:\n\n"
    ) + table(("size", "passes", "parameters", "precision", "recall", "KL"), rows)


def _name(study: Study, size: str) -> tuple[str, str, str]:
    """Return the size, its passes over the data, and its number of parameters."""
    facts: Any = study.training(size)
    passes = f"{facts['training']['epochs']:g}"
    if facts["fine_tuning"]:
        passes += f" + {facts['fine_tuning']['epochs']:g}"
    return size, passes, f"{study.parameters(size):,}"


def _predictions(study: Study, sizes: list[str]) -> Iterator[str]:
    """Yield the errors of predictions from teachers and one pilot student."""
    found = prediction.errors(study, sizes)
    if not found:
        return
    pilot = prediction.pilot_seed(study)
    scale = prediction.factor(study, sizes[0], pilot)
    rows = [
        (
            error.size, error.tau, text(error.precision), text(error.precision_error),
            f"{error.largest[0]:.3f}", text(error.recall), text(error.recall_error),
            f"{error.largest[1]:.3f}",
        )
        for error in found
    ]  # fmt: skip
    yield (
        "Predicted from the teachers: the change of precision is "
        f"{scale:.2f} times the teacher's, as in the pilot (seed {pilot}, "
        f"{sizes[0]}, the lowest tau), and the change of recall is the teacher's. Over the other "
        "seeds, the change from tau 1, what it is more than predicted, and the largest error of "
        "one seed:\n\n"
    ) + table(("size", "tau", "precision", "error", "largest", "recall", "error", "largest"), rows)


def replication(study: Study) -> Iterator[str]:
    """Yield the students' means, what a tau changes, and what the run cost."""
    [size] = study.sizes
    yield _means(study, size)
    yield from temperature(study)
    yield from _costs(study)


def _means(study: Study, size: str) -> str:
    measures = (study.precision, study.recall, study.entropy, study.divergence)
    rows = [*_teacher_means(study)]
    for label in study.labels(size):
        means = (text(study.mean(size, label, measure), sign=False) for measure in measures)
        rows.append((report_rows.student_name(label), *means))
    return (
        "Means over seeds, in nats per token; the truth's own samples have "
        f"{text(over_seeds([study.truth_log_prob()]), sign=False)} under it.\n\n"
    ) + table(("model", "precision", "recall", "entropy", "KL(p''||p*)"), rows)


def _teacher_means(study: Study) -> Iterator[tuple[str, ...]]:
    """Yield the mean precision and recall of the teachers at tau 1, if they were scored."""
    seeds = {student.seed for student in study.students}
    names = [teacher_name(seed) for seed in sorted(seeds)]
    if all(study.has_teacher(name, 1.0) for name in names):
        of_each = zip(*(study.teacher(name, 1.0) for name in names), strict=True)
        yield ("teacher", *(text(over_seeds(of), sign=False) for of in of_each), "", "")


def _costs(study: Study) -> Iterator[str]:
    yield "Cost by stage:\n\n" + table(
        (
            "stage",
            "core-hours",
            "10^12 operations" + (", with what was taken" if costs.takes_shards(study) else ""),
        ),
        costs.by_stage(study),
    )
    yield costs.in_words(study)


def answers(study: Study, kind: str) -> Iterator[str]:
    """Yield how good the best of k texts are, whether curves cross, means, and what it cost."""
    [size] = study.sizes
    ks = pass_at_k.up_to(study)
    rows = [
        (
            report_rows.student_name(str(row["student"])),
            f"{row['T']:g}" if row["student"] in study.labels(size) else "",
            *(
                value_text(*(float(row[f"{kind}@{k}{end}"]) for end in ("", "_low", "_high")))
                for k in ks
            ),
        )
        for row in pass_at_k.table_rows(study, size, ks, kind)
    ]
    title = capitalised(pass_at_k.TITLES[kind])
    yield f"{title}, of truth, of teachers by tau, and of students at each T:\n\n" + table(
        ("student", "T", *(f"{kind}@{k}" for k in ks)), rows
    )
    for verdict in pass_at_k.crossings(study, size, ks, kind):
        yield f"{capitalised(verdict.decision)}: {verdict.claim}. {verdict.sentence}."
    yield _means(study, size)
    yield from _costs(study)


def by_teacher(study: Study) -> Iterator[str]:
    """Yield how teachers and students of tau 1 differ from direct ones, and what tau 1 changes."""
    [size] = study.sizes
    yield _beside_direct(study, size)
    yield from by_size(study)


def _beside_direct(study: Study, size: str) -> str:
    """Return how teachers and students of tau 1 differ from the direct ones, by seed."""
    direct, taught = study.of(size, "direct"), study.of(size, "1")
    changes = {}
    for seed, student in taught.items():
        base = (study.precision(direct[seed]), study.recall(direct[seed]))
        teacher = study.teacher(teacher_name(seed), 1.0)
        own = (study.precision(student), study.recall(student))
        changes[seed] = [
            ours - theirs for of in (teacher, own) for ours, theirs in zip(of, base, strict=True)
        ]
    return "At tau 1, against the direct student of the same seed:\n\n" + table(
        ("seed", "teacher: precision", "recall", "its student: precision", "recall"),
        [
            *((str(seed), *(f"{c.value:+.3f}" for c in row)) for seed, row in changes.items()),
            ("all", *(text(over_seeds(of)) for of in zip(*changes.values(), strict=True))),
        ],
    )


def by_size(study: Study) -> Iterator[str]:
    """Yield what each teacher changes against the direct student and tau 1, for each size."""
    for size in study.sizes:
        taught = [label for label in study.labels(size) if label != "direct"]
        rows = [
            (
                label,
                *(_change(study, size, m, label, "direct") for m in ("precision", "recall")),
                *(_change(study, size, m, label) for m in ("precision", "recall")),
                *(_kept_by(study, size, base, label) for base in ("direct", "1")),
            )
            for label in taught
        ]
        by = "tau" if taught == study.taus(size) else "tau or truncation"
        yield (
            f"Size {size}, by {by}: the change against the direct student, the change against tau "
            "1, and the recall that another T of the direct student, or of the student of tau 1, "
            "keeps at equal precision:\n\n"
        ) + table(
            (
                by, "precision", "recall", "precision against 1", "recall against 1",
                "kept by direct", "kept by tau 1",
            ),
            rows,
        )  # fmt: skip
        yield _means(study, size)
    yield from _costs(study)


def _kept_by(study: Study, size: str, base: str, tau: str) -> str:
    if base == tau:
        return ""
    mean = mean_of(study, Term(measure="control-recall", of=tau, against=base), size)
    return text(mean) if mean else "not reached"


def of_modes(study: Study) -> Iterator[str]:
    """Yield what is kept of the modes of p*, and what that depends on."""
    yield "The modes of p\\*, in nats per token:"
    yield table(modes.MODES_HEADER, [*modes.mode_lines(study)])
    for size in study.sizes:
        yield (
            "Modes that are kept, the fewest that have 95 % of the mass (emphasised), the share of "
            "texts of no mode, and log(mass / weight in p\\*) of each mode; means over seeds:"
        )
        yield table(modes.arms_header(study), [*modes.arm_lines(study, size)])
        yield (
            "How the logarithm of a mode's mass depends on its properties: coefficients of one "
            "regression, with 95 % intervals and p-values by permutation of the modes. Against "
            "p\\* it is log(mass / weight), otherwise log(mass / mass):"
        )
        yield table(modes.SLOPES_HEADER, [*modes.slope_lines(study, size)])
        yield _means(study, size)


def tasks(study: Study) -> Iterator[str]:
    """Yield the scores in tasks, how they go with precision and recall, means, and the cost."""
    [size] = study.sizes
    rows = [
        (
            row.task, row.metric, row.model, str(row.num_items),
            _with_interval(row.score, row.low, row.high),
        )
        for row in downstream.scores(study)
    ]  # fmt: skip
    yield "Scores in tasks; the row of initial weights is chance:\n\n" + table(
        ("task", "metric", "model", "items", "score"), rows
    )
    correlated = downstream.correlations(study)
    yield (
        "Rank correlation of scores with precision and recall over the students of a seed, with "
        "intervals over seeds:\n\n"
    ) + table(
        ("task", "metric", "with", "seeds", "correlation", "as it rises, the score"),
        [
            (
                row.task, row.metric, row.measure, str(row.num_seeds),
                _with_interval(row.correlation, row.low, row.high, sign=True),
                row.direction,
            )
            for row in correlated
        ],
    )  # fmt: skip
    yield from (f"{capitalised(line)}." for line in downstream.verdict(correlated))
    yield _means(study, size)
    yield from _costs(study)


def _with_interval(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """Return a number with its interval, as far as they are known."""
    if math.isnan(value):
        return ""
    if math.isnan(low):
        return f"{value:{'+' if sign else ''}.3f}"
    return value_text(value, low, high, sign=sign)


def real_data(study: Study) -> Iterator[str]:
    """Yield how two judges agree, the same claims under the second one, then as `replication`."""
    yield from (f"{capitalised(note)}." for note in judges.notes(study))
    if (both := judges.judged(study)) is not None:
        precisions, _ = judges.tables(both)
        yield f"Precision under each judge, in nats per {both.unit}:\n\n" + table(
            [*precisions[0]], [[*row.values()] for row in precisions]
        )
        yield (
            "The same claims with the second judge in place of p\\*; nats of precision and of "
            f"divergence are then per {both.unit}:"
        )
        all_claims, _ = claims.read(REAL_DATA)
        for outcomes, num_seeds in claims.families(both.second, all_claims):
            yield claim_table(outcomes, num_seeds, "real_data")
    yield from replication(study)
