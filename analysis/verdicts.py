"""What follows from the scores of a run, as sentences made from intervals.

A claim holds if its whole interval is on the claimed side, fails if it is wholly on the other, and
is undecided otherwise; a claim about several numbers needs all of them. Intervals are 95 %, over
seeds and sequences, given p* and D, without correction for the number of claims. With one seed the
sampling error alone is known, so no claim is decided.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from scipy import stats
from study import Measure, Student, Study, at_equal_precision, best_recall

from kdhpc.science.intervals import SeedMean, over_seeds
from kdhpc.science.modes import Slope

Decision = Literal["holds", "fails", "undecided"]
ENTROPY_SHARE = 0.8
"""Share of a gain in precision above which it counts as mostly entropy; fixed before any run."""
POWER = 0.8
"""Probability with which an effect of the minimum detectable size is decided."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, what was decided about it, and the numbers behind it."""

    name: str
    size: str
    """Size of the students that it is about; empty if it compares sizes, which it then names."""
    claim: str
    """What would be said if it held."""
    decision: Decision
    sentence: str
    """What the numbers say."""
    means: Mapping[str, SeedMean] = field(default_factory=dict)
    """The numbers by what they are, in nats per token."""


def verdicts(study: Study) -> list[Verdict]:
    """Return what can be said about the students of each size."""
    found: list[Verdict] = []
    for size in study.sizes:
        for make in (
            precision_rises,
            recall_falls,
            trade_off,
            cost_of_a_teacher,
            gain_is_entropy,
            beats_temperature,
            more_than_calibration,
            rare_pays,
        ):
            found += make(study, size)
    return found


def claim_of(verdict: Verdict, *, several: bool) -> str:
    """Return the claim of a verdict, with the size of its students if there are several sizes."""
    return verdict.claim + (f" (size {verdict.size})" if several and verdict.size else "")


def text(mean: SeedMean | Slope, *, sign: bool = True) -> str:
    """Return an estimate and its interval, such as `+0.944 [0.848, 1.039]`."""
    return f"{mean.estimate:{'+' if sign else ''}.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def detectable(mean: SeedMean) -> float:
    """Return the smallest effect that this design would decide with a probability of 0.8.

    It is half the width of the interval, and t at 0.8 standard errors. It is infinite for one seed,
    with which nothing is decided.
    """
    if mean.num_seeds == 1:
        return math.inf
    at_power = float(stats.t.ppf(POWER, mean.degrees_of_freedom))
    return mean.high - mean.estimate + at_power * mean.standard_error


def decide(means: Sequence[SeedMean], direction: int) -> Decision:
    """Decide that all of some means are above 0 (direction 1) or below 0 (direction -1)."""
    if not means or any(mean.num_seeds == 1 for mean in means):
        return "undecided"
    low = [min(direction * mean.low, direction * mean.high) for mean in means]
    high = [max(direction * mean.low, direction * mean.high) for mean in means]
    if min(high) < 0.0:
        return "fails"
    return "holds" if min(low) > 0.0 else "undecided"


def precision_rises(study: Study, size: str) -> list[Verdict]:
    """Say at which steps to a lower tau precision rises."""
    return _monotone(study, size, "precision", study.precision, 1)


def recall_falls(study: Study, size: str) -> list[Verdict]:
    """Say at which steps to a lower tau recall falls."""
    return _monotone(study, size, "recall", study.recall, -1)


def _monotone(
    study: Study, size: str, metric: str, measure: Measure, direction: int
) -> list[Verdict]:
    steps: dict[str, SeedMean] = {}
    for above, below in pairwise(study.taus(size)):
        if (change := study.contrast(size, below, above, measure)) is not None:
            steps[f"from tau {above} to {below}"] = change
    if not steps:
        return []
    verb = "rises" if direction > 0 else "falls"
    words = {"holds": verb, "fails": "falls" if direction > 0 else "rises"}
    parts = [
        f"{metric} {words.get(decide([change], direction), 'is undecided')} {step}: {text(change)}"
        for step, change in steps.items()
    ]
    return [
        Verdict(
            name=f"{metric}-{verb}",
            size=size,
            claim=f"{metric} {verb} with every step to a lower tau",
            decision=decide([*steps.values()], direction),
            sentence=capitalised("; ".join(parts)),
            means=steps,
        )
    ]


def trade_off(study: Study, size: str) -> list[Verdict]:
    """Compare the students of each tau below 1 with the direct one, as the paper does."""
    made = []
    for tau in study.taus(size):
        gain = study.contrast(size, tau, "direct", study.precision)
        loss = study.contrast(size, tau, "direct", study.recall)
        if gain is None or loss is None or float(tau) >= 1.0:
            continue
        made.append(
            Verdict(
                name=f"trade-off-{tau}",
                size=size,
                claim=f"distillation at tau {tau} trades recall for precision, against direct "
                "training",
                decision=all_of((decide([gain], 1), decide([loss], -1))),
                sentence=f"From the direct student to that of tau {tau}, precision changes by "
                f"{text(gain)} and recall by {text(loss)}",
                means={"precision": gain, "recall": loss},
            )
        )
    return made


def cost_of_a_teacher(study: Study, size: str) -> list[Verdict]:
    """Compare the student of tau 1 with the direct one."""
    changes = {
        "precision": study.contrast(size, "1", "direct", study.precision),
        "recall": study.contrast(size, "1", "direct", study.recall),
    }
    means = {name: change for name, change in changes.items() if change is not None}
    if len(means) < 2:
        return []
    decisions = [decide([change], -1) for change in means.values()]
    return [
        Verdict(
            name="cost-of-a-teacher",
            size=size,
            claim="learning from a teacher at tau 1, not from truth, costs precision and recall",
            decision=all_of(decisions),
            sentence="From the direct student to that of tau 1, precision changes by "
            f"{text(means['precision'])} and recall by {text(means['recall'])}"
            f"{_decidable(means)}",
            means=means,
        )
    ]


def _decidable(means: Mapping[str, SeedMean]) -> str:
    """Say which changes would have been decided; nothing if none would."""
    if any(mean.num_seeds == 1 for mean in means.values()):
        return ""
    sizes = " and ".join(f"of {detectable(mean):.3f} in {name}" for name, mean in means.items())
    return f"; a change {sizes} would have been decided with probability {POWER}"


def gain_is_entropy(study: Study, size: str) -> list[Verdict]:
    """Split the gain in precision against tau 1 into entropy and divergence from the truth."""
    if not study.has_divergences:
        return []
    return [
        verdict
        for tau in study.taus(size)
        if tau != "1"
        for verdict in _parts_of_gain(study, size, tau)
    ]


def _parts_of_gain(study: Study, size: str, tau: str) -> list[Verdict]:
    gain = study.contrast(size, tau, "1", study.precision)
    entropy = study.contrast(size, tau, "1", lambda s: -study.entropy(s))
    divergence = study.contrast(size, tau, "1", lambda s: -study.divergence(s))
    if gain is None or entropy is None or divergence is None:
        return []
    means = {"precision": gain, "entropy": entropy, "divergence": divergence}
    said, ends = "", study.contrast(size, tau, "1", lambda s: -study.end_part(s))
    if ends is not None and not study.eos_counts:
        means["end tokens"] = ends
    decision: Decision = "undecided"
    if gain.low > 0.0:
        # The share of means, linearised around them.
        rough = entropy.estimate / gain.estimate
        share = study.contrast(
            size,
            tau,
            "1",
            lambda s: (-study.entropy(s) - rough * study.precision(s)) / gain.estimate,
        )
        if share is not None:
            means["share less its estimate"] = share
            low, high = rough + share.low, rough + share.high
            said = f", a share of {rough:.2f} [{low:.2f}, {high:.2f}],"
            if share.num_seeds > 1:
                decision = _beyond(low, high, ENTROPY_SHARE)
    return [
        Verdict(
            name=f"gain-is-entropy-{tau}",
            size=size,
            claim=f"more than {ENTROPY_SHARE:g} of the gain in precision at tau {tau} is lower "
            "entropy",
            decision=decision,
            sentence=f"Of the change in precision from tau 1 to {tau}, {text(gain)} a token, lower "
            f"entropy contributes {text(entropy)}{said} and KL(p''||p*) {text(divergence)}"
            f"{_ends_said(means)}",
            means=means,
        )
    ]


def _ends_said(means: Mapping[str, SeedMean]) -> str:
    if "end tokens" not in means:
        return ""
    return f"; end tokens, which precision leaves out, {text(means['end tokens'])}"


def _beyond(low: float, high: float, bound: float) -> Decision:
    """Decide that what lies between two ends is above a bound."""
    if low > bound:
        return "holds"
    return "fails" if high < bound else "undecided"


def beats_temperature(study: Study, size: str) -> list[Verdict]:
    """Compare distilled students with a lower decode temperature, at equal precision."""
    made = []
    for base in ("direct", "1"):
        bases = study.of(size, base)
        if not any(len(study.temperatures(student)) > 1 for student in bases.values()):
            continue
        for tau in study.taus(size):
            if tau == base:
                continue
            made += _against_temperature(study, bases, base, study.of(size, tau), tau, size)
    return made


def _against_temperature(
    study: Study,
    bases: Mapping[int, Student],
    base: str,
    students: Mapping[int, Student],
    tau: str,
    size: str,
) -> list[Verdict]:
    seeds = [seed for seed in students if seed in bases]
    differences = [at_equal_precision(study, bases[seed], students[seed]) for seed in seeds]
    inside = [difference for difference in differences if difference is not None]
    claim = (
        f"at equal precision, distillation at tau {tau} has more recall than another temperature "
        f"of the {_base_name(base)} student"
    )
    name = f"beats-temperature-{tau}-{base}"
    if len(inside) < len(seeds) or not inside:
        outside = len(seeds) - len(inside)
        sentence = (
            f"The precision of {outside} of {len(seeds)} students of tau {tau} is outside of what "
            f"the {_base_name(base)} student reaches at the decode temperatures"
        )
        return [Verdict(name=name, size=size, claim=claim, decision="undecided", sentence=sentence)]
    kept = over_seeds(inside)
    return [
        Verdict(
            name=name,
            size=size,
            claim=claim,
            decision=decide([kept], -1),
            sentence=f"At the precision of the student of tau {tau}, the recall of the "
            f"{_base_name(base)} student less that of the distilled one is {text(kept)} "
            "(temperatures are interpolated in each seed)",
            means={"recall kept": kept},
        )
    ]


def more_than_calibration(study: Study, size: str) -> list[Verdict]:
    """Compare recalls when each student scores truth at its best temperature."""
    made = []
    for tau in study.taus(size):
        students, plain = study.of(size, tau), study.of(size, "1")
        seeds = [seed for seed in students if seed in plain]
        edges = {
            student.name: study.scored_temperatures(student.name)
            for seed in seeds
            for student in (students[seed], plain[seed])
        }
        if tau == "1" or not seeds or any(len(tried) < 2 for tried in edges.values()):
            continue
        best = {seed: best_recall(study, students[seed]) for seed in seeds}
        of_plain = {seed: best_recall(study, plain[seed]) for seed in seeds}
        change = over_seeds([best[s][1] - of_plain[s][1] for s in seeds])
        plainly = over_seeds([study.recall(students[s]) - study.recall(plain[s]) for s in seeds])
        where = [
            _best_named(label, {of[seed].name: bests[seed][0] for seed in seeds}, edges)
            for label, of, bests in ((tau, students, best), ("1", plain, of_plain))
        ]
        no_loss = "" if plainly.high < 0.0 else "No loss is established at T = 1. "
        made.append(
            Verdict(
                name=f"more-than-calibration-{tau}",
                size=size,
                claim=f"the loss of recall at tau {tau} remains at the best temperature for truth",
                decision=decide([change, plainly], -1),
                sentence=f"{no_loss}From tau 1 to {tau}, recall changes by {text(plainly)} at "
                f"T = 1 and by {text(change)} with the best T of each student and seed, which is "
                f"{' and '.join(where)}",
                means={"at the best temperature": change, "at temperature 1": plainly},
            )
        )
    return made


def _best_named(tau: str, best: Mapping[str, float], tried: Mapping[str, Sequence[float]]) -> str:
    """Name the best temperatures of the students of a tau, and say if more would be better."""
    at_edge = any(t in (tried[name][0], tried[name][-1]) for name, t in best.items())
    temperatures = ", ".join(f"{t:g}" for t in sorted({*best.values()}))
    return f"{temperatures} for tau {tau}" + " (at an end of what was tried)" * at_edge


def rare_pays(study: Study, size: str) -> list[Verdict]:
    """Compare what the rarest and the commonest fifth of truth's samples lose at the lowest tau."""
    taus = study.taus(size)
    if len(taus) < 2 or not study.has_fifths:
        return []
    ends = (taus[-1], taus[0])
    rarest = study.contrast(size, *ends, lambda s: study.by_rarity(s)[0])
    commonest = study.contrast(size, *ends, lambda s: study.by_rarity(s)[-1])
    difference = study.contrast(
        size, *ends, lambda s: study.by_rarity(s)[0] - study.by_rarity(s)[-1]
    )
    if rarest is None or commonest is None or difference is None:
        return []
    return [
        Verdict(
            name="rare-pays",
            size=size,
            claim=f"the rarest fifth of truth's samples loses more recall at tau {taus[-1]} than "
            "the commonest",
            decision=decide([rarest, difference], -1),
            sentence=f"From tau {taus[0]} to {taus[-1]}, recall changes by "
            f"{text(rarest)} on the fifth of truth's samples that it finds least likely, by "
            f"{text(commonest)} on the likeliest fifth, and the difference is {text(difference)}",
            means={"rarest": rarest, "commonest": commonest, "difference": difference},
        )
    ]


def all_of(decisions: Sequence[Decision]) -> Decision:
    """Return the decision that all of some claims hold."""
    if "fails" in decisions:
        return "fails"
    return "undecided" if "undecided" in decisions else "holds"


def _base_name(label: str) -> str:
    return "direct" if label == "direct" else f"tau-{label}"


def capitalised(sentence: str) -> str:
    """Return a sentence that begins with a capital letter."""
    return sentence[:1].upper() + sentence[1:]
