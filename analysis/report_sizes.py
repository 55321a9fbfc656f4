"""Figures of a report that compare the sizes of students of a run; see size_verdicts.py.

A row is a change at one size; its panel is what changes, its series is a training, and its place
is the number of parameters. The teacher's own change is a row without a place.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from claim_terms import mean_of
from report_rows import ADD_TEMPERATURES, Figure, Row, interval
from report_text import value_text
from size_verdicts import by_capacity, by_training, change, lowest_tau, trainings, what_changes
from study import Study

from kdhpc.experiment.claims import TEACHER, Term

MEASURES = ("precision", "recall")


def figures(study: Study) -> list[Figure]:
    """Return the figures for which a run has the sizes, in the order of the page."""
    made = [capacity(study)] if by_capacity(study) else []
    return made + ([convergence(study)] if by_training(study) else [])


def capacity(study: Study) -> Figure:
    """Return the changes from tau 1 to the lowest tau by number of parameters."""
    tau = lowest_tau(study)
    sizes = {size for of_training in by_capacity(study).values() for size in of_training}
    panels = [(measure, tau) for measure in MEASURES]
    rows = list(_rows(study, sizes, panels))
    teachers = list(_teachers(study, panels)) if rows else []
    unscored = f"The teacher's own change is not drawn: it needs scores of it: {ADD_TEMPERATURES}."
    return Figure(
        name="capacity",
        file_name="report-capacity",
        title=f"Capacity: what tau {tau or 'below 1'} changes against tau 1, by size",
        reading="If the trade-off vanishes as students grow, both changes go to the line at 0. If "
        "a large student equals its teacher, they go to the teacher's own change, which is the "
        "dashed line, with its interval as a band. Lines join sizes of the same training. "
        "Intervals that overlap decide nothing, as sizes are compared seed by seed.",
        needs="students of tau 1 and of a lower tau with both of their scores",
        rows=[*rows, *teachers],
        notes=(*_left_out(rows, sizes, panels), *([] if teachers or not rows else [unscored])),
        numbers=_numbers(study, rows) + _teacher_numbers(teachers),
    )


def convergence(study: Study) -> Figure:
    """Return how direct and the lowest tau differ from tau 1 by number of parameters."""
    tau = lowest_tau(study)
    sizes = {size for pair in by_training(study) for size in pair}
    panels = [(measure, "direct") for measure in MEASURES]
    known = study.has_divergences and bool(tau)
    panels += [("divergence", tau)] if known else []
    rows = list(_rows(study, sizes, panels))
    without = "The change of KL(p''||p*) is not drawn: it needs " + (
        "log-probabilities of end tokens, which a run of an earlier version lacks."
        if tau
        else "students of tau 1 and of a lower tau."
    )
    return Figure(
        name="convergence",
        file_name="report-convergence",
        title="Convergence: what more training changes",
        reading="Precision and recall of the direct student less those of tau 1: above 0, learning "
        "from truth is better than learning from a teacher at tau 1. KL(p''||p*) of the lowest "
        "tau less that of tau 1: above 0, the lower tau moves students away from the truth. Lines "
        "join sizes of the same training; that training changes something is in the distance "
        "between lines at one size, which is decided seed by seed.",
        needs="direct students and students of tau 1 with both of their scores",
        rows=rows,
        notes=(*_left_out(rows, sizes, panels), *([] if known or not rows else [without])),
        numbers=_numbers(study, rows),
    )


def _rows(study: Study, sizes: Collection[str], panels: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """Yield the changes against tau 1 that are known.

    Args:
        study: the run.
        sizes: sizes of students.
        panels: of each panel, what is measured, and the label of the student that is compared.
    """
    for measure, of in panels:
        for training, of_training in trainings(study).items():
            for size in of_training:
                mean = change(study, measure, of, size) if size in sizes else None
                if mean is not None:
                    names: Row = {
                        "panel": what_changes(measure, of),
                        "series": training,
                        "size": size,
                        "parameters": study.parameters(size),
                    }
                    yield names | interval(mean) | {"seeds": mean.num_seeds}


def _teachers(study: Study, panels: Sequence[tuple[str, str]]) -> Iterator[Row]:
    for measure, tau in panels:
        mean = mean_of(study, Term(measure=measure, of=tau, against="1", size=TEACHER), "")
        if mean is not None:
            names: Row = {"panel": what_changes(measure, tau), "series": TEACHER}
            yield names | interval(mean) | {"seeds": mean.num_seeds}


def _left_out(
    rows: Sequence[Row], sizes: Collection[str], panels: Sequence[tuple[str, str]]
) -> list[str]:
    """Say which sizes have no row in some panel; nothing if all have one in each, or no row is."""
    there = {(row["panel"], row["size"]) for row in rows}
    missing = [
        f"{size} in {name}"
        for name in (what_changes(*panel) for panel in panels)
        for size in sorted(sizes)
        if rows and (name, size) not in there
    ]
    return [f"Left out, as a student or a score is missing: {', '.join(missing)}."] * bool(missing)


def _numbers(study: Study, rows: Iterable[Row]) -> list[dict[str, str]]:
    """Return changes as texts: a row for each size, a column for each panel."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        size = str(row["size"])
        names = {
            "size": size,
            "parameters": f"{study.parameters(size):,}",
            "training": str(row["series"]),
        }
        table.setdefault(size, names)[str(row["panel"])] = _text(row)
    return list(table.values())


def _teacher_numbers(rows: Sequence[Row]) -> list[dict[str, str]]:
    numbers = {str(row["panel"]): _text(row) for row in rows}
    return [{"size": TEACHER, **numbers}] if rows else []


def _text(row: Row) -> str:
    return value_text(*(float(row[key]) for key in ("estimate", "low", "high")), sign=True)
