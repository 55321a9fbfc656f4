#!/usr/bin/env python
"""Say how varied the samples of a finished run's students are, and at which tau they collapse.

    python analysis/diversity.py RUN [--out FOLDER] [--self-bleu]

An appendix to precision and recall, from the evaluation sets in the run folder. Writes
diversity.csv next to the results, or to FOLDER. Columns:

    repeated      share of sequences in which a 4-gram occurs twice, with its 95 % interval
    missing mass  Good-Turing estimate of the probability of a 4-gram that was not seen yet
    distinct      share of different 4-grams among all 4-grams
    compression   bytes of the texts, divided by their bytes after compression
    self-BLEU     likeness of 200 texts of the first seed (--self-bleu: takes seconds a row)

All but the first depend on the number of sequences, which is the same in every row. The row *truth
again* has other samples of the truth, from D, and calibrates the rest. A tau has collapsed if the
share of repeated 4-grams exceeds truth's by 0.05, or less than half of truth's missing mass is
left; both bounds were fixed before any run. Lengths are matched: in the table, the n-th longest
sequence of every set is cut to the shortest of them; to say what has collapsed, that of a student
and that of truth. Sets of which a shard is missing in the run folder are left out.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import files
import numpy as np
from numpy.typing import NDArray
from report_run import RunFacts, read_facts
from rich.console import Console
from rich.table import Table
from study import SELF, TRUTH, Study
from verdicts import Decision, Verdict, text

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.experiment import arms
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.pipeline import LANGUAGE
from kdhpc.science import diversity
from kdhpc.science.intervals import Statistic, over_seeds, ratio
from kdhpc.storage.token_shards import Samples, read_samples

TRUTH_AGAIN = "truth again"
COLUMNS = ("student", "repeated", "interval", "missing mass", "distinct", "compression")
ABOUT = (
    "Of 4-grams of tokens: the share of sequences in which one occurs twice, with its 95 % "
    "interval; the probability that the next one was not seen yet (Good-Turing); the share of "
    "different ones; lengths of all rows are matched by rank. Compression is bytes before and "
    "after zlib. The two rows of truth differ by sampling only, "
    "and by prompts where these are held out; prompts count as text."
)
Row = dict[str, str | float]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Sequences of one sampler."""

    samples: Samples
    rows: str
    """Name of the sequences, as in `study`."""

    @property
    def repeated(self) -> Statistic:
        repeats = diversity.has_repeat(self.samples.ids, self.samples.length)
        return ratio(repeats.astype(np.int64), rows=self.rows)

    @property
    def missing_mass(self) -> float:
        return diversity.missing_mass(self.samples.ids, self.samples.length)

    def texts(self, tokenizer: Tokenizer) -> list[str]:
        ends = zip(self.samples.ids, self.samples.length, strict=True)
        return [tokenizer.decode(ids[:length].tolist()) for ids, length in ends]


def sample_sets(study: Study, size: str, facts: RunFacts) -> dict[str, list[SampleSet]]:
    """Return the evaluation sets of truth and of the students of a size, by what they learnt from.

    Each has one set for each seed, with as many sequences as every other set. Those whose shards
    are not all in the run folder are left out.
    """
    names: dict[str, list[tuple[arms.ArmName, str]]] = {
        TRUTH: [(arms.TRUTH_EVAL, TRUTH)],
        TRUTH_AGAIN: [(arms.TRUTH_TRAIN, TRUTH_AGAIN)],
    }
    for label in study.labels(size):
        students = study.of(size, label).values()
        names[label] = [((arms.SAMPLE_STUDENTS, s.name), s.name) for s in students]
    # Of D no more is compared than truth's evaluation set has, and an archive has no more.
    most = sum(record.num_rows for record in facts.all_of(arms.TRUTH_EVAL)) or None
    sets = {
        label: [
            SampleSet(samples=samples, rows=rows)
            for arm, rows in of_seeds
            if (samples := _read(facts, arm, most) or _archived(study, rows)) is not None
        ]
        for label, of_seeds in names.items()
    }
    if not sets[TRUTH]:
        return {}
    num_rows = min(len(one.samples) for of_seeds in sets.values() for one in of_seeds)
    return {
        label: [replace(one, samples=one.samples[:num_rows]) for one in of_seeds]
        for label, of_seeds in sets.items()
        if of_seeds
    }


def matched(sets: Sequence[SampleSet]) -> list[SampleSet]:
    """Cut the n-th longest sequence of every set to the shortest of them."""
    shortest = np.min([np.sort(one.samples.length) for one in sets], axis=0)
    return [replace(one, samples=_cut(one.samples, shortest)) for one in sets]


def _cut(samples: Samples, lengths: NDArray[np.integer]) -> Samples:
    """Cut the n-th shortest sequence to the n-th of some lengths [N]."""
    length = samples.length.copy()
    length[np.argsort(length, kind="stable")] = lengths
    return replace(samples, length=length)


def _read(facts: RunFacts, arm: arms.ArmName, num_rows: int | None) -> Samples | None:
    """Read the sequences of an arm in order, at least the first rows; None if one is missing."""
    records = facts.all_of(arm, num_rows)
    return read_samples([record.data for record in records]) if records else None


def _archived(study: Study, sampler: str) -> Samples | None:
    """Return the sequences that an archive has kept; None if it has not."""
    own = study.scores.get((sampler, SELF))
    if own is None or own.ids is None or own.length is None:
        return None
    sums = own.log_prob_sum
    return Samples(ids=own.ids, length=own.length, log_prob_sum=sums, log_prob_tau_sum=sums)


def table_rows(sets: Mapping[str, Sequence[SampleSet]], tokenizer: Tokenizer) -> list[Row]:
    """Return a row for each kind of student, means over its seeds, at the same lengths."""
    rows: list[Row] = []
    cut = iter(matched([one for of_seeds in sets.values() for one in of_seeds]) if sets else ())
    for label, uncut in sets.items():
        of_seeds = [next(cut) for _ in uncut]
        repeated = over_seeds([one.repeated for one in of_seeds])
        texts = [one.texts(tokenizer) for one in of_seeds]
        rows.append(
            {
                "student": label,
                "seeds": len(of_seeds),
                "repeated": repeated.estimate,
                "repeated_low": repeated.low,
                "repeated_high": repeated.high,
                "missing_mass": _mean([one.missing_mass for one in of_seeds]),
                "distinct": _mean(
                    [diversity.distinct_share(s.samples.ids, s.samples.length) for s in of_seeds]
                ),
                "compression": _mean([diversity.compression_ratio(of_seed) for of_seed in texts]),
            }
        )
    return rows


def collapse(sets: Mapping[str, Sequence[SampleSet]], size: str) -> list[Verdict]:
    """Say of the direct student and of each tau whether its samples have collapsed.

    Each is compared with truth at its own lengths, so that no other student changes what is said.
    Without sets, nothing is said.
    """
    if not sets:
        return []
    [truth] = sets[TRUTH]
    made = []
    for label in (label for label in sets if label not in (TRUTH, TRUTH_AGAIN)):
        name = f"tau {label}" if label[0].isdigit() else label
        pairs = [matched([one, truth]) for one in sets[label]]
        if not all(own.missing_mass for _, own in pairs):
            continue  # too short, or too alike, for truth to have a 4-gram that occurs once
        excess = over_seeds([one.repeated - own.repeated for one, own in pairs])
        left = [one.missing_mass / own.missing_mass for one, own in pairs]
        decision: Decision = "undecided"
        if len(left) > 1:
            if excess.low > diversity.COLLAPSE_REPEATED or max(left) < diversity.COLLAPSE_MASS:
                decision = "fails"
            elif excess.high < diversity.COLLAPSE_REPEATED and min(left) > diversity.COLLAPSE_MASS:
                decision = "holds"
        made.append(
            Verdict(
                name=f"collapse-{label}",
                size=size,
                claim=f"samples of the student ({name}) have not collapsed: a repeated 4-gram is "
                f"in at most {diversity.COLLAPSE_REPEATED} more of them than of truth's, and a new "
                f"one at least {diversity.COLLAPSE_MASS} times as likely (fixed before any run)",
                decision=decision,
                sentence="The share of sequences with a repeated 4-gram differs from truth's by "
                f"{text(excess)}, and the next 4-gram is new with {_mean(left):.2f} times truth's "
                f"probability ({min(left):.2f} to {max(left):.2f} over seeds)",
                means={"excess of repeated": excess},
            )
        )
    return made


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def table(rows: Sequence[Row], size: str) -> Table:
    """Make a table for people."""
    printed = Table(title=f"diversity of samples: {size}", title_justify="left", box=None)
    with_bleu = "self_bleu" in rows[0]
    for name in (*COLUMNS, *(["self-BLEU"] if with_bleu else [])):
        printed.add_column(name, justify="left" if name == "student" else "right")
    for row in rows:
        printed.add_row(*cells(row), *([f"{row['self_bleu']:.1f}"] if with_bleu else []))
    return printed


def cells(row: Row) -> list[str]:
    """Return the numbers of a row as texts, in the order of `COLUMNS`."""
    return [
        str(row["student"]),
        f"{row['repeated']:.3f}",
        f"[{row['repeated_low']:.3f}, {row['repeated_high']:.3f}]",
        *(f"{row[name]:.3f}" for name in ("missing_mass", "distinct", "compression")),
    ]


def main(arguments: list[str]) -> int:
    """Read results.h5 and the run folder, print tables and verdicts, and save the table."""
    parser = files.parser(__doc__)
    parser.add_argument("--self-bleu", action="store_true", help="needs kdhpc[report]")
    options = parser.parse_args(arguments)
    analysis = files.read(options, LANGUAGE)
    study = Study(analysis.results)
    facts = read_facts(analysis.results, analysis.path)
    truth = facts.first_of(arms.TRUTH_MODEL)
    if truth is None or not (truth.data / "tokenizer.json").is_file() or not study.students:
        raise InputError(
            f"{analysis.path}: no samples beside it; expected the results inside their run folder"
        )
    tokenizer = Tokenizer(truth.data)
    console = Console(width=None if sys.stdout.isatty() else 100)
    saved: list[Row] = []
    for size in study.sizes:
        sets = sample_sets(study, size, facts)
        if not sets:
            raise InputError(
                f"{analysis.path}: truth's evaluation set is not whole in the run folder; expected "
                "all of its shards; type the run's launch/sweep.py command again"
            )
        rows = table_rows(sets, tokenizer)
        if options.self_bleu:
            for row, of_seeds in zip(rows, sets.values(), strict=True):
                row["self_bleu"] = diversity.self_bleu(of_seeds[0].texts(tokenizer))
        console.print(analysis.titled(table(rows, size)))
        for verdict in collapse(sets, size):
            console.print(
                f"{verdict.decision}: {verdict.claim}. {verdict.sentence}", soft_wrap=False
            )
        saved += [{"size": size, **row} for row in rows]
    print(analysis.save_csv(saved, "diversity"))
    return 0


if __name__ == "__main__":
    command(main)
