"""How the texts of a report are written: minus signs, percentages, tau, and unbroken intervals."""

import re
from html import escape

MINUS, SPACE = "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
REPLACEMENTS = (
    (re.compile(r"(?<![\w.)\]-])-(?=\.?\d|precision\b|log\b)"), MINUS),
    (re.compile(r"(?<= )-(?= )"), MINUS),
    (re.compile(r"(?<=\d) ?%"), f"{SPACE}%"),
    (re.compile(r"\btau-(?=\d)|\N{GREEK SMALL LETTER TAU} ?(?=\d)"), "tau "),
)
NAMED_NUMBER = re.compile(r"(?:(?<=\btau)|(?<=\bT)) (?=\d)")
NUMBER = rf"[+{MINUS}]?[\d.]+"
INTERVAL = re.compile(rf"(?:{NUMBER} )?\[{NUMBER}, {NUMBER}\]")
"""An interval, with the estimate before it if there is one."""


def written(text: str) -> str:
    """Return a text with real minus signs, unbroken percentages, and `tau 0.8` for each tau."""
    for pattern, replacement in REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text


def to_html(text: str) -> str:
    """Return a written text as HTML in which no line breaks inside an interval or `tau 0.8`."""
    kept = NAMED_NUMBER.sub(SPACE, escape(written(text)))
    return INTERVAL.sub(r'<span class="number">\g<0></span>', kept)


def value_text(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """Return a number with its interval, such as `-0.183 [-0.239, -0.127]`."""
    return f"{value:{'+' if sign else ''}.3f} [{low:.3f}, {high:.3f}]"
