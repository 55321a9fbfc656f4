"""What follows from comparing the sizes of students of a run, as sentences made from intervals.

Two comparisons are made, each where a run has the sizes for it. *Capacity*: sizes that differ in
their number of parameters and were trained with the same settings. *Convergence*: sizes that were
the same model before training and were trained for longer or shorter. Every difference between
sizes is taken seed by seed. Decisions follow the rules of verdicts.py.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from claim_terms import mean_of, students_of, teachers
from study import Study
from verdicts import Verdict, all_of, capitalised, decide, text

from kdhpc.experiment.claims import Term
from kdhpc.science.intervals import SeedMean, over_seeds

MARGIN_SHARE = 0.2
"""Part of the teacher's change by which a student's may differ and still counts as the teacher's
own; fixed before any run. Two one-sided tests decide it."""
DIRECTIONS = {"precision": 1, "recall": -1}
"""The sign of the change that a lower tau is expected to make."""
CHANGES = {"precision": "gain in precision", "recall": "loss of recall"}
ONE_TRAINING = "students"
"""Name of the only training of a run."""


def across_sizes(study: Study) -> list[Verdict]:
    """Return what can be said about the sizes of a run against each other."""
    found: list[Verdict] = []
    tau = lowest_tau(study)
    for sizes in by_capacity(study).values():
        scored = [size for size in sizes if {"1", tau} <= {*study.labels(size)}]
        for make in (_shrinks, _is_the_teachers) if scored else ():
            found += [v for measure in CHANGES for v in make(study, scored, measure, tau)]
    for pair in by_training(study):
        for measure in CHANGES:
            found += _more_training(study, pair, measure, "direct")
        found += _more_training(study, pair, "divergence", tau) if tau else ()
    return found


def lowest_tau(study: Study) -> str:
    """Return the label of the lowest tau below 1 of a run; empty if it has none, or no tau 1."""
    taus = {tau for size in study.sizes for tau in study.taus(size)}
    lowest = min(taus, key=float, default="1")
    return lowest if "1" in taus and float(lowest) < 1.0 else ""


def trainings(study: Study) -> dict[str, list[str]]:
    """Return the sizes that were trained with the same settings, from the smallest.

    Returns:
        By the settings that differ between the trainings of the run, such as `epochs 4`, from the
        shortest training. Sizes whose settings are not known are left out.
    """
    settings = {size: _settings(study, size) for size in study.sizes}
    settings = {size: of_size for size, of_size in settings.items() if of_size}
    fields = dict.fromkeys(field for of_size in settings.values() for field in of_size)
    differing = [f for f in fields if len({json.dumps(s.get(f)) for s in settings.values()}) > 1]
    found: dict[str, list[str]] = {}
    for size in sorted(settings, key=lambda size: (study.sequences_seen(size), size)):
        values = [f"{field} {_value(settings[size].get(field))}" for field in differing]
        found.setdefault(", ".join(values) or ONE_TRAINING, []).append(size)
    return {name: sorted(sizes, key=study.parameters) for name, sizes in found.items()}


def _settings(study: Study, size: str) -> Mapping[str, object]:
    training = study.training(size)
    known = training["training"]
    own = known if isinstance(known, dict) else {}
    tuned = training["fine_tuning"]
    more = (
        {f"fine_tuning.{name}": value for name, value in tuned.items()}
        if isinstance(tuned, dict)
        else {}
    )
    rest = {"labels": training["labels"] or "hard", "train_sequences": training["train_sequences"]}
    return {**own, **more, **rest} if own else {}


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "not set" if value is None else str(value)


def by_capacity(study: Study) -> dict[str, list[str]]:
    """Return the trainings whose sizes differ in their number of parameters."""
    return {
        name: sizes
        for name, sizes in trainings(study).items()
        if study.parameters(sizes[0]) < study.parameters(sizes[-1])
    }


def by_training(study: Study) -> list[tuple[str, str]]:
    """Return pairs of sizes that differ in training alone, the shorter training first in each."""
    sizes = sorted((s for of in trainings(study).values() for s in of), key=study.parameters)
    return [
        (shorter, longer)
        for shorter in sizes
        for longer in sizes
        if study.untrained(shorter) == study.untrained(longer)
        and all(
            study.training(shorter)[name] == study.training(longer)[name]
            for name in ("fine_tuning", "labels")
        )
        and study.sequences_seen(shorter) < study.sequences_seen(longer)
    ]


def change(study: Study, measure: str, of: str, size: str) -> SeedMean | None:
    """Return the change of a measure of the students of a size from tau 1 to another label."""
    return mean_of(study, Term(measure=measure, of=of, against="1"), size)


def _difference(study: Study, measure: str, of: str, sizes: tuple[str, str]) -> SeedMean | None:
    """Return the change of the second of two sizes less that of the first, seed by seed."""
    first, second = (Term(measure=measure, of=of, against="1", size=size) for size in sizes)
    return mean_of(study, replace(second, minus=first), "")


def _shrinks(study: Study, sizes: Sequence[str], measure: str, tau: str) -> list[Verdict]:
    """Compare the changes of the smallest and the largest of some sizes."""
    ends = (sizes[0], sizes[-1])
    if study.parameters(ends[0]) == study.parameters(ends[1]):
        return []
    at_smallest, at_largest = (change(study, measure, tau, size) for size in ends)
    difference = _difference(study, measure, tau, ends)
    if at_smallest is None or at_largest is None or difference is None:
        return []
    direction = DIRECTIONS[measure]
    there = decide([at_smallest], direction)
    unsure = "" if there == "holds" else f"No {CHANGES[measure]} is established at {ends[0]}. "
    return [
        Verdict(
            name=f"{measure}-over-sizes-{'-'.join(ends)}-{tau}",
            size="",
            claim=f"the {CHANGES[measure]} from tau 1 to {tau} gets smaller from size {ends[0]} to "
            f"{ends[1]}",
            decision=all_of((there, decide([difference], -direction))),
            sentence=f"{unsure}From tau 1 to {tau}, {measure} changes by {text(at_smallest)} at "
            f"{ends[0]} and by {text(at_largest)} at {ends[1]}; the second less the first is "
            f"{text(difference)}",
            means={ends[0]: at_smallest, ends[1]: at_largest, "difference": difference},
        )
    ]


def _is_the_teachers(study: Study, sizes: Sequence[str], measure: str, tau: str) -> list[Verdict]:
    """Compare the change of the students of the largest size with that of their teachers."""
    size = sizes[-1]
    own = students_of(study, measure, tau, "1", size)
    theirs = teachers(study, measure, tau, "1")
    seeds = [seed for seed in own if seed in theirs]
    if not seeds:
        return []
    means = {
        "students": over_seeds([own[seed] for seed in seeds]),
        "teachers": over_seeds([theirs[seed] for seed in seeds]),
        "difference": over_seeds([own[seed] - theirs[seed] for seed in seeds]),
    }
    shares = (1.0 - MARGIN_SHARE, 1.0 + MARGIN_SHARE)
    bounds = {
        f"less {share:g} times": over_seeds([own[seed] - share * theirs[seed] for seed in seeds])
        for share in shares
    }
    least, most = bounds.values()
    direction = 1 if means["teachers"].estimate > 0.0 else -1
    tests = " and ".join(f"{name} the teacher's {text(mean)}" for name, mean in bounds.items())
    return [
        Verdict(
            name=f"{measure}-is-the-teachers-{tau}",
            size=size,
            claim=f"the change of {measure} from tau 1 to {tau} is the teacher's own, within "
            f"{MARGIN_SHARE:.0%} of it",
            decision=all_of((decide([least], direction), decide([most], -direction))),
            sentence=f"From tau 1 to {tau}, {measure} changes by {text(means['students'])} in "
            f"students and by {text(means['teachers'])} in their teachers; the first less the "
            f"second is {text(means['difference'])}, {tests}",
            means=means | bounds,
        )
    ]


def _more_training(study: Study, pair: tuple[str, str], measure: str, of: str) -> list[Verdict]:
    """Compare a change against tau 1 after a shorter and after a longer training.

    Args:
        study: the run.
        pair: the size of the shorter and that of the longer training.
        measure: what changes.
        of: label of the student that is compared with that of tau 1.
    """
    changes = {size: change(study, measure, of, size) for size in pair}
    known = {size: mean for size, mean in changes.items() if mean is not None}
    difference = _difference(study, measure, of, pair)
    if len(known) < 2 or difference is None:
        return []
    shorter, longer = pair
    what = what_changes(measure, of)
    names = {size: name for name, sizes in trainings(study).items() for size in sizes}
    words = {"holds": "above 0", "fails": "below 0"}
    said = " and ".join(
        f"{text(mean)} ({words.get(decide([mean], 1), 'undecided')}) at {size} ({names[size]})"
        for size, mean in known.items()
    )
    return [
        Verdict(
            name=f"{measure}-{of}-after-training-{shorter}-{longer}",
            size="",
            claim=f"{what} is larger at size {longer}, which is trained for longer, than at "
            f"{shorter}",
            decision=decide([difference], 1),
            sentence=f"{capitalised(what)} is {said}; the second less the first is "
            f"{text(difference)}",
            means=known | {"difference": difference},
        )
    ]


def what_changes(measure: str, of: str) -> str:
    """Return the name of a change against tau 1, such as `recall of direct less that of tau 1`."""
    name = "KL(p''||p*)" if measure == "divergence" else measure
    return f"{name} of {of if of == 'direct' else f'tau {of}'} less that of tau 1"
