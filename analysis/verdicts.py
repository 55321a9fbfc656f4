"""What follows from the scores of a run, as sentences made from intervals.

A claim holds if its interval says so, fails if its interval contradicts it, and is undecided
otherwise. Intervals are 95 %, over seeds and sequences, given p* and D. With one seed the sampling
error alone is known, so no claim is decided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from scipy import stats
from study import SELF, TRUTH, Measure, Student, Study, at_equal_precision, best_recall

from kdhpc.science.intervals import SeedMean, over_seeds

Decision = Literal["holds", "fails", "undecided"]
ENTROPY_SHARE = 0.8
"""Share of a gain in precision above which it counts as mostly entropy."""
POWER = 0.8
"""Probability with which an effect of the minimum detectable size is decided."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A claim, what was decided about it, and the numbers behind it."""

    name: str
    size: str
    """Size of the students that it is about."""
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


def text(mean: SeedMean, *, sign: bool = True) -> str:
    """Return an estimate and its interval, such as `+0.944 [0.848, 1.039]`."""
    return f"{mean.estimate:{'+' if sign else ''}.3f} [{mean.low:.3f}, {mean.high:.3f}]"


def detectable(mean: SeedMean) -> float:
    """Return the smallest effect that this design would decide with a probability of 0.8.

    It is half the width of the interval, and t at 0.8 standard errors.
    """
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
            sentence=_capitalised("; ".join(parts)),
            means=steps,
        )
    ]


def trade_off(study: Study, size: str) -> list[Verdict]:
    """Compare the student of the lowest tau with the direct one, as the paper does."""
    taus = study.taus(size)
    if not taus or "direct" not in study.labels(size):
        return []
    gain = study.contrast(size, taus[-1], "direct", study.precision)
    loss = study.contrast(size, taus[-1], "direct", study.recall)
    if gain is None or loss is None:
        return []
    decisions = (decide([gain], 1), decide([loss], -1))
    return [
        Verdict(
            name="trade-off",
            size=size,
            claim="distillation trades recall for precision: more precise, and less recall, than "
            "direct training",
            decision=_all_of(decisions),
            sentence=f"Against the direct student, that of tau {taus[-1]} has precision "
            f"{text(gain)} and recall {text(loss)}",
            means={"precision": gain, "recall": loss},
        )
    ]


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
            decision=_all_of(decisions),
            sentence="Against the direct student, that of tau 1 has precision "
            f"{text(means['precision'])} and recall {text(means['recall'])}; a difference of "
            f"{detectable(means['precision']):.3f} in precision and "
            f"{detectable(means['recall']):.3f} in recall would have been decided with "
            f"probability {POWER}",
            means=means,
        )
    ]


def gain_is_entropy(study: Study, size: str) -> list[Verdict]:
    """Split the gain in precision against tau 1 into entropy and divergence from the truth."""
    if not study.has_divergences:
        return []
    made = []
    for tau in study.taus(size):
        parts = {
            "precision": study.contrast(size, tau, "1", study.precision),
            "entropy": study.contrast(size, tau, "1", lambda s: -study.entropy(s)),
            "divergence": study.contrast(size, tau, "1", lambda s: -study.divergence(s)),
            "rest": study.contrast(
                size,
                tau,
                "1",
                lambda s: -study.divergence(s) - (1.0 - ENTROPY_SHARE) * study.precision(s),
            ),
        }
        means = {name: part for name, part in parts.items() if part is not None}
        if tau == "1" or len(means) < len(parts):
            continue
        gain, entropy, divergence = (means[n] for n in ("precision", "entropy", "divergence"))
        share = f" ({entropy.estimate / gain.estimate:.0%} of it)" if gain.low > 0 else ""
        made.append(
            Verdict(
                name=f"gain-is-entropy-{tau}",
                size=size,
                claim=f"more than {ENTROPY_SHARE:.0%} of the gain in precision at tau {tau} is "
                "lower entropy",
                decision=decide([means["rest"]], -1) if gain.low > 0 else "undecided",
                sentence=f"Of {text(gain)} in precision from tau 1 to {tau}, lower entropy is "
                f"{text(entropy)}{share} and a smaller KL(p''||p*) is {text(divergence)}",
                means=means,
            )
        )
    return made


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
    claim = f"distillation at tau {tau} beats the temperature of the {_base_name(base)} student"
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
            sentence=f"At the precision of the student of tau {tau}, the {_base_name(base)} "
            f"student at another temperature has {text(kept)} nats more recall",
            means={"recall kept": kept},
        )
    ]


def more_than_calibration(study: Study, size: str) -> list[Verdict]:
    """Compare recalls when each student scores truth at its best temperature."""
    made = []
    for tau in study.taus(size):
        students, plain = study.of(size, tau), study.of(size, "1")
        seeds = [seed for seed in students if seed in plain]
        scored = [study.scored_temperatures(students[seed].name) for seed in seeds]
        if tau == "1" or not seeds or any(len(temperatures) < 2 for temperatures in scored):
            continue
        best = {seed: best_recall(study, students[seed]) for seed in seeds}
        change = over_seeds([best[s][1] - best_recall(study, plain[s])[1] for s in seeds])
        plainly = over_seeds([study.recall(students[s]) - study.recall(plain[s]) for s in seeds])
        temperatures = sorted({best[seed][0] for seed in seeds})
        made.append(
            Verdict(
                name=f"more-than-calibration-{tau}",
                size=size,
                claim=f"the loss of recall at tau {tau} remains at the best temperature for truth",
                decision=decide([change], -1),
                sentence=f"With the best temperature of each student (T = "
                f"{', '.join(f'{t:g}' for t in temperatures)} for tau {tau}), recall changes by "
                f"{text(change)} from tau 1 to {tau}; at T = 1 by {text(plainly)}",
                means={"at the best temperature": change, "at temperature 1": plainly},
            )
        )
    return made


def rare_pays(study: Study, size: str) -> list[Verdict]:
    """Compare what the rarest and the commonest fifth of truth's samples lose at the lowest tau."""
    taus = study.taus(size)
    if len(taus) < 2 or (TRUTH, SELF) not in study.scores:
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
            decision=decide([difference], -1),
            sentence=f"From tau {taus[0]} to {taus[-1]}, recall changes by "
            f"{text(rarest)} on the fifth of truth's samples that it finds least likely, "
            f"and by {text(commonest)} on the likeliest fifth",
            means={"rarest": rarest, "commonest": commonest, "difference": difference},
        )
    ]


def _all_of(decisions: Sequence[Decision]) -> Decision:
    """Return the decision that all of some claims hold."""
    if "fails" in decisions:
        return "fails"
    return "undecided" if "undecided" in decisions else "holds"


def _base_name(label: str) -> str:
    return "direct" if label == "direct" else f"tau-{label}"


def _capitalised(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
