"""The page of a report: one HTML file that needs nothing else, neither files nor a network."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from report_rows import Figure
from report_run import LineOf, Table, table_of
from report_text import to_html
from verdicts import Verdict, claim_of

from kdhpc.types import Json

HANDLING = (
    "Hover over a point for its numbers. Dragging moves the axes, the wheel with Ctrl or Shift "
    "zooms, a double click resets."
)
POLICY = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'"
"""What a browser lets the page do: run and show what is in it, and load nothing. Vega compiles its
expressions, which counts as eval."""
STYLE = """
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 1060px; padding: 0 16px 48px; overflow-wrap: break-word }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 28px 0 4px }
h2 { font-size: 1.25rem; margin: 44px 0 8px; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05rem; margin: 28px 0 4px }
p { margin: 4px 0 10px; max-width: 76ch }
.small, figcaption { color: #555; font-size: .875rem }
.verdict { display: grid; grid-template-columns: 7.5rem 1fr; gap: 2px 12px; padding: 10px 0;
  border-bottom: 1px solid #e5e5e5 }
.verdict p { margin: 0; grid-column: 2 }
.claim { font-weight: 600 }
.decision { font-weight: 700; white-space: nowrap } .verdict .decision { grid-row: 1 / span 2 }
@media (max-width: 600px) { .verdict { grid-template-columns: 1fr }
  .verdict p, .verdict .decision { grid-column: 1; grid-row: auto } }
.decision::before { content: attr(data-mark); margin-right: 6px }
.holds { color: #00664d } .fails { color: #a33c00 } .undecided { color: #555 }
figure { margin: 8px 0 36px } figcaption { margin-top: 2px }
.chart { width: 100%; max-width: 900px } .vega-embed { width: 100% }
.vega-bindings { margin-bottom: 4px } .vega-bindings select { font: inherit; padding: 2px 6px }
.wide { overflow-x: auto; margin-bottom: 16px }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid #e5e5e5;
  vertical-align: top } th { color: #555; font-weight: 600 }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 16px }
.texts pre, details pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .78rem;
  line-height: 1.4; margin: 0 0 8px; padding: 8px; background: #f5f5f5 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; font-size: .875rem }
.number { white-space: nowrap }
summary { cursor: pointer; color: #555; font-size: .875rem } details { margin: 8px 0 }
dt { color: #555 } dd { margin: 0; overflow-wrap: anywhere }
ul { padding-left: 1.2rem } li { max-width: 76ch; margin-bottom: 4px }
"""
DRAW = """
for (const part of document.querySelectorAll(".chart")) {
  const spec = JSON.parse(part.nextElementSibling.textContent);
  vegaEmbed(part, spec, {mode: "vega-lite", renderer: "svg", actions: false});
}
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details.numbers")) part.open = true;
});
"""
MARKS = {"holds": "\N{CHECK MARK}", "fails": "\N{MULTIPLICATION SIGN}", "undecided": "?"}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A figure, and its specification and files; without them the run lacks its scores."""

    figure: Figure
    spec: Json = None
    files: tuple[str, ...] = ()
    """Names of the files beside the page."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a page: a heading, and HTML below it."""

    heading: str
    body: str


def page(title: str, about: Sequence[str], parts: Iterable[Part], chart_code: str) -> str:
    """Return a whole page.

    Args:
        title: title of the page.
        about: sentences below it.
        parts: the parts, in order; those without a body are left out.
        chart_code: JavaScript that draws the charts.
    """
    shown = "\n".join(f"<h2>{escape(p.heading)}</h2>\n{p.body}" for p in parts if p.body)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{paragraphs(about)}
{shown}
<script>{_inside(chart_code)}</script>
<script>{DRAW}</script>
</body>
</html>
"""


def _inside(script: str) -> str:
    """Return JavaScript or JSON that does not end the element that it is in."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def paragraphs(lines: Iterable[str], style: str = "") -> str:
    """Return each line as a paragraph."""
    attribute = f' class="{style}"' if style else ""
    return "\n".join(f"<p{attribute}>{to_html(line)}</p>" for line in lines)


def verdict_part(verdicts: Sequence[Verdict], *, several: bool) -> str:
    """Return verdicts: the decision, the claim, and what the numbers say.

    Args:
        verdicts: the verdicts.
        several: whether the run has several sizes of students, so that claims name them.
    """
    return "\n".join(_verdict(verdict, several) for verdict in verdicts)


def _verdict(verdict: Verdict, several: bool) -> str:
    return f"""<div class="verdict">
{decision_of(verdict)}
<p class="claim">{to_html(claim_of(verdict, several=several))}</p>
<p>{to_html(verdict.sentence)}</p>
</div>"""


def decision_of(verdict: Verdict) -> str:
    """Return a decision as a word with a mark, which tell it apart without colour."""
    word = verdict.decision
    return f'<span class="decision {word}" data-mark="{MARKS[word]}">{word}</span>'


def figure_part(drawn: Iterable[Drawn]) -> str:
    """Return figures, each with how to read it, or one line that says what it needs."""
    return "\n".join(_figure(each) for each in drawn)


def _figure(drawn: Drawn) -> str:
    figure = drawn.figure
    heading = f"<h3>{to_html(figure.title)}</h3>"
    if drawn.spec is None:
        return f"{heading}\n{paragraphs([f'Not drawn: it needs {figure.needs}.'], 'small')}"
    links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in drawn.files)
    spec = _inside(json.dumps(drawn.spec, separators=(",", ":")))
    return f"""{heading}
{paragraphs([figure.reading])}
<figure>
<div class="chart"></div>
<script type="application/json">{spec}</script>
{paragraphs(figure.notes, "small")}
{_numbers(figure)}<figcaption>In the folder of the page; they do not travel with it: \
{links}</figcaption>
</figure>"""


def _numbers(figure: Figure) -> str:
    if not figure.numbers:
        return ""
    content = table_of("", figure.numbers)
    title = "The numbers of this figure, with 95 % intervals"
    return (
        f'<details class="numbers"><summary>{to_html(title)}</summary>{_grid(content)}</details>\n'
    )


def table(content: Table) -> str:
    """Return a table, which scrolls by itself if it is wider than the page."""
    note = paragraphs([content.note], "small") if content.note else ""
    return f"<h3>{to_html(content.title)}</h3>\n{note}{_grid(content)}"


def _grid(content: Table) -> str:
    rows = [[to_html(cell) for cell in row] for row in content.rows]
    return _html_grid([to_html(name) for name in content.columns], rows)


def _html_grid(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the lines of a table whose head and cells are HTML already."""
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"""<div class="wide"><table>
<tr>{"".join(f"<th>{name}</th>" for name in head)}</tr>
{body}
</table></div>"""


def text_part(texts: Mapping[str, Sequence[str]]) -> str:
    """Return texts side by side, a column for each model."""
    columns = "\n".join(
        f"<div><h3>{to_html(name)}</h3>{''.join(f'<pre>{escape(t)}</pre>' for t in of_model)}</div>"
        for name, of_model in texts.items()
    )
    return f'<div class="texts">{columns}</div>' if texts else ""


def list_part(lines: Iterable[str]) -> str:
    """Return lines as a list."""
    return f"<ul>{''.join(f'<li>{to_html(line)}</li>' for line in lines)}</ul>"


def fact_part(facts: Iterable[LineOf]) -> str:
    """Return names and values."""
    lines = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts)
    return f"<dl>{lines}</dl>" if lines else ""


def folded(title: str, text: str) -> str:
    """Return a text that is shown after a click on its title."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def compared_part(by_run: Mapping[str, Sequence[Verdict]]) -> str:
    """Return a table of the verdicts of several runs, a row for each claim."""
    found = {run: {_key(v): v for v in verdicts} for run, verdicts in by_run.items()}
    claims = {_key(v): v for verdicts in by_run.values() for v in verdicts}
    sizes = {verdict.size for verdict in claims.values()}
    head = [escape(name) for name in ("claim", *by_run)]
    rows = [
        [to_html(claim_of(verdict, several=len(sizes) > 1))]
        + [_cell(of_run.get(key)) for of_run in found.values()]
        for key, verdict in claims.items()
    ]
    return f"<h3>The same claims in each run</h3>\n{_html_grid(head, rows)}"


def _key(verdict: Verdict) -> LineOf:
    return verdict.size, verdict.name


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return '<span class="small">not known</span>'
    return f"{decision_of(verdict)}<br>{to_html(verdict.sentence)}"
