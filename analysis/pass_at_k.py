#!/usr/bin/env python
"""Say how good the best of k answers is, of every student and every temperature.

    python analysis/pass_at_k.py RUN [--k 1 4 16 64] [--out FOLDER]

RUN is a run's name or folder, or a file of results, of a run whose prompts have answers, such as
`prompts: addition`, or references, such as `prompts: docstrings`. pass@k is the probability that
one of k answers is right, and rouge@k the ROUGE-L of the best of k texts; both are unbiased
estimates of each prompt, averaged over prompts. The file that is saved has 95 % intervals, over
prompts and seeds. A k of 1 says how good one answer is; a large k says what a model can still find
when it is asked often.

For each tau it is said whether the curves cross: whether pass@1 (or rouge@1) is higher than that of
the direct student and that of the largest k lower; and the same of the teacher at that tau, against
itself at tau 1.
"""

import itertools
import sys
from collections.abc import Sequence

import files
from report_rows import Figure, student_name
from report_text import value_text
from rich.console import Console
from rich.table import Table
from study import BEST_ARRAYS, SELF, TRUTH, Study
from verdicts import Verdict, capitalised, decide, text

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.experiment.arms import at_temperature
from kdhpc.experiment.claims import TEACHER
from kdhpc.pipeline import LANGUAGE
from kdhpc.science.intervals import SeedMean, over_seeds

KS = (1, 2, 4, 8, 16, 32, 64)
TITLES = {"pass": "right answers", "rouge": "ROUGE-L of the best text"}
Row = dict[str, str | float]


def main(arguments: list[str]) -> int:
    """Read results.h5, print a table and verdicts for each size, and save the table."""
    parser = files.parser(__doc__)
    parser.add_argument(
        "--k", type=int, nargs="+", help="numbers of answers (default: powers of 2)"
    )
    options = parser.parse_args(arguments)
    analysis = files.read(options, LANGUAGE)
    study = Study(analysis.results)
    kinds = [kind for kind in BEST_ARRAYS if study.students and study.has_best(kind)]
    if not kinds:
        raise InputError(
            f"{analysis.path}: its prompts have no answers; expected a run with prompts=addition, "
            "or a file of prompts with `answer`, or with `reference`, in each line"
        )
    most = study.answers_per_prompt
    if not most:
        raise InputError(
            f"{analysis.path}: has fewer sequences than prompts; expected a larger "
            "sampling.eval_sequences"
        )
    ks = options.k or up_to(study)
    if not ks or not 1 <= min(ks) <= max(ks) <= most:
        raise InputError(
            f"--k {' '.join(map(str, ks))}: expected numbers from 1 to {most}, the answers that "
            "there are of each prompt (sampling.eval_sequences)"
        )
    console = Console(width=None if sys.stdout.isatty() else 100)
    saved: list[Row] = []
    for kind, size in itertools.product(kinds, study.sizes):
        rows = table_rows(study, size, ks, kind)
        console.print(analysis.titled(table(rows, size, ks, kind)))
        for verdict in crossings(study, size, ks, kind):
            console.print(f"{verdict.decision}: {verdict.claim}. {verdict.sentence}")
        saved += [{"size": size, "measure": kind, **row} for row in rows]
    print(analysis.save_csv(saved, "pass_at_k"))
    return 0


def of_label(
    study: Study, size: str, label: str, k: int, kind: str, temperature: float = 1.0
) -> SeedMean | None:
    """Return the best of k of the students of a label at a temperature; None without samples."""
    names = [at_temperature(s.name, temperature) for s in study.of(size, label).values()]
    if not all((name, SELF) in study.scores for name in names):
        return None
    return over_seeds([study.best_of(name, k, kind) for name in names])


def table_rows(study: Study, size: str, ks: Sequence[int], kind: str) -> list[Row]:
    """Return rows for truth, teachers at each tau, and students of each label at each temperature.

    A student's label is that of the tau of its teacher; its own temperature is in column T.
    """
    rows: list[Row] = []
    own = study.scores.get((TRUTH, SELF))
    if own is not None and BEST_ARRAYS[kind] in own.arrays():
        truth = {k: over_seeds([study.best_of(TRUTH, k, kind)]) for k in ks}
        rows.append(_row(TRUTH, 1.0, truth, kind))
    for tau, names in teachers(study, size, kind).items():
        taught = {k: over_seeds([study.best_of(name, k, kind) for name in names]) for k in ks}
        rows.append(_row(f"teacher at tau {tau}", 1.0, taught, kind))
    for label in study.labels(size):
        student = next(iter(study.of(size, label).values()))
        for temperature in sorted({1.0, *study.temperatures(student)}, reverse=True):
            means = {k: of_label(study, size, label, k, kind, temperature) for k in ks}
            known = {k: mean for k, mean in means.items() if mean is not None}
            rows.append(_row(label, temperature, known, kind))
    return rows


def teachers(study: Study, size: str, kind: str) -> dict[str, list[str]]:
    """Return the names of the teachers of all seeds at each tau, as samplers, if all are known."""
    seeds = sorted({student.seed for student in study.students})
    found = {}
    for tau in study.taus(size):
        names = [f"{TEACHER}-s{seed}-tau{tau}" for seed in seeds]
        own = [study.scores.get((name, SELF)) for name in names]
        if all(scores is not None and BEST_ARRAYS[kind] in scores.arrays() for scores in own):
            found[tau] = names
    return found


def _row(label: str, temperature: float, means: dict[int, SeedMean], kind: str) -> Row:
    row: Row = {"student": label, "T": temperature}
    for k, mean in means.items():
        name = f"{kind}@{k}"
        row |= {name: mean.estimate, f"{name}_low": mean.low, f"{name}_high": mean.high}
    return row


def table(rows: Sequence[Row], size: str, ks: Sequence[int], kind: str) -> Table:
    """Make a table for people."""
    printed = Table(title=f"{TITLES[kind]}: {size}", title_justify="left", box=None)
    for name in ("student", "T", *(f"{kind}@{k}" for k in ks)):
        printed.add_column(name, justify="left" if name == "student" else "right")
    for row in rows:
        cells = [f"{row[f'{kind}@{k}']:.3f}" if f"{kind}@{k}" in row else "" for k in ks]
        printed.add_row(str(row["student"]), f"{row['T']:g}", *cells)
    return printed


def figure(study: Study, size: str, kind: str) -> Figure:
    """Return the best of k by k, of teachers at each tau and of students at temperature 1."""
    names = [f"{kind}@{k}" for k in up_to(study)]
    rows = [
        {
            "student": student_name(str(of["student"])),
            "k": int(name.partition("@")[2]),
            "estimate": of[name],
            "low": of[f"{name}_low"],
            "high": of[f"{name}_high"],
        }
        for of in table_rows(study, size, up_to(study), kind)
        for name in names
        if of["T"] == 1.0 and of["student"] != TRUTH
    ]
    return Figure(
        name="best-of",
        title=f"{capitalised(TITLES[kind])}, by the number of texts",
        reading=f"{kind}@k of teachers at each tau, and of students, which are sampled at T = 1. "
        "If selectivity trades recall for precision, a lower tau is above the others at k = 1 and "
        "below them at a large k.",
        needs="prompts with answers or references",
        rows=rows,
    )


def up_to(study: Study) -> list[int]:
    """Return the numbers of texts that a run has enough of."""
    return [k for k in KS if k <= study.answers_per_prompt]


def crossings(study: Study, size: str, ks: Sequence[int], kind: str) -> list[Verdict]:
    """Say of each tau whether it gains at one answer and loses at many.

    Students are compared with direct, and teachers at a tau with themselves at tau 1.
    """
    made = []
    if len({*ks}) < 2:
        return []
    least, most = min(ks), max(ks)
    of_teachers = teachers(study, size, kind)
    for tau in of_teachers if "1" in of_teachers else ():
        if tau == "1":
            continue
        higher = _differences(study, of_teachers[tau], of_teachers["1"], least, kind)
        lower = _differences(study, of_teachers["1"], of_teachers[tau], most, kind)
        what = f"the teacher at tau {tau} and at tau 1"
        made.append(
            _crossing(f"teacher-{tau}", size, what, tau, kind, {least: higher, most: lower})
        )
    for tau in study.taus(size):
        gain = study.contrast(size, tau, "direct", lambda s: study.best_of(s.name, least, kind))
        loss = study.contrast(size, "direct", tau, lambda s: study.best_of(s.name, most, kind))
        if gain is None or loss is None:
            continue
        what = f"tau {tau} and of direct"
        made.append(_crossing(tau, size, what, tau, kind, {least: gain, most: loss}))
    return made


def _differences(
    study: Study, ours: Sequence[str], theirs: Sequence[str], k: int, kind: str
) -> SeedMean:
    """Return the mean over seeds of the best of k of some samplers less that of others."""
    pairs = zip(ours, theirs, strict=True)
    return over_seeds(
        [study.best_of(one, k, kind) - study.best_of(other, k, kind) for one, other in pairs]
    )


def _crossing(
    name: str, size: str, what: str, tau: str, kind: str, means: dict[int, SeedMean]
) -> Verdict:
    """Say whether two curves cross.

    Args:
        name: end of the verdict's name.
        size: size of the students.
        what: what the curves are of.
        tau: tau whose curve should be the higher one at the smallest k.
        kind: `pass` or `rouge`.
        means: what it is higher by at the smallest k, then lower by at the largest.
    """
    (least, gain), (most, loss) = means.items()
    return Verdict(
        name=f"{kind}-curves-cross-{name}",
        size=size,
        claim=f"the curves of {what} cross: {kind}@{least} is higher at tau {tau}, and "
        f"{kind}@{most} is lower",
        decision=decide([gain, loss], 1),
        sentence=f"{kind}@{least} differs by {text(gain)} and {kind}@{most} by "
        f"{value_text(-loss.estimate, -loss.high, -loss.low, sign=True)}",
        means={f"{kind}@{least}": gain, f"{kind}@{most}": loss},
    )


if __name__ == "__main__":
    command(main)
