#!/usr/bin/env python
"""Say which modes students drop, where p* is a mixture of models (`truth.components`).

    python analysis/modes.py RUN|FOLDER [--out FOLDER]
    python analysis/modes.py --gaussians RUN [--out FOLDER]

RUN is a run's name or folder, or a file of results; FOLDER has scores of several runs with other
weights of the same components, as `analysis/claims.py` reads it. The second form counts the modes
of a run of the mixture simulation in the same way, and saves them as gaussians.csv.

A sequence belongs to the modes that it is likely under (their responsibilities). It is *unassigned*
if it is less likely, per token, than 99 % of the texts of its best mode are under that mode. The
mass of a mode is its part of what is assigned; a mode is kept if it has at least half of its weight
in p*. How log(mass / weight) depends on the entropy of a mode, on that of its first four tokens,
and on its weight is one regression with a constant for each seed. The units are the modes, however
many seeds there are, so intervals are by permutation of the modes.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import claims
import files
import mixture_arms
import numpy as np
from mode_terms import Floats, assigned, components, regression, seeds
from report_rows import Figure, Row, interval
from rich.console import Console
from rich.table import Table
from study import Study
from verdicts import text

from kdhpc.cluster.display import command
from kdhpc.experiment.claims import TEACHER
from kdhpc.pipeline import LANGUAGE, MIXTURE
from kdhpc.science import gaussian, modes
from kdhpc.science.intervals import SeedMean, Statistic, over_seeds

KEPT = 0.5
"""Part of its weight in p* that a mode must have to be kept."""
EMPHASISED = 0.95
"""Part of the mass of a teacher that its emphasised modes have together, as in the mixture."""
NUM_POINTS = 4000
"""Number of points that are drawn of each student of Gaussians."""
NUM_GAUSSIANS = 8
"""Number of modes of p* in the paper's setting of the simulation."""
GAUSSIANS = "gaussians.csv"


def arms(study: Study, size: str) -> list[tuple[str, str]]:
    """Return label and size of every arm: those of the teacher, then those of the students."""
    labels = study.labels(size)
    taught = [label for label in labels if label != "direct"]
    return [(label, TEACHER) for label in taught if seeds(study, label, TEACHER)] + [
        (label, size) for label in labels
    ]


def over(values: Sequence[float]) -> SeedMean:
    """Return the mean of numbers over seeds, whose sampling error is in their spread."""
    none = {f"seed{place}": np.zeros(2) for place, _ in enumerate(values)}
    return over_seeds(
        [
            Statistic(value=float(value), influence={name: zeros})
            for value, (name, zeros) in zip(values, none.items(), strict=True)
        ]
    )


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What the teacher or the students of a label keep of the modes, as means over seeds."""

    name: str
    """The teacher or student, and what it is or learnt from."""
    label: str
    is_teacher: bool
    kept: SeedMean
    """Number of modes with at least `KEPT` of their weight."""
    emphasised: SeedMean
    """Number of modes that have `EMPHASISED` of its mass together."""
    unassigned: SeedMean
    """Share of its sequences that belong to no mode."""
    log_mass: tuple[SeedMean, ...]
    """log(mass / weight) of each mode."""

    @property
    def row(self) -> Row:
        row: Row = {"arm": self.name}
        for name in ("kept", "emphasised", "unassigned"):
            row |= _row_of(getattr(self, name), name)
        return row


def _row_of(mean: SeedMean, name: str) -> Row:
    """Return a mean and its interval as columns; of one seed there is no interval over seeds."""
    return interval(mean, name) if mean.num_seeds > 1 else {name: mean.estimate}


def arms_of(study: Study, size: str) -> Iterator[Arm]:
    """Yield what the teacher of each label and the students of a size keep of the modes."""
    known = components(study)
    for label, of in arms(study, size):
        every = seeds(study, label, of)
        shares = [assigned(study, label, of, seed) for seed in every]
        weights = np.array([known.weights[seed] for seed in every])
        log_mass = np.array([modes.log_mass(*both) for both in zip(shares, weights, strict=True)])
        masses = np.array([modes.masses(share) for share in shares])
        yield Arm(
            name=f"{of if of == TEACHER else f'student {of}'}, {label_text(label)}",
            label=label,
            is_teacher=of == TEACHER,
            kept=over((masses >= KEPT * weights).sum(axis=1).tolist()),
            emphasised=over([_emphasised(mass) for mass in masses]),
            unassigned=over([1.0 - float(share.sum(axis=1).mean()) for share in shares]),
            log_mass=tuple(over(column.tolist()) for column in log_mass.T),
        )


def _emphasised(mass: Floats) -> int:
    """Return the smallest number of modes that have `EMPHASISED` of the mass together."""
    return int(np.searchsorted(np.sort(mass)[::-1].cumsum(), EMPHASISED * mass.sum()) + 1)


def main(arguments: list[str]) -> int:
    """Read results, print tables, and save them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="a run's name or folder, a file, or a folder with claims.yaml")
    parser.add_argument("--gaussians", action="store_true", help="of a run of the mixture")
    parser.add_argument("--out", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.gaussians:
        analysis = files.read(options, MIXTURE)
        print(_save(analysis.out / GAUSSIANS, gaussian_rows(analysis)))
        return 0
    analysis = claims.read_pooled(options) or files.read(options, LANGUAGE)
    study = Study(analysis.results)
    components(study)  # says what is missing
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(_modes_table(study))
    saved: list[Row] = []
    names = components(study).names
    for size in study.sizes:
        console.print(_arms_table(study, size))
        if (slopes := _slopes_table(study, size)).row_count:
            console.print(slopes)
        else:
            console.print("properties of so few modes, or with one seed, cannot be told apart")
        for arm in arms_of(study, size):
            line = {"size": size, **arm.row}
            for name, mass in zip(names, arm.log_mass, strict=True):
                line |= _row_of(mass, f"log_mass_{name}")
            saved.append(line)
    print(_save(analysis.out / "modes.csv", saved))
    return 0


def _save(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def figure(study: Study, gaussians: Path) -> Figure:
    """Return the share of the modes that are kept, of Gaussians and of language.

    Args:
        study: the run.
        gaussians: file that `--gaussians` has written.
    """
    with gaussians.open() as file:
        of_gaussians = [*csv.DictReader(file)]
    rows: list[Row] = [
        {
            "series": f"Gaussians: {name}, by beta",
            "sharpness": float(line["beta"]),
            "estimate": float(line[name]) / NUM_GAUSSIANS,
            "low": max(0.0, float(line[f"{name}_low"]) / NUM_GAUSSIANS),
            "high": min(1.0, float(line[f"{name}_high"]) / NUM_GAUSSIANS),
        }
        for name in ("teacher", "student")
        for line in of_gaussians
    ]
    size, number = study.sizes[0], len(components(study).names)
    for arm in arms_of(study, size):
        if not arm.label.startswith("beta") and not arm.label[0].isdigit():
            continue
        is_beta, who = arm.label.startswith("beta"), "teacher" if arm.is_teacher else "student"
        what = "weights" if is_beta and arm.is_teacher else who
        rows.append(
            {
                "series": f"language: {what}, by {'beta' if is_beta else 'tau'}",
                "sharpness": float(arm.label[4:]) if is_beta else 1.0 / float(arm.label),
                "estimate": arm.kept.estimate / number,
                "low": max(0.0, arm.kept.low / number),
                "high": min(1.0, arm.kept.high / number),
            }
        )
    rows.sort(key=lambda row: (str(row["series"]), float(row["sharpness"])))
    return Figure(
        name="modes",
        title="Modes of p* that are kept",
        reading="A mode is kept if it has at least half of its weight in p*, among the texts or "
        "points that belong to a mode at all. Gaussians: the simulation of the paper's section 3, "
        "whose weights are sharpened by beta; language: a mixture of models, whose teacher is "
        "sampled at tau, or whose weights alone are sharpened by beta. Bars are 95 % intervals "
        "over seeds.",
        needs="truth.components",
        rows=rows,
    )


def mode_lines(study: Study) -> Iterator[tuple[str, ...]]:
    """Yield name, weights, both entropies, and the share of its own texts of each mode."""
    known = components(study)
    for index, name in enumerate(known.names):
        weights = sorted({round(float(of[index]), 3) for of in known.weights.values()})
        yield (
            name,
            " ".join(f"{weight:g}" for weight in weights),
            f"{known.entropy[index]:.2f}",
            f"{known.first_entropy[index]:.2f}",
            f"{known.found[index]:.3f}",
        )


MODES_HEADER = (
    "mode", "weights in p*", "entropy", "entropy of the first four tokens",
    "own texts assigned to it",
)  # fmt: skip


def _modes_table(study: Study) -> Table:
    printed = Table(title="modes of p*, nats per token", title_justify="left", box=None)
    for name in MODES_HEADER:
        printed.add_column(name)
    for line in mode_lines(study):
        printed.add_row(*line)
    return printed


def arm_lines(study: Study, size: str) -> Iterator[tuple[str, ...]]:
    """Yield arm, modes kept and emphasised, share unassigned, and log(mass / weight) by mode."""
    for arm in arms_of(study, size):
        yield (
            arm.name,
            f"{arm.kept.estimate:.1f}"
            + (f" [{arm.kept.low:.1f}, {arm.kept.high:.1f}]" if arm.kept.num_seeds > 1 else ""),
            f"{arm.emphasised.estimate:.1f}",
            f"{arm.unassigned.estimate:.2f}",
            *(f"{mass.estimate:+.2f}" for mass in arm.log_mass),
        )


def label_text(label: str) -> str:
    """Return what a label is called: `direct`, `tau 0.8`, `beta 2`."""
    return f"tau {label}" if label[:1].isdigit() else label.replace("beta", "beta ")


def arms_header(study: Study) -> tuple[str, ...]:
    """Return the header of `arm_lines`."""
    return ("of", "modes kept", "emphasised", "unassigned", *components(study).names)


def _arms_table(study: Study, size: str) -> Table:
    title = f"size {size}: log(mass / weight in p*) of each mode, means over seeds"
    printed = Table(title=title, title_justify="left", box=None)
    for name in arms_header(study):
        printed.add_column(name)
    for line in arm_lines(study, size):
        printed.add_row(*line)
    return printed


SLOPES_HEADER = ("of", "against", "entropy", "entropy of the first four", "log weight")


def slope_lines(study: Study, size: str) -> Iterator[tuple[str, ...]]:
    """Yield the coefficients of each arm, against p* and against tau 1 or direct."""
    for label, of in arms(study, size):
        base = "direct" if label.startswith("beta") else "1"
        bases = [None, base] if label not in (base, "direct") else [None]
        for against in bases:
            if found := regression(study, label, against, of):
                yield (
                    f"{of if of == TEACHER else f'student {of}'}, {label_text(label)}",
                    "p*" if against is None else label_text(against),
                    *(f"{text(slope)}, p {slope.p_value():.3f}" for slope in found),
                )


def _slopes_table(study: Study, size: str) -> Table:
    title = f"size {size}: log mass by the properties of modes, intervals by permutation"
    printed = Table(title=title, title_justify="left", box=None)
    for name in SLOPES_HEADER:
        printed.add_column(name)
    for line in slope_lines(study, size):
        printed.add_row(*line)
    return printed


def gaussian_rows(analysis: files.Analysis) -> list[Row]:
    """Count the modes that teachers and students of Gaussians keep, by beta, and the difficulty."""
    of_setting = mixture_arms.Arms(analysis.results, mixture_arms.settings(analysis.results)[0])
    rows: list[Row] = []
    for beta in of_setting.betas:
        table = of_setting.table(beta)
        num_seeds = len(table["precision_as_defined"])
        counts = [_gaussian_modes(of_setting, beta, row) for row in range(num_seeds)]
        row: Row = {"beta": beta, "seeds": num_seeds}
        for name, values in zip(("teacher", "student"), zip(*counts, strict=True), strict=True):
            row |= interval(over(values), name)
        rows.append(row | interval(over(table["difficulty"].tolist()), "difficulty"))
    return rows


def _gaussian_modes(of_setting: mixture_arms.Arms, beta: float, row: int) -> tuple[int, int]:
    """Return how many modes of p* a sharpened teacher and its student keep."""
    truth = of_setting.mixture("teachers", "truth", row)
    teacher = gaussian.sharpen(of_setting.mixture("teachers", "teacher", row), beta)
    counts = []
    own = gaussian.draw_evenly(
        truth, NUM_POINTS // truth.num_components * truth.num_components, seed=row, stream="own"
    )
    component = np.repeat(np.arange(truth.num_components), len(own) // truth.num_components)
    ones = np.ones(len(own), dtype=np.int64)
    least = modes.floors(gaussian.component_log_prob(truth, own), ones, component)
    for name, mixture in (
        ("teacher", teacher),
        ("student", of_setting.mixture(beta, "student", row)),
    ):
        points = gaussian.draw(mixture, NUM_POINTS, seed=row, stream=f"{name}/beta{beta:g}")
        shares = modes.assigned(
            gaussian.component_log_prob(truth, points),
            np.ones(len(points), dtype=np.int64),
            truth.weights,
            least,
        )
        counts.append(int((modes.masses(shares) >= KEPT * truth.weights).sum()))
    return counts[0], counts[1]


if __name__ == "__main__":
    command(main)
