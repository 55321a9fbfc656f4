#!/usr/bin/env python
"""Make tables and figures of a finished mixture run, as defined and as published.

    python analysis/mixture.py RUN [--setting NAME] [--out FOLDER]

RUN is a run's name or folder, or a file of results. Files are written next to the results, or to
FOLDER; the names of those of partial results begin with partial-. Tables (CSV):
    students   every quantity of every arm, mean and 95 % interval over seeds
    terms      the parts of J in one setting, if its students have one component
    effects    for each setting, the change from the smallest to the largest beta, paired by seed
    control    narrowed students beside distilled ones in one setting, if there are any
Figures (PNG and PDF) of one setting:
    panels             how sharpening changes teacher and student, for one seed in two dimensions
    against_beta       precision and recall against beta
    precision_recall   the curve that beta traces, and that of the narrowed direct student
    modes              modes that the teacher emphasises and modes that the student covers
    terms              terms of the bound J that a student of one component may ignore
Figures of all settings, if there are several:
    effect_size        the trade-off against |D| and K''
    effect_settings    the trade-off in every setting
Intervals are 95 % by Student's t over seeds.
"""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import files
import mixture_figures
import numpy as np
from mixture_arms import (
    AS_PUBLISHED,
    DEFINED,
    PUBLISHED,
    Arms,
    Control,
    Effect,
    controls,
    effects,
    is_paper,
    mean_of,
    settings,
)
from rich.console import Console
from rich.table import Table

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.pipeline import MIXTURE
from kdhpc.storage.results import Results


def student_rows(results: Results) -> Iterator[dict[str, Any]]:
    """Yield one row for every quantity of every arm; boolean arrays are counted."""
    for name, facts in results.models.items():
        if facts["arm"] == "teachers":
            continue
        for quantity, array in results.tables[name].items():
            if array.dtype == bool:
                values = array.sum(axis=1)
            elif array.ndim == 1:
                values = array
            else:
                continue
            yield {
                "setting": facts["setting"],
                "arm": facts["arm"],
                "quantity": quantity,
                **asdict(mean_of(values)),
                "deviation": _deviation(values),
                "seeds": len(values),
            }


def _deviation(values: Any) -> float:
    """Return the standard deviation over seeds; NaN for a single seed."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def term_rows(arms: Arms) -> Iterator[dict[str, Any]]:
    """Yield the parts of J by beta and rank of the teacher's component; rank 1 weighs most."""
    for beta in arms.betas:
        for quantity, array in arms.terms(beta).items():
            for rank, values in enumerate(array.T, start=1):
                yield {"beta": beta, "rank": rank, "quantity": quantity, **asdict(mean_of(values))}


def published_table(arms: Arms) -> Table:
    """Compare metrics as defined, as published and as the paper prints them.

    The rows are the direct student and the student of the largest beta.
    """
    beta = arms.betas[-1]
    comparison = Table(
        title=f"{arms.setting}: nats per point, mean [95 % interval over seeds]; beta = {beta:g}",
        title_justify="left",
        box=None,
    )
    for name in ("", "student", DEFINED, AS_PUBLISHED, "the paper's"):
        comparison.add_column(name)
    direct, distilled = arms.table("direct"), arms.table(beta)
    columns = {
        ("precision", "direct"): (
            direct["precision_as_defined"],
            distilled["direct_precision_as_published"],
        ),
        ("precision", "distilled"): (
            distilled["precision_as_defined"],
            distilled["precision_as_published"],
        ),
        ("recall", "direct"): (direct["recall_as_defined"], direct["recall_as_published"]),
        ("recall", "distilled"): (distilled["recall_as_defined"], distilled["recall_as_published"]),
    }
    for (metric, student), arrays in columns.items():
        printed = PUBLISHED[student][metric == "recall"] if is_paper(arms) else math.nan
        texts = [str(mean_of(array)) for array in arrays]
        comparison.add_row(metric, student, *texts, "" if math.isnan(printed) else f"{printed:.2f}")
    return comparison


def curve_table(arms: Arms) -> Table:
    """Tabulate precision, recall and the quantities that explain them against beta."""
    curve = Table(title="mean +- standard deviation over seeds", title_justify="left", box=None)
    columns = {
        "H(alpha')": "weight_entropy_nats",
        "precision": "precision_as_defined",
        "recall": "recall_as_defined",
        "KL(p''||p*)": "kl_student_truth_nats",
        "KL(p*||p'')": "kl_truth_student_nats",
        "H(p'')": "student_entropy_nats",
        "difficulty": "difficulty",
    }
    curve.add_column("beta")
    for name in (*columns, "modes covered"):
        curve.add_column(name, justify="right")
    for arm in ("direct", *arms.betas):
        table = arms.table(arm)
        arrays = [table.get(name) for name in columns.values()]
        arrays.append(table["covered_modes"].sum(axis=1))
        texts = ["" if a is None else f"{a.mean():.3f} +- {_deviation(a):.2f}" for a in arrays]
        curve.add_row(arm if isinstance(arm, str) else f"{arm:g}", *texts)
    return curve


def control_table(setting: str, compared: list[Control]) -> Table:
    """Tabulate the recall and the precision of narrowed students less those of distilled ones.

    Where some seeds are outside, no mean is taken of the others.
    """
    title = f"{setting}: narrowed less distilled, nats per point, mean [95 % interval over seeds]"
    comparison = Table(title=title, title_justify="left", box=None)
    names = ("narrowed", "beta", "recall at equal precision", "seeds outside", "highest precision")
    for name in names:
        comparison.add_column(name)
    for control in compared:
        outside = control.num_outside
        comparison.add_row(
            "direct" if control.base == "direct" else "beta = 1",
            f"{control.beta:g}",
            "" if outside else str(mean_of(control.kept)),
            f"{outside} of {len(control.kept)}",
            str(mean_of(control.lead)),
        )
    return comparison


def effect_table(all_effects: list[Effect]) -> Table:
    """Tabulate what beta changes in every setting, and whether the trade-off is absent."""
    low, high = all_effects[0].arms.betas[0], all_effects[0].arms.betas[-1]
    title = f"beta = {high:g} against {low:g}, nats per point, mean [95 % interval over seeds]"
    changes = Table(title=title, title_justify="left", box=None)
    for name in ("setting", "seeds", "precision", "(median)", "recall", "trade-off"):
        changes.add_column(name)
    for effect in all_effects:
        changes.add_row(
            effect.arms.setting,
            str(len(effect.arms.table("direct")["precision_as_defined"])),
            str(effect.precision),
            f"{effect.median_precision:.2f}",
            str(effect.recall),
            "absent" if effect.absent else "",
        )
    return changes


def main(arguments: list[str]) -> int:
    """Read results.h5, print and save tables, and draw figures."""
    parser = files.parser(__doc__)
    parser.add_argument("--setting", help="setting of the figures (default: the paper's)")
    options = parser.parse_args(arguments)
    analysis = files.read(options, MIXTURE)
    results = analysis.results
    names = settings(results)
    if options.setting not in {None, *names}:
        raise InputError(f"--setting {options.setting}: expected one of {', '.join(names)}")
    arms, all_effects = Arms(results, options.setting or names[0]), effects(results)

    console = Console(width=None if sys.stdout.isatty() else 140)
    tables = [published_table(arms), curve_table(arms), effect_table(all_effects)]
    compared = list(controls(arms))
    if compared:
        tables.insert(2, control_table(arms.setting, compared))
    for table in tables:
        console.print(analysis.titled(table))
    seconds = float(json.loads(results.provenance["seconds"]))
    print(f"measured cost: {seconds:.0f} core-seconds")

    print(analysis.path)
    print(analysis.save_csv(list(student_rows(results)), "students"))
    print(analysis.save_csv([effect.row for effect in all_effects], "effects"))
    if compared:
        print(analysis.save_csv([control.row for control in compared], "control"))
    figures = {
        "against_beta": mixture_figures.against_beta(arms),
        "precision_recall": mixture_figures.precision_recall(arms),
        "modes": mixture_figures.modes(arms),
    }
    if arms.facts["dimension"] == 2:
        figures["panels"] = mixture_figures.panels(arms)
    if arms.facts["student_components"] == 1:
        figures["terms"] = mixture_figures.terms(arms)
        print(analysis.save_csv(list(term_rows(arms)), "terms"))
    if len(all_effects) > 1:
        figures["effect_size"] = mixture_figures.effect_size(all_effects)
        figures["effect_settings"] = mixture_figures.effect_settings(all_effects)
    for name, figure in figures.items():
        for written in analysis.save_figure(figure, name):
            print(written)
    return 0


if __name__ == "__main__":
    command(main)
