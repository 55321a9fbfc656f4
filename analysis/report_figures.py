"""Charts of a report, as specifications of Vega-Lite; the only module that imports its packages.

Series differ in shape and dash besides colour, so that a figure can be read in grey. A student has
one look in all figures of a run. A chart is as wide as its page, or as `FILE_WIDTH` in a file.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import altair as alt
import vl_convert
from report_labels import Line, Place, Plot, Point, place_labels
from report_rows import DISTILLED, TEACHER, TRUTH_LINE, TRUTH_POINT, Figure, Row
from report_text import written

from kdhpc.science.curves import PREFIXES
from kdhpc.types import Json

Spec = dict[str, Json]
Rows = Sequence[Row]
Look = tuple[str, str, list[int]]
"""Colour, shape and dash of a series."""
Looks = Mapping[str, Look]
Layers: TypeAlias = alt.LayerChart | alt.FacetChart
"""Type of a layered chart; the second is what Altair says, and does not happen here."""
HEIGHT, FILE_WIDTH, PNG_SCALE = 380, 600, 2
PLOTS = tuple(Plot(width=width, height=HEIGHT) for width in (270, 330, FILE_WIDTH, 860))
"""Sizes of the plot of precision against recall, from a phone's to a laptop's."""
COLORS = ("#0b3c6f", "#d55e00", "#009e73", "#b05090", "#56b4e9", "#8a6d00", "#444444")
SHAPES = (
    "circle", "square", "triangle-up", "diamond", "triangle-down", "triangle-left", "triangle-right"
)  # fmt: skip
DASHES = ([1, 0], [7, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3], [10, 4])
GREYS = ("#111111", "#5c5c5c", "#8c8c8c")
"""Colours of what is no student."""
TRUTH_COLOR, PATH_COLOR, TEACHER_LOOK = "#333333", "#aaaaaa", ("#666666", "cross", [5, 2])
MARGIN = 0.12
"""Part of an axis that is left free at each end, for labels."""
LONG_NAME = 20
"""Characters of a name above which a legend has one column, so that a phone shows it."""
STAR = "M0,-1L.23,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.23,-.31Z"
"""Shape of the mark of truth."""
FAR = 0.3
"""Part of an axis by which it is made longer, at most, to show truth's own recall."""
LINE_STARTS = (0.02, 0.3, 0.6)
"""Parts of the axis at which the label of the line of truth can start."""
LABEL_PART = 0.4
"""Part of the axis that this label takes on a phone."""
DODGE = 0.007
"""Part of an axis of numbers by which series are moved apart."""
FACTOR = 1.03
"""Factor on an axis of logarithms by which series are moved apart."""
PANEL, GAP = 230, 34
"""Height of a panel of a figure that has several, and of the space between two of them."""
PANEL_DODGE = 0.025
"""Part of the axis of a panel by which series are moved apart."""
SHOWN_PREFIX = 4
"""Number of tokens that the exact curves show at first."""
CONFIG = {
    "font": "sans-serif",
    "axis": {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
             "gridColor": "#e8e8e8", "labelOverlap": True, "titleLimit": 330},
    "legend": {"orient": "bottom", "title": None, "labelFontSize": 12, "labelLimit": 230,
               "symbolSize": 70, "symbolOpacity": 1, "symbolStrokeWidth": 0},
    "title": {"fontSize": 13, "anchor": "start", "fontWeight": "normal"},
    "view": {"stroke": "#cccccc"},
}  # fmt: skip


def page_spec(figure: Figure) -> Spec:
    """Return the specification for a page, as wide as its container."""
    rows = [
        {name: written(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in figure.rows
    ]
    chart = CHARTS[figure.name](rows, _looks(figure.students))
    spec: Spec = chart.to_dict()
    del spec["$schema"]  # an address; the library beside it needs none
    return spec | {
        "config": CONFIG,
        "width": "container",
        "height": spec.get("height", HEIGHT),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": written(f"{figure.title}. {figure.reading}"),
    }


def images(spec: Spec, title: str) -> dict[str, bytes]:
    """Draw a specification without a browser; return the bytes of a file by its suffix."""
    below = {"subtitle": spec["title"]["text"]} if "title" in spec else {}
    fixed = {name: value for name, value in spec.items() if name != "autosize"}
    fixed |= {"width": FILE_WIDTH, "title": {"text": written(title)} | below, "background": "white"}
    svg: str = vl_convert.vegalite_to_svg(fixed)
    return {
        ".svg": svg.encode(),
        ".png": vl_convert.svg_to_png(svg, scale=PNG_SCALE),
        ".pdf": vl_convert.svg_to_pdf(svg),
    }


def chart_code() -> str:
    """Return the JavaScript that draws specifications: Vega, Vega-Lite and Vega-Embed."""
    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # optional, unlike its stub


def _precision_recall(rows: Rows, looks: Looks) -> Layers:
    x, y = _recall_axis(rows), _axis(rows, "precision", ends=True)
    rows = _with_places(rows, x, y)
    field = "run" if "run" in rows[0] else "student"
    look = _look(field, _names(rows, field), looks)
    x_of, y_of = (
        alt.X(
            "recall:Q",
            title="recall: log p'' of truth's samples (nats per token)",
            scale=x,
            axis=alt.Axis(tickCount=8),
        ),
        alt.Y("precision:Q", title="precision: log p* of own samples (nats per token)", scale=y),
    )
    hover = [alt.Tooltip(f"{name}:N") for name in dict.fromkeys((field, "series", "label"))]
    hover += [*_numbers("precision"), *_numbers("recall")]
    everything = _chart(rows)
    truth = everything.transform_filter(f"datum.series == '{TRUTH_LINE}'")
    truth_point = everything.transform_filter(f"datum.series == '{TRUTH_POINT}'")
    models = everything.transform_filter(
        f"datum.series != '{TRUTH_LINE}' && datum.series != '{TRUTH_POINT}'"
    )
    lines = models.transform_filter("indexof(datum.series, 'along') > 0")
    points = models.transform_filter("datum.label != ''")
    colour = look["color"] if field == "run" else alt.value(TRUTH_COLOR)
    path = look["color"] if field == "run" else alt.value(PATH_COLOR)
    is_far = any(row.get("far") for row in rows)
    truth_x = alt.value("width") if is_far else x_of
    return alt.layer(
        # The first layer has both axes, as zooming takes those that it has.
        lines.transform_filter(f"datum.series == '{DISTILLED}'")
        .mark_line(strokeWidth=1.5, clip=True)
        .encode(x=x_of, y=y_of, color=path, order="place:Q", detail=["series:N", f"{field}:N"][
            : 2 if field == "run" else 1
        ]),
        lines.transform_filter(f"datum.series != '{DISTILLED}'")
        .mark_line(strokeWidth=1.5, clip=True)
        .encode(
            x=x_of, y=y_of, color=look["color"], strokeDash=look["dash"], order="place:Q",
            detail="series:N",
        ),
        truth.mark_rule(strokeWidth=1.5, strokeDash=[6, 4], clip=True).encode(
            y=y_of, color=colour, tooltip=hover[: -len(_numbers("recall"))]
        ),
        points.mark_rule(opacity=0.55, clip=True).encode(
            x=alt.X("recall_low:Q"), x2="recall_high:Q", y=y_of, color=look["color"]
        ),
        points.mark_rule(opacity=0.55, clip=True).encode(
            x=x_of, y=alt.Y("precision_low:Q"), y2="precision_high:Q", color=look["color"]
        ),
        points.mark_point(filled=True, size=55, opacity=1, clip=True).encode(
            x=x_of, y=y_of, color=look["color"], shape=look["shape"], tooltip=hover
        ),
        truth_point.mark_point(
            filled=True, size=130, opacity=1, color=TRUTH_COLOR,
            shape="triangle-right" if is_far else STAR,
        ).encode(x=truth_x, y=y_of, tooltip=hover[1:]),
        *[
            part.transform_filter(f"datum.align == '{align}'")
            .mark_text(
                align=align, baseline="middle", fontSize=11, clip=True,
                dx=alt.expr("datum.dx"), dy=alt.expr("datum.dy"),
            )
            .encode(x=where, y=y_of, text="label:N", color=color)
            for part, where, color in (
                (truth, x_of, colour),
                (truth_point, truth_x, alt.value(TRUTH_COLOR)),
                (points, x_of, look["color"]),
            )
            for align in ("left", "center", "right")
        ],
    ).add_params(_zoom("x", "y"))  # fmt: skip


def _recall_axis(rows: Rows) -> alt.Scale:
    """Return a scale of recall, with truth's own one only if that is not far to the right."""
    models = [row for row in rows if row["series"] != TRUTH_POINT]
    scale = _axis(models, "recall", ends=True)
    low, high = scale.to_dict()["domain"]
    points = [float(row["recall"]) for row in rows if row["series"] == TRUTH_POINT]
    is_near = max(points, default=low) <= high + FAR * (high - low)
    return _axis(rows, "recall", ends=True) if is_near else scale


def _with_places(rows: Rows, x: alt.Scale, y: alt.Scale) -> list[Row]:
    """Return the rows with the places of their labels; where there is no room, without.

    The line of truth chooses first; its label starts where there are no points. Truth's own recall
    is at the right end if it is beyond.
    """
    left, right = x.to_dict()["domain"]
    points = [row for row in rows if "recall" in row and row["series"] != TRUTH_POINT]
    places_of_points = [_within(row, x, y) for row in points]

    def on_axes(row: Row) -> Row:
        if row["series"] == TRUTH_LINE:
            height = _height(row, y)
            return row | {"recall": left + _freest(height, places_of_points) * (right - left)}
        if row["series"] == TRUTH_POINT and float(row["recall"]) > right:
            recall = float(row["recall"])
            return row | {"far": True, "label": written(f"recall {recall:.2f}")}
        return row

    ordered = [on_axes(row) for row in sorted(rows, key=lambda row: "recall" in row)]
    heights = [_height(row, y) for row in rows if row["series"] == TRUTH_LINE]
    lines = [((0.0, height), (1.0, height)) for height in heights] + _lines(points, x, y)
    places = place_labels(
        [(min(1.0, across), up) for across, up in (_within(row, x, y) for row in ordered)],
        [str(row["label"]) for row in ordered],
        [*lines, *(line for row in points for line in _bars(row, x, y))],
        PLOTS,
    )
    return [
        _placed(row, place) | {"place": index}
        for index, (row, place) in enumerate(zip(ordered, places, strict=True))
    ]


def _height(row: Row, y: alt.Scale) -> float:
    low, high = y.to_dict()["domain"]
    return (float(row["precision"]) - float(low)) / float(high - low)


def _freest(height: float, points: Sequence[Point]) -> float:
    """Return where a label at some height is farthest from the points, on an axis from 0 to 1."""

    def distance(start: float, point: Point) -> float:
        beyond = abs(point[0] - start - LABEL_PART / 2.0) - LABEL_PART / 2.0
        return max(0.0, beyond) + abs(point[1] - height)

    return max(LINE_STARTS, key=lambda start: min(distance(start, point) for point in points))


def _placed(row: Row, place: Place | None) -> Row:
    dx, dy, align = place or (0.0, 0.0, "none")
    return row | {"dx": dx, "dy": dy, "align": align}


def _within(row: Row, x: alt.Scale, y: alt.Scale, across: str = "", up: str = "") -> Point:
    """Return where a point, or an end of one of its intervals, is on axes from 0 to 1."""
    values = (float(row[f"recall{across}"]), float(row[f"precision{up}"]))
    ends = (x.to_dict()["domain"], y.to_dict()["domain"])
    first, second = (
        (value - low) / (high - low) for value, (low, high) in zip(values, ends, strict=True)
    )
    return first, second


def _bars(row: Row, x: alt.Scale, y: alt.Scale) -> list[Line]:
    return [
        (_within(row, x, y, across="_low"), _within(row, x, y, across="_high")),
        (_within(row, x, y, up="_low"), _within(row, x, y, up="_high")),
    ]


def _lines(points: Rows, x: alt.Scale, y: alt.Scale) -> list[Line]:
    return [
        (_within(row, x, y), _within(after, x, y))
        for row, after in pairwise(points)
        if row["series"] == after["series"] and row.get("run") == after.get("run")
    ]


def _equal_precision(rows: Rows, looks: Looks) -> Layers:
    return _places(
        rows, "student", "against", looks, x_title="distilled student", zero_line=True,
        y_title="recall kept (nats per token)", legend_title="student at another T",
    )  # fmt: skip


def _parts(rows: Rows, looks: Looks) -> Layers:
    looks = {
        name: (GREYS[index % len(GREYS)], SHAPES[index], DASHES[index])
        for index, name in enumerate(_names(rows, "part"))
    }
    return _places(
        rows, "student", "part", looks, x_title="student", y_title="nats per token",
        joined="indexof(datum.student, 'tau ') == 0", dodge=0.0,
    )  # fmt: skip


def _fifths(rows: Rows, looks: Looks, *, of: str) -> Layers:
    return _places(
        rows, "fifth", "student", looks, x_title=f"fifth of {of}", zero_line=True,
        joined="true", y_title="recall change (nats per token)",
    )  # fmt: skip


def _total_variation(rows: Rows, looks: Looks) -> Layers:
    return _places(
        rows, "k", "student", looks, x_title="number of first tokens k", y_title="total variation",
        joined="true", dodge=0.25,
    )  # fmt: skip


def _places(
    rows: Rows, across: str, series: str, looks: Looks, *, x_title: str, y_title: str,
    joined: str = "", zero_line: bool = False, dodge: float = 0.6, legend_title: str = "",
) -> Layers:  # fmt: skip
    """Draw estimates with intervals at places of the x axis.

    Args:
        rows: the rows.
        across: field of the places, in the order of the rows.
        series: field of the series.
        looks: looks of the series.
        x_title: title of the x axis.
        y_title: title of the y axis.
        joined: expression that says which points of a series lines join; none if empty.
        zero_line: whether the axis shows 0 with a line.
        dodge: part of a place over which series are spread, because they may have about the same
            values; 0 if they are not.
        legend_title: what the names in the legend are, if that is not clear.
    """
    look = _look(series, _names(rows, series), looks, legend_title)
    x = alt.X(
        f"{across}:O",
        title=x_title,
        sort=_names(rows, across),
        axis=alt.Axis(labelAngle=0),
        scale=alt.Scale(paddingInner=1.0 - dodge, paddingOuter=0.3)
        if dodge
        else alt.Scale(padding=0.5),
    )
    offset = alt.XOffset(f"{series}:N", sort=_names(rows, series), scale=alt.Scale(padding=0.5))
    beside = {"xOffset": offset} if dodge else {}
    scale = _axis(rows, "estimate", zero=zero_line)
    y = alt.Y("estimate:Q", title=y_title, scale=scale)
    hover = [alt.Tooltip(f"{across}:N"), alt.Tooltip(f"{series}:N"), *_numbers("")]
    base = _chart(rows)
    layers: list[alt.Chart] = []
    if zero_line:
        zero = _chart([{"estimate": 0}])
        layers.append(zero.mark_rule(color="#333333", clip=True).encode(y=y))
    if joined:
        layers.append(
            base.transform_filter(joined)
            .mark_line(strokeWidth=1.2, opacity=0.7, clip=True)
            .encode(x=x, **beside, y=y, color=look["color"], strokeDash=look["dash"])
        )
    layers += [
        base.mark_rule(strokeWidth=1.5, clip=True).encode(
            x=x, **beside, y=alt.Y("low:Q"), y2="high:Q", color=look["color"], tooltip=hover
        ),
        base.mark_point(filled=True, size=60, opacity=1, clip=True).encode(
            x=x, **beside, y=y, color=look["color"], shape=look["shape"], tooltip=hover
        ),
    ]
    return alt.layer(*layers).add_params(_zoom("y"))


def _curves(rows: Rows, looks: Looks) -> Layers:
    look = _look("student", _names(rows, "student"), looks)
    prefix = alt.param(
        name="k",
        value=SHOWN_PREFIX,
        bind=alt.binding_select(options=list(PREFIXES), name="first tokens k "),
    )
    share = alt.Scale(domain=[0, 1.03], nice=False)
    ticks = alt.Axis(tickCount=5, format=".1f")
    x = alt.X("beta:Q", title="recall beta", scale=share, axis=ticks)
    y = alt.Y("alpha:Q", title="precision alpha", scale=share, axis=ticks)
    hover = [alt.Tooltip("student:N"), alt.Tooltip("log_lambda:Q", format=".2f")]
    hover += [*_numbers("alpha"), *_numbers("beta")]
    base = _chart(rows).transform_filter("datum.k == k")
    truth = _chart([{"beta": 1, "alpha": 1, "label": "truth"}])
    return alt.layer(
        base.transform_calculate(low="max(0, datum.alpha_low)", high="min(1, datum.alpha_high)")
        .mark_area(opacity=0.15, clip=True)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=look["color"]),
        base.mark_line(strokeWidth=1.5, clip=True).encode(
            x=x, y=y, color=look["color"], strokeDash=look["dash"], order="log_lambda:Q"
        ),
        base.transform_filter("abs(datum.log_lambda % 1) < 0.01")
        .mark_point(filled=True, size=35, opacity=1, clip=True)
        .encode(x=x, y=y, color=look["color"], shape=look["shape"], tooltip=hover),
        truth.mark_point(filled=True, size=130, opacity=1, color=TRUTH_COLOR, shape=STAR).encode(
            x=x, y=y
        ),
        truth.mark_text(
            align="right", baseline="middle", dx=-10, fontSize=11, color=TRUTH_COLOR
        ).encode(x=x, y=y, text="label:N"),
        title=alt.TitleParams(text=alt.expr("'the first ' + k + (k == 1 ? ' token' : ' tokens')")),
    ).add_params(prefix, _zoom("x", "y"))


def _best_temperature(rows: Rows, looks: Looks) -> Layers:
    names = _names(rows, "student")
    look = _look("student", names, looks)
    temperatures = sorted({float(row["temperature"]) for row in rows})
    step = DODGE * (temperatures[-1] - temperatures[0])
    rows = [
        row
        | {
            "x": float(row["temperature"])
            + step * (names.index(str(row["student"])) - (len(names) - 1) / 2)
        }
        for row in rows
    ]
    x = alt.X(
        "x:Q",
        title="temperature of evaluation T",
        scale=alt.Scale(zero=False, padding=20, nice=False),
        axis=alt.Axis(values=temperatures, labelExpr="'' + datum.value"),
    )
    y = alt.Y(
        "estimate:Q", title="recall (nats per token)", scale=_axis(rows, "estimate", zero=False)
    )
    hover = [alt.Tooltip("student:N"), alt.Tooltip("temperature:Q"), *_numbers("")]
    best = (
        _chart(rows)
        .transform_filter("datum.best != ''")
        .mark_point(size=260, strokeWidth=1.5, clip=True)
        .encode(x=x, y=y, color=look["color"], tooltip=[*hover, alt.Tooltip("best:N")])
    )
    return alt.layer(*_lines_and_bars(rows, x, y, look, hover), best).add_params(_zoom("x", "y"))


def _best_of(rows: Rows, looks: Looks) -> Layers:
    names = _names(rows, "student")
    look = _look("student", names, looks)
    numbers = sorted({int(row["k"]) for row in rows})
    rows = _beside(rows, "k", "student", names)
    x = alt.X(
        "x:Q",
        title="number of texts k",
        scale=alt.Scale(type="log", base=2, nice=False, padding=20),
        axis=alt.Axis(values=numbers, labelExpr="'' + datum.value"),
    )
    share = alt.Scale(domain=[0, 1], nice=False)
    y = alt.Y("estimate:Q", title="best of k", scale=share)
    hover = [alt.Tooltip("student:N"), alt.Tooltip("k:Q"), *_numbers("")]
    return alt.layer(*_lines_and_bars(rows, x, y, look, hover)).add_params(_zoom("x", "y"))


def _beside(rows: Rows, of: str, series: str, names: Sequence[str]) -> Rows:
    """Return rows with an `x` that moves series apart on an axis of logarithms."""
    middle = (len(names) - 1) / 2
    return [
        row | {"x": float(row[of]) * FACTOR ** (names.index(str(row[series])) - middle)}
        for row in rows
    ]


def _modes(rows: Rows, looks: Looks) -> Layers:
    names = _names(rows, "series")
    look = _look("series", names, looks)
    rows = _beside(rows, "sharpness", "series", names)
    x = alt.X(
        "x:Q",
        title="beta, or 1 / tau",
        scale=alt.Scale(type="log", nice=False, padding=20),
        axis=alt.Axis(values=[1, 2, 5, 10, 20, 50, 100], labelExpr="'' + datum.value"),
    )
    y = alt.Y(
        "estimate:Q", title="share of the modes that are kept",
        scale=alt.Scale(domain=[0, 1], nice=False),
    )  # fmt: skip
    hover = [alt.Tooltip("series:N"), alt.Tooltip("sharpness:Q", format=".3g"), *_numbers("")]
    return alt.layer(*_lines_and_bars(rows, x, y, look, hover)).add_params(_zoom("x", "y"))


def _lines_and_bars(
    rows: Rows, x: alt.X, y: alt.Y, look: Mapping[str, Any], hover: Sequence[alt.Tooltip]
) -> list[alt.Chart]:
    """Return a line, intervals and points of each series."""
    base = _chart(rows)
    return [
        base.mark_line(strokeWidth=1.5, clip=True).encode(
            x=x, y=y, color=look["color"], strokeDash=look["dash"]
        ),
        base.mark_rule(strokeWidth=1.5, clip=True).encode(
            x=x, y=alt.Y("low:Q"), y2="high:Q", color=look["color"]
        ),
        base.mark_point(filled=True, size=55, opacity=1, clip=True).encode(
            x=x, y=y, color=look["color"], shape=look["shape"], tooltip=hover
        ),
    ]


def _across_sizes(rows: Rows, looks: Looks) -> Layers:
    """Draw changes by number of parameters, a panel above another for each thing that changes.

    The panels share the x axis: they are layers of one view, and each has a part of its height.
    """
    series, panels = _names(rows, "series"), _names(rows, "panel")
    look = _look("series", series, looks)
    places = sorted({float(row["parameters"]) for row in rows if "parameters" in row})
    low, high = math.log(places[0]), math.log(places[-1])
    room, step = MARGIN * (high - low) or 1.0, PANEL_DODGE * (high - low) or PANEL_DODGE
    middle = (len(series) - 1) / 2.0

    def place_of(row: Row) -> Row:
        aside = step * (series.index(str(row["series"])) - middle)
        return {"x": float(row["parameters"]) * math.exp(aside)} if "parameters" in row else {}

    sizes = {
        place: [str(r["size"]) for r in rows if r.get("parameters") == place] for place in places
    }
    labels = {f"{at:.0f}": [*dict.fromkeys(found), _short(at)] for at, found in sizes.items()}
    x = alt.X(
        "x:Q",
        title="number of parameters of the students",
        scale=alt.Scale(
            type="log", domain=[math.exp(low - room), math.exp(high + room)], nice=False
        ),
        axis=alt.Axis(values=places, labelExpr=f"({json.dumps(labels)})[datum.value]", grid=False),
    )
    layers = [
        _panel(
            [row | place_of(row) for row in rows if row["panel"] == panel], panel, index, x, look
        )
        for index, panel in enumerate(panels)
    ]
    chart: Layers = alt.layer(*layers).add_params(_zoom("x")).resolve_scale(y="independent")
    return chart.properties(height=len(panels) * (PANEL + GAP) - GAP)


def _panel(rows: Rows, name: str, index: int, x: alt.X, look: Mapping[str, Any]) -> Layers:
    """Draw a panel; the teacher's own change, which has no place, is a line with a band.

    Args:
        rows: rows of the panel.
        name: what changes, the title of its y axis.
        index: number of the panel, from the top.
        x: the x axis.
        look: colour, shape and dash of the series.
    """
    top = index * (PANEL + GAP)
    scale = _axis(rows, "estimate", zero=True)
    scale.range = [top + PANEL, top]
    axis = alt.Axis(orient="left", tickCount=6, grid=True)
    y = alt.Y("estimate:Q", title=name, scale=scale, axis=axis)
    y_low = alt.Y("low:Q", scale=scale)
    hover = [alt.Tooltip(f"{field}:N") for field in ("series", "size")]
    hover += [alt.Tooltip("parameters:Q", format=","), *_numbers("")]
    everything = _chart(rows)
    teacher = everything.transform_filter(f"datum.series == '{TEACHER}'")
    students = everything.transform_filter(f"datum.series != '{TEACHER}'")
    return alt.layer(
        # The first layer has both axes, as zooming takes those that it has.
        students.mark_line(strokeWidth=1.2, opacity=0.7, clip=True).encode(
            x=x, y=y, color=look["color"], strokeDash=look["dash"]
        ),
        _chart([{"estimate": 0}]).mark_rule(color="#333333").encode(y=y),
        teacher.mark_rect(opacity=0.15).encode(y=y_low, y2="high:Q", color=look["color"]),
        teacher.mark_rule(strokeWidth=1.5).encode(
            y=y, color=look["color"], strokeDash=look["dash"]
        ),
        teacher.mark_point(filled=True, size=60, opacity=1).encode(
            x=alt.value("width"),
            y=y,
            color=look["color"],
            shape=look["shape"],
            tooltip=[hover[0], *_numbers("")],
        ),
        students.mark_rule(strokeWidth=1.5, clip=True).encode(
            x=x, y=y_low, y2="high:Q", color=look["color"], tooltip=hover
        ),
        students.mark_point(filled=True, size=60, opacity=1, clip=True).encode(
            x=x, y=y, color=look["color"], shape=look["shape"], tooltip=hover
        ),
    )


def _short(number: float) -> str:
    """Return a number of parameters with three digits, such as `5.1k` or `360M`."""
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1.0, ""))
        if number >= unit
    )
    return f"{number / unit:.3g}{name}"


CHARTS: Mapping[str, Callable[[Rows, Looks], Layers]] = {
    "precision-recall": _precision_recall,
    "teacher": _precision_recall,
    "equal-precision": _equal_precision,
    "parts": _parts,
    "rarity": functools.partial(_fifths, of="truth's samples"),
    "entropy": functools.partial(_fifths, of="positions in truth's samples"),
    "curves": _curves,
    "total-variation": _total_variation,
    "best-temperature": _best_temperature,
    "best-of": _best_of,
    "modes": _modes,
    "capacity": _across_sizes,
    "convergence": _across_sizes,
}


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(rows)))  # type: ignore[no-untyped-call]


def _looks(students: Sequence[str]) -> Looks:
    """Return the look of the teacher, and of each student by its place among all of them."""
    looks = {
        written(name): (
            COLORS[index % len(COLORS)], SHAPES[index % len(SHAPES)], DASHES[index % len(DASHES)]
        )
        for index, name in enumerate(students)
    }  # fmt: skip
    return {**looks, TEACHER: TEACHER_LOOK}


def _look(field: str, names: Sequence[str], looks: Looks, title: str = "") -> dict[str, Any]:
    """Return colour, shape and dash of series, which share a legend.

    Args:
        field: field of the series.
        names: the series that are drawn.
        looks: looks of the series; those of others, such as runs, follow from their order.
        title: title of the legend.
    """
    known = looks if looks.keys() >= set(names) else _looks(names)
    found: dict[str, Any] = {}
    legend = alt.Legend(columns=1 if max(map(len, names)) > LONG_NAME else 2, title=title or None)
    for index, (channel, kind) in enumerate(
        (("color", alt.Color), ("shape", alt.Shape), ("dash", alt.StrokeDash))
    ):
        scale = alt.Scale(domain=list(names), range=[known[name][index] for name in names])
        found[channel] = kind(f"{field}:N", scale=scale, legend=legend)
    return found


def _names(rows: Rows, field: str) -> list[str]:
    """Return the names in a field, in the order of the rows; `direct` comes first."""
    names = dict.fromkeys(str(row[field]) for row in rows if field in row)
    return sorted(names, key=lambda name: name != "direct")


def _axis(rows: Rows, name: str, *, ends: bool = False, zero: bool = False) -> alt.Scale:
    """Return a scale around a number and the ends of its intervals, with room on both sides."""
    low, high = (f"{name}_low", f"{name}_high") if ends else ("low", "high")
    values = [float(row[key]) for row in rows for key in (low, high) if key in row]
    values += [0.0] if zero else []
    room = MARGIN * (max(values) - min(values)) or 0.1
    return alt.Scale(domain=[min(values) - room, max(values) + room], nice=False, zero=False)


def _numbers(name: str) -> list[alt.Tooltip]:
    """Return tooltips of a number and the ends of its interval."""
    fields = [f"{name}", f"{name}_low", f"{name}_high"] if name else ["estimate", "low", "high"]
    return [alt.Tooltip(f"{field}:Q", format=".3f", title=_said(field)) for field in fields]


def _said(field: str) -> str:
    return field.replace("_", " ")


def _zoom(*encodings: Literal["x", "y"]) -> alt.Parameter:
    """Return a selection that zooms and moves the axes; the wheel alone scrolls the page."""
    return alt.selection_interval(
        bind="scales", encodings=list(encodings), zoom="wheel![event.ctrlKey || event.shiftKey]"
    )
