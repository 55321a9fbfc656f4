#!/usr/bin/env python
"""Print the verdicts of a finished run, and write a page with all that is known about it.

    python analysis/report.py RUN [RUN ...] [--out FOLDER]

RUN is a run's name or folder, a file of results, such as that of `rerun.py RUN --partial`, or a
folder with claims.yaml and scores of several runs, which are pooled as analysis/claims.py does it.

The page is report.html next to the results, or in FOLDER; beside it are the numbers and the images
of each figure (report-*.csv, .svg, .png, .pdf). It needs no network and can be sent by itself.
Several runs are compared: a table of their verdicts and one figure, in report-compared.html.
The page needs `pip install 'kdhpc[report]'`; the verdicts do not.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import claims
import diversity
import files
import judges
import report_intro
import report_page
import report_rows
import report_run
import report_sizes
from files import Analysis
from report_page import Drawn, Part
from report_rows import Figure
from report_run import RunFacts, read_facts, run_folder
from report_run import Table as PageTable
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from size_verdicts import across_sizes
from study import Study
from verdicts import Verdict, claim_of, verdicts

from kdhpc.cluster.display import WIDTH, command
from kdhpc.config import presets
from kdhpc.errors import InputError
from kdhpc.experiment import arms
from kdhpc.models.tokenizer import Tokenizer
from kdhpc.pipeline import LANGUAGE

PACKAGES = ("altair", "vl_convert")
"""Modules that only the page needs."""
PAGE, COMPARED = "report", "report-compared"


@dataclass(frozen=True, kw_only=True)
class Read:
    """A run that was read, and what was decided about it."""

    name: str
    analysis: Analysis
    study: Study
    facts: RunFacts
    samples: Mapping[str, Mapping[str, Sequence[diversity.SampleSet]]]
    """Evaluation sets by size and by what students learnt from; empty if they are not there."""
    notes: Sequence[str]
    """What else has to be known to read the numbers."""
    across: Sequence[Verdict]
    """Verdicts that compare sizes of students; none if they were not trained to be compared."""
    verdicts: Sequence[Verdict]
    """Verdicts about the students of each size."""

    @property
    def about(self) -> list[str]:
        """What the intervals cover, and which students are left out."""
        return [self.given, *self.notes]

    @property
    def given(self) -> str:
        """What the intervals cover."""
        num_seeds = max(len(self.study.of(s.size, s.label)) for s in self.study.students)
        partial = "" if self.analysis.results.complete else "partial results; "
        if num_seeds == 1:
            return f"{partial}one training: sampling error only, so nothing is decided"
        over = claims.replicates(self.study) or "given p* and D"
        return f"{partial}{over}; {num_seeds} seeds, 95 % intervals over seeds and sequences"


def read_all(options: argparse.Namespace) -> list[Read]:
    """Read the runs that were typed, each under a name of its own.

    Raises:
        InputError: if a run has no results, or no student with both of its scores.
    """
    runs: list[Read] = []
    for typed in options.run:
        one = argparse.Namespace(run=typed, out=options.out)
        analysis = claims.read_pooled(one) or files.read(one, LANGUAGE)
        study = Study(analysis.results)
        if not study.students:
            raise InputError(
                f"{analysis.path}: no student has both of its scores, each with a finite mean over "
                "two or more sequences; expected at least one; let launch/sweep.py go on, then "
                "merge again"
            )
        facts = read_facts(analysis.results, analysis.path)
        samples = {size: diversity.sample_sets(study, size, facts) for size in study.sizes}
        is_pooled = analysis.path.name == claims.CLAIMS
        place = analysis.path.parent if is_pooled else run_folder(analysis.path)
        name = (place or analysis.path).name
        number = 1 + sum(run.name.partition(" (")[0] == name for run in runs)
        runs.append(
            Read(
                name=name if number == 1 else f"{name} ({number})",
                analysis=analysis,
                study=study,
                facts=facts,
                samples=samples,
                notes=judges.notes(study),
                across=across_sizes(study),
                verdicts=[
                    *verdicts(study),
                    *(v for size, sets in samples.items() for v in diversity.collapse(sets, size)),
                ],
            )
        )
    return runs


def verdict_table(run: Read) -> Table:
    """Format the verdicts of a run for people."""
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    several = len(run.study.sizes) > 1
    for verdict in (*run.across, *run.verdicts):
        table.add_row(
            Text(verdict.decision, style="bold"),
            Group(Text(claim_of(verdict, several=several), style="bold"), Text(verdict.sentence)),
        )
    return table


def write_report(run: Read) -> Path:
    """Write the page of a run, with the files of its figures; return the path of the page."""
    study, sizes, facts = run.study, run.study.sizes, run.facts
    figures = [figure for size in sizes for figure in report_rows.figures(study, size)]
    parts = [
        _introduction([report_intro.subject(study, facts.config)]),
        Part(heading="Across sizes", body=_across_part(run)),
        Part(heading="Verdicts", body=_verdict_part(run, run.verdicts)),
        Part(heading="Figures", body=_figure_part(run.analysis, figures)),
        Part(heading="Tables", body="\n".join(map(report_page.table, _tables(study)))),
        *_judge_parts(study),
        *_text_parts(study, facts),
        Part(heading="The run", body=_run_part(study, facts)),
        Part(heading="What differs from the paper", body=_deviation_part(facts)),
        *_diversity_parts(run),
    ]
    return _save(run.analysis, PAGE, run.name, run.about, parts)


def write_comparison(runs: Sequence[Read]) -> Path:
    """Write the page that compares runs, beside the results of the first; return its path."""
    first = runs[0].analysis
    by_run = {run.name: [*run.across, *run.verdicts] for run in runs}
    figures = report_rows.compared({run.name: run.study for run in runs})
    subjects = [f"{r.name}: {report_intro.subject(r.study, r.facts.config)}" for r in runs]
    parts = [
        _introduction(subjects),
        Part(heading="Verdicts", body=report_page.compared_part(by_run)),
        Part(heading="Figures", body=_figure_part(first, figures)),
    ]
    for run in runs:
        parts += [
            Part(
                heading=f"{run.name}: tables",
                body="\n".join(map(report_page.table, _tables(run.study))),
            ),
            Part(heading=f"{run.name}: the run", body=_run_part(run.study, run.facts)),
            Part(
                heading=f"{run.name}: what differs from the paper", body=_deviation_part(run.facts)
            ),
        ]
    about = [f"{run.name}: {line}" for run in runs for line in run.about]
    return _save(first, COMPARED, " and ".join(by_run), about, parts)


def _introduction(subjects: Sequence[str]) -> Part:
    """Return what the words of the page mean, and what was measured in each run."""
    lines = report_page.list_part([*report_intro.WORDS, *subjects])
    body = lines + report_page.paragraphs([report_intro.COVERED])
    return Part(heading="What this page says", body=body)


def _save(
    analysis: Analysis, name: str, title: str, about: Sequence[str], parts: Sequence[Part]
) -> Path:
    import report_figures

    text = report_page.page(title, about, parts, report_figures.chart_code())
    return analysis.save(text.encode(), f"{name}.html")


def _across_part(run: Read) -> str:
    """Return what compares the sizes of a run; nothing if none can be compared."""
    figures = report_sizes.figures(run.study)
    drawn = _figure_part(run.analysis, figures) if figures else ""
    return _verdict_part(run, run.across) + drawn


def _verdict_part(run: Read, made: Sequence[Verdict]) -> str:
    return report_page.verdict_part(made, several=len(run.study.sizes) > 1)


def _figure_part(analysis: Analysis, figures: Sequence[Figure]) -> str:
    drawn = [_draw(analysis, figure) for figure in figures]
    return report_page.paragraphs([report_page.HANDLING], "small") + report_page.figure_part(drawn)


def _draw(analysis: Analysis, figure: Figure) -> Drawn:
    """Write the files of a figure, if the run has its scores."""
    import report_figures

    if not figure.rows:
        return Drawn(figure=figure)
    spec = report_figures.page_spec(figure)
    paths = [analysis.save_csv(figure.rows, figure.file_name)]
    for suffix, content in report_figures.images(spec, figure.title).items():
        paths.append(analysis.save(content, f"{figure.file_name}{suffix}"))
    return Drawn(figure=figure, spec=spec, files=tuple(path.name for path in paths))


def _tables(study: Study) -> list[PageTable]:
    """Return precision and recall, their contrasts, and what they are made of per sequence."""
    return [
        report_run.table_of(f"{title}{_of_size(study, size)}", rows, note)
        for size in study.sizes
        for title, rows, note in (
            ("Nats per token", report_rows.means(study, size), ""),
            (
                "Change against another student, seed by seed",
                report_rows.contrasts(study, size),
                report_rows.ABOUT_CONTRASTS,
            ),
            (
                "Nats per sequence, end tokens included",
                report_rows.per_sequence(study, size),
                report_rows.ABOUT_SEQUENCES,
            ),
        )
        if rows
    ]


def _judge_parts(study: Study) -> list[Part]:
    """Return what two judges say of the same students, if there are two."""
    both = judges.judged(study)
    if both is None:
        return []
    titles = (
        f"Precision under each judge, in nats per {both.unit}",
        "Verdicts that depend on the judge",
    )
    made = zip(titles, judges.tables(both), strict=True)
    tables = [report_run.table_of(title, rows) for title, rows in made if rows]
    about = f"The first judge stands for p* on this page. The second is {study.second_judge}."
    body = report_page.paragraphs([about]) + "\n".join(map(report_page.table, tables))
    return [Part(heading="Two judges", body=body)]


def _of_size(study: Study, size: str) -> str:
    return f" (size {size})" if len(study.sizes) > 1 else ""


def _diversity_parts(run: Read) -> list[Part]:
    truth = run.facts.first_of(arms.TRUTH_MODEL)
    if truth is None or not (truth.data / "tokenizer.json").is_file():
        return []
    tables = []
    for size, sets in run.samples.items():
        rows = diversity.table_rows(sets, Tokenizer(truth.data))
        cells = [tuple(_named(diversity.cells(row))) for row in rows]
        title = f"Means over seeds{_of_size(run.study, size)}"
        if cells:
            tables.append(PageTable(title=title, columns=diversity.COLUMNS, rows=cells))
    body = report_page.paragraphs([diversity.ABOUT]) + "\n".join(map(report_page.table, tables))
    return [Part(heading="Appendix: diversity of samples", body=body)] if tables else []


def _named(cells: Sequence[str]) -> list[str]:
    return [report_rows.student_name(cells[0]), *cells[1:]]


def _text_parts(study: Study, facts: RunFacts) -> list[Part]:
    parts = []
    for size in study.sizes:
        if texts := report_run.texts(study, size, facts):
            about = report_page.paragraphs(report_run.about_texts(study, size, facts), "small")
            body = about + report_page.text_part(texts)
            parts.append(Part(heading=f"Texts{_of_size(study, size)}", body=body))
    return parts


def _run_part(study: Study, facts: RunFacts) -> str:
    made: list[str] = []
    if facts.records:
        made.append(report_page.table(report_run.stages(facts)))
    made.append(report_page.fact_part(report_run.provenance(study, facts)))
    if facts.config is not None:
        text = presets.to_yaml(facts.config)
        made.append(report_page.folded("The whole config", text))
    return "\n".join(filter(None, made))


def _deviation_part(facts: RunFacts) -> str:
    if facts.config is None:
        return ""
    sizes = report_run.sizes(facts.config)
    return report_page.list_part(report_run.deviations(facts.config)) + report_page.table(sizes)


def main(arguments: list[str]) -> int:
    """Read the runs, print their verdicts, and write the page."""
    options = files.parser(__doc__, several=True).parse_args(arguments)
    runs = read_all(options)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for run in runs:
        for line in run.about:
            console.print(Text(f"{run.name}: {line}", style="italic"))
        console.print(verdict_table(run))
    try:
        import report_figures  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print("no page is written: its packages are missing; pip install 'kdhpc[report]'")
        return 0
    print(write_report(runs[0]) if len(runs) == 1 else write_comparison(runs))
    return 0


if __name__ == "__main__":
    command(main)
