"""Docstrings of Python's standard library, and the first sentence of each, which sums it up.

The modules are those of the corpus `python-source`. A text is the rest of a docstring as one line,
cut to a few words, and below it the first sentence:

    Example (for a TurtleScreen instance named screen): >>> screen.window_height() 480
    => Return the height of the turtle window.
"""

import ast
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

SUMMARY = "\n=> "
MIN_REST, MAX_REST = 24, 80
"""Number of characters of what is summed up; what is longer is cut between words."""
NUM_PROMPTS = 400
"""Number of the docstrings, chosen by a digest, that are prompts."""
_FIRST_SENTENCE = re.compile(r"(.{8,60}?\.)\s+(\S.*)", re.DOTALL)


@functools.cache
def _pairs() -> dict[str, str]:
    """Return the first sentence of each docstring by the rest."""
    pairs: dict[str, str] = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for docstring in _docstrings(path):
            if match := _FIRST_SENTENCE.match(docstring):
                sentence, rest = (" ".join(part.split()) for part in match.groups())
                if len(rest) > MAX_REST:
                    rest = rest[: MAX_REST + 1].rpartition(" ")[0]
                if len(rest) >= MIN_REST:
                    pairs.setdefault(rest, sentence)
    return pairs


def _docstrings(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the library's code
        try:
            tree = ast.parse(path.read_text("utf-8", errors="replace"))
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def texts() -> list[str]:
    """Return the texts of all docstrings that have a first sentence and more."""
    return [f"{rest}{SUMMARY}{sentence}" for rest, sentence in _pairs().items()]


def prompts() -> list[dict[str, str]]:
    """Return some docstrings as lines of a file of prompts, with `text` and `reference`."""
    pairs = sorted(_pairs().items(), key=lambda p: hashlib.sha256(p[0].encode()).digest())
    return [
        {"text": f"{rest}{SUMMARY}", "reference": sentence}
        for rest, sentence in pairs[:NUM_PROMPTS]
    ]
