#!/usr/bin/env python
"""Write what was found into the pages of the experiments in docs.

    python analysis/experiment.py [temperature|capacity|convergence|real_data|reasoning|
        reasoning_larger|summarisation|post_training|objective|truncation|modes|downstream|
        teacher_training|teacher_margin|teacher_ahead|smollm2|
        crossover ...]

Each page has what was predicted, written by hand before the run was scored. Between two marks in it
this command writes tables, sentences and a figure, from the scores in the folder beside the page;
nothing else on the page changes. Figures need `pip install 'kdhpc[report]'`.
"""

import argparse
import csv
import functools
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import claims
import modes
import page_sections
import pass_at_k
import report_rows
import report_sizes
from report_rows import Figure
from study import Study

from kdhpc.cluster.display import command
from kdhpc.errors import InputError
from kdhpc.science.intervals import over_seeds

DOCS_DIR = Path(__file__).resolve().parents[1] / "docs"
START, END = "<!-- found: made by analysis/experiment.py -->", "<!-- end -->"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page is made of."""

    path: str
    """Its file in docs/."""
    folder: str
    """Folder in docs/ of its claims and scores."""
    figure: Callable[[Study], Figure]
    sections: Callable[[Study], Iterator[str]]
    """Yields tables and sentences below the claims."""
    numbers: bool = False
    """Whether the numbers of every student are saved beside the page, as CSV."""


def main(arguments: list[str]) -> int:
    """Write the pages that were named, or all that have scores."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("page", nargs="*", help="a page (default: all that have scores)")
    made = [n for n, page in PAGES.items() if [*(DOCS_DIR / page.folder).glob("scores-*")]]
    names = parser.parse_args(arguments).page or made
    for name in names:
        if name not in PAGES:
            raise InputError(f"{name}: no such page; expected one of {', '.join(PAGES)}")
        with_block(DOCS_DIR / PAGES[name].path, "")
    for name in names:
        path = DOCS_DIR / PAGES[name].path
        figure, block = found(name)
        path.write_text(with_block(path, block))
        _draw(figure, path.with_name(f"{name}.png"))
        if PAGES[name].numbers:
            path.with_name(f"{name}.csv").write_text(numbers(name))
        print(path)
    return 0


def with_block(path: Path, block: str) -> str:
    """Return the text of a page with another block between its marks.

    Raises:
        InputError: if there is no such page, or it lacks a mark.
    """
    try:
        page = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: not readable ({error.strerror}); expected a page") from error
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise InputError(f"{path}: expected a line {START} and below it a line {END}")
    return f"{before}{START}\n{block}{END}{after}"


def found(name: str) -> tuple[Figure, str]:
    """Return the figure of a page, and the text that says what was found.

    Raises:
        InputError: if the scores are partial, or there are none.
    """
    page = PAGES[name]
    all_claims, study = claims.read(DOCS_DIR / page.folder)
    if not study.results.complete or study.unscored:
        raise InputError(
            f"{DOCS_DIR / page.folder}: its scores are partial; expected those of a whole run"
        )
    figure = page.figure(study)
    parts = [page_sections.run_facts(study), f"![{figure.title}]({name}.png)", figure.reading]
    for outcomes, num_seeds in claims.families(study, all_claims):
        parts.append(page_sections.claim_table(outcomes, num_seeds, name))
    parts += page.sections(study)
    return figure, "\n\n".join(parts) + "\n"


def numbers(name: str) -> str:
    """Return the numbers of every student of a page, at each temperature T, as CSV.

    A line has a mean in nats per token and its 95 % interval: of one student for sampling error
    only, of `all` over seeds and sequences.
    """
    _, study = claims.read(DOCS_DIR / PAGES[name].folder)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("size", "student", "T", "seed", "measure", "mean", "low", "high"))
    measures = {
        "precision": study.precision,
        "recall": study.recall,
        "entropy": study.entropy,
        "divergence": study.divergence,
    }
    arms = [(size, label) for size in study.sizes for label in study.labels(size)]
    for size, label in arms:
        by_seed = study.of(size, label)
        for temperature in study.temperatures(next(iter(by_seed.values()))):
            for measure, of_student in measures.items():
                values = {seed: of_student(one, temperature) for seed, one in by_seed.items()}
                groups = {str(seed): [value] for seed, value in values.items()}
                for seed, group in (groups | {"all": [*values.values()]}).items():
                    mean = over_seeds(group)
                    ends = (f"{number:.5f}" for number in (mean.estimate, mean.low, mean.high))
                    writer.writerow((size, label, f"{temperature:g}", seed, measure, *ends))
    return file.getvalue()


def _draw(figure: Figure, path: Path) -> None:
    import report_figures

    spec = report_figures.page_spec(figure)
    path.write_bytes(report_figures.images(spec, figure.title)[".png"])


def _crossover(study: Study) -> Figure:
    return report_rows.equal_precision(study, study.sizes[0])


def _models(study: Study, size: str) -> Figure:
    reading = (
        f"{report_rows.UP_TO_TRUTH} The grey line joins the distilled students along tau, lines in "
        "colour join one student along the temperature T of its sampling."
    )
    return replace(report_rows.precision_recall(study, size), reading=reading)


def _answers(name: str, kind: str) -> Page:
    """Return the page of an experiment whose prompts have answers or references."""
    return Page(
        path=f"experiments/{name}.md",
        folder=f"experiments/{name}",
        figure=lambda study: pass_at_k.figure(study, study.sizes[0], kind),
        sections=functools.partial(page_sections.answers, kind=kind),
    )


def _students(name: str, size: str, sections: Callable[[Study], Iterator[str]]) -> Page:
    """Return the page of an experiment whose figure shows the students of a size."""
    return Page(
        path=f"experiments/{name}.md",
        folder=f"experiments/{name}",
        figure=lambda study: _models(study, size),
        sections=sections,
    )


PAGES: Mapping[str, Page] = {
    "temperature": Page(
        path="experiments/temperature.md", folder="experiments/temperature", figure=_crossover,
        sections=page_sections.temperature,
    ),
    "capacity": Page(
        path="experiments/capacity.md", folder="experiments/capacity",
        figure=report_sizes.capacity, sections=page_sections.capacity,
    ),
    "convergence": Page(
        path="experiments/convergence.md", folder="experiments/capacity",
        figure=report_sizes.convergence, sections=page_sections.convergence,
    ),
    "real_data": Page(
        path="experiments/real_data.md", folder="experiments/real_data", figure=_crossover,
        sections=page_sections.real_data,
    ),
    "reasoning": _answers("reasoning", "pass"),
    "reasoning_larger": _answers("reasoning_larger", "pass"),
    "summarisation": _answers("summarisation", "rouge"),
    "post_training": _students("post_training", "tuned", page_sections.by_size),
    "objective": _students("objective", "soft", page_sections.by_size),
    "truncation": _students("truncation", "small", page_sections.by_size),
    "modes": Page(
        path="experiments/modes.md", folder="experiments/modes",
        figure=lambda study: modes.figure(study, DOCS_DIR / "experiments/modes" / modes.GAUSSIANS),
        sections=page_sections.of_modes,
    ),
    "downstream": _students("downstream", "small", page_sections.tasks),
    "teacher_training": _students("teacher_training", "small", page_sections.by_teacher),
    "teacher_margin": _students("teacher_margin", "small", page_sections.by_teacher),
    "teacher_ahead": _students("teacher_ahead", "small", page_sections.by_teacher),
    "smollm2": Page(
        path="results/smollm2/README.md", folder="results/smollm2", figure=_crossover,
        sections=page_sections.replication, numbers=True,
    ),
    "crossover": _students("crossover", "small", page_sections.by_size),
}  # fmt: skip


if __name__ == "__main__":
    command(main)
