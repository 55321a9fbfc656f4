"""Charts of a report, as specifications of Vega-Lite; the only module that imports its packages.

Series differ in shape and dash besides colour, so that a figure can be read in grey. A chart is as
wide as its page, or as `FILE_WIDTH` in a file.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import altair as alt
import vl_convert
from report_labels import Line, Place, Plot, Point, place_labels
from report_rows import DISTILLED, TRUTH_LINE, Figure, Row

from kdhpc.science.curves import PREFIXES
from kdhpc.types import Json

Spec = dict[str, Json]
Rows = Sequence[Row]
Layers: TypeAlias = alt.LayerChart | alt.FacetChart
"""Type of a layered chart; the second is what Altair says, and does not happen here."""
HEIGHT, FILE_WIDTH, PNG_SCALE = 380, 600, 2
PLOTS = tuple(Plot(width=width, height=HEIGHT) for width in (270, 330, FILE_WIDTH, 860))
"""Sizes of the plot of precision against recall, from a phone's to a laptop's."""
COLORS = ("#0b3c6f", "#d55e00", "#009e73", "#b05090", "#56b4e9", "#8a6d00", "#444444")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
DASHES = ([1, 0], [7, 3], [2, 2], [8, 2, 2, 2], [4, 4], [1, 3], [10, 4])
MARGIN = 0.12
"""Part of an axis that is left free at each end, for labels."""
LONG_NAME = 20
"""Characters of a name above which a legend has one column, so that a phone shows it."""
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
    chart = CHARTS[figure.name](figure.rows)
    spec: Spec = chart.to_dict()
    del spec["$schema"]  # an address; the library beside it needs none
    return spec | {
        "config": CONFIG,
        "width": "container",
        "height": HEIGHT,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": f"{figure.title}. {figure.reading}",
    }


def images(spec: Spec, title: str) -> dict[str, bytes]:
    """Draw a specification without a browser; return the bytes of a file by its suffix."""
    below = {"subtitle": spec["title"]["text"]} if "title" in spec else {}
    fixed = {name: value for name, value in spec.items() if name != "autosize"}
    fixed |= {"width": FILE_WIDTH, "title": {"text": title} | below, "background": "white"}
    svg: str = vl_convert.vegalite_to_svg(fixed)
    return {
        ".svg": svg.encode(),
        ".png": vl_convert.svg_to_png(svg, scale=PNG_SCALE),
        ".pdf": vl_convert.svg_to_pdf(svg),
    }


def library() -> str:
    """Return the JavaScript that draws specifications: Vega, Vega-Lite and Vega-Embed."""
    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # optional, unlike its stub


def _precision_recall(rows: Rows) -> Layers:
    x, y = (_axis(rows, name, ends=True) for name in ("recall", "precision"))
    rows = _with_places(rows, x, y)
    field = "run" if "run" in rows[0] else "series"
    look = _look(field, [n for n in _names(rows, field) if field == "run" or n != TRUTH_LINE])
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
    points = everything.transform_filter(f"datum.series != '{TRUTH_LINE}'")
    colour = look["color"] if field == "run" else alt.value("#333333")
    return alt.layer(
        # The first layer has both axes, as zooming takes those that it has.
        points.transform_filter("indexof(datum.series, 'along') > 0")
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
        *[
            part.transform_filter(f"datum.align == '{align}'")
            .mark_text(
                align=align, baseline="middle", fontSize=11, clip=True,
                dx=alt.expr("datum.dx"), dy=alt.expr("datum.dy"),
            )
            .encode(x=x_of, y=y_of, text="label:N", color=color)
            for part, color in ((truth, colour), (points, look["color"]))
            for align in ("left", "center", "right")
        ],
    ).add_params(_zoom("x", "y"))  # fmt: skip


def _with_places(rows: Rows, x: alt.Scale, y: alt.Scale) -> list[Row]:
    """Return the rows with the places of their labels; where there is no room, without.

    The line of truth has its label near the left end.
    """
    left, right = x.to_dict()["domain"]
    start = {"recall": left + 0.02 * (right - left)}
    rows = [row | start if row["series"] == TRUTH_LINE else row for row in rows]
    points = [row for row in rows if row["series"] != TRUTH_LINE]
    heights = [_within(row, x, y)[1] for row in rows if row["series"] == TRUTH_LINE]
    lines = [((0.0, height), (1.0, height)) for height in heights] + _lines(points, x, y)
    places = place_labels(
        [_within(row, x, y) for row in rows],
        [str(row["label"]) for row in rows],
        [*lines, *(line for row in points for line in _bars(row, x, y))],
        PLOTS,
    )
    return [
        _placed(row, place) | {"place": index}
        for index, (row, place) in enumerate(zip(rows, places, strict=True))
    ]


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


def _equal_precision(rows: Rows) -> Layers:
    return _places(
        rows, "student", "against", x_title="distilled student", zero_line=True,
        y_title="recall kept (nats per token)",
    )  # fmt: skip


def _parts(rows: Rows) -> Layers:
    return _places(
        rows, "student", "part", x_title="student", y_title="nats per token", joined=True,
        dodged=False,
    )  # fmt: skip


def _rarity(rows: Rows) -> Layers:
    return _places(
        rows, "fifth", "student", x_title="fifth of truth's samples", zero_line=True, joined=True,
        y_title="recall change (nats per token)",
    )  # fmt: skip


def _total_variation(rows: Rows) -> Layers:
    return _places(
        rows, "k", "student", x_title="number of first tokens k", y_title="total variation",
        joined=True,
    )  # fmt: skip


def _places(
    rows: Rows, across: str, series: str, *, x_title: str, y_title: str, joined: bool = False,
    zero_line: bool = False, dodged: bool = True,
) -> Layers:  # fmt: skip
    """Draw estimates with intervals at places of the x axis.

    Args:
        rows: the rows.
        across: field of the places, in the order of the rows.
        series: field of the series.
        x_title: title of the x axis.
        y_title: title of the y axis.
        joined: whether lines join the points of a series.
        zero_line: whether the axis shows 0 with a line.
        dodged: whether series are beside each other, because they may have about the same values.
    """
    look = _look(series, _names(rows, series))
    x = alt.X(
        f"{across}:O",
        title=x_title,
        sort=_names(rows, across),
        axis=alt.Axis(labelAngle=0),
        scale=alt.Scale(paddingInner=0.4, paddingOuter=0.3) if dodged else alt.Scale(padding=0.5),
    )
    offset = alt.XOffset(f"{series}:N", sort=_names(rows, series), scale=alt.Scale(padding=0.5))
    beside = {"xOffset": offset} if dodged else {}
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
            base.mark_line(strokeWidth=1.2, opacity=0.7, clip=True).encode(
                x=x, **beside, y=y, color=look["color"], strokeDash=look["dash"]
            )
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


def _curves(rows: Rows) -> Layers:
    look = _look("student", _names(rows, "student"))
    prefix = alt.param(
        name="k",
        value=SHOWN_PREFIX,
        bind=alt.binding_select(options=list(PREFIXES), name="first tokens k "),
    )
    share = alt.Scale(domain=[0, 1.02], nice=False)
    ticks = alt.Axis(tickCount=5, format=".1f")
    x = alt.X("beta:Q", title="recall beta", scale=share, axis=ticks)
    y = alt.Y("alpha:Q", title="precision alpha", scale=share, axis=ticks)
    hover = [alt.Tooltip("student:N"), alt.Tooltip("log_lambda:Q", format=".2f")]
    hover += [*_numbers("alpha"), *_numbers("beta")]
    base = _chart(rows).transform_filter("datum.k == k")
    return alt.layer(
        base.mark_area(opacity=0.15, clip=True).encode(
            x=x, y=alt.Y("alpha_low:Q"), y2="alpha_high:Q", color=look["color"]
        ),
        base.mark_line(strokeWidth=1.5, clip=True).encode(
            x=x, y=y, color=look["color"], strokeDash=look["dash"], order="log_lambda:Q"
        ),
        base.transform_filter("abs(datum.log_lambda % 1) < 0.01")
        .mark_point(filled=True, size=35, opacity=1, clip=True)
        .encode(x=x, y=y, color=look["color"], shape=look["shape"], tooltip=hover),
        title=alt.TitleParams(text=alt.expr("'the first ' + k + (k == 1 ? ' token' : ' tokens')")),
    ).add_params(prefix, _zoom("x", "y"))


def _best_temperature(rows: Rows) -> Layers:
    look = _look("student", _names(rows, "student"))
    temperatures = sorted({float(row["temperature"]) for row in rows})
    x = alt.X(
        "temperature:Q",
        title="temperature of evaluation T",
        scale=alt.Scale(zero=False, padding=20, nice=False),
        axis=alt.Axis(values=temperatures),
    )
    y = alt.Y(
        "estimate:Q", title="recall (nats per token)", scale=_axis(rows, "estimate", zero=False)
    )
    hover = [alt.Tooltip("student:N"), alt.Tooltip("temperature:Q"), *_numbers("")]
    base = _chart(rows)
    return alt.layer(
        base.mark_line(strokeWidth=1.5, clip=True).encode(
            x=x, y=y, color=look["color"], strokeDash=look["dash"]
        ),
        base.mark_rule(strokeWidth=1.5, clip=True).encode(
            x=x, y=alt.Y("low:Q"), y2="high:Q", color=look["color"]
        ),
        base.transform_filter("datum.best != ''")
        .mark_point(size=260, strokeWidth=1.5, clip=True)
        .encode(x=x, y=y, color=look["color"], tooltip=[*hover, alt.Tooltip("best:N")]),
        base.mark_point(filled=True, size=55, opacity=1, clip=True).encode(
            x=x, y=y, color=look["color"], shape=look["shape"], tooltip=hover
        ),
    ).add_params(_zoom("x", "y"))


CHARTS: Mapping[str, Callable[[Rows], Layers]] = {
    "precision-recall": _precision_recall,
    "equal-precision": _equal_precision,
    "parts": _parts,
    "rarity": _rarity,
    "curves": _curves,
    "total-variation": _total_variation,
    "best-temperature": _best_temperature,
}


def _chart(rows: Rows) -> alt.Chart:
    return alt.Chart(alt.Data(values=list(rows)))  # type: ignore[no-untyped-call]


def _look(field: str, names: Sequence[str]) -> dict[str, Any]:
    """Return colour, shape and dash of series, which share a legend."""
    found: dict[str, Any] = {}
    legend = alt.Legend(columns=1 if max(map(len, names)) > LONG_NAME else 2)
    for channel, kind, choices in (
        ("color", alt.Color, COLORS),
        ("shape", alt.Shape, SHAPES),
        ("dash", alt.StrokeDash, DASHES),
    ):
        chosen = [choices[index % len(choices)] for index in range(len(names))]
        scale = alt.Scale(domain=list(names), range=chosen)
        found[channel] = kind(f"{field}:N", scale=scale, legend=legend)
    return found


def _names(rows: Rows, field: str) -> list[str]:
    """Return the names in a field, in the order of the rows; students along tau come first."""
    names = dict.fromkeys(str(row[field]) for row in rows)
    return sorted(names, key=lambda name: name != DISTILLED)


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
