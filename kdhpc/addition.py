"""Sums of two numbers with the carries written out: a task whose answers can be checked.

A text is `47+85=`, a line for each column from the right with its carry, and the sum:

    47+85=
    7+5=12
    4+8+1=13
    132
"""

import hashlib

NUMBERS = range(10, 100)
NUM_PROMPTS = 400
"""Number of the problems, chosen by a digest, that are prompts."""


def text_of(first: int, second: int) -> str:
    """Return the whole text of a problem."""
    lines, carry = [f"{first}+{second}="], 0
    for place in range(2):
        one, other = (number // 10**place % 10 for number in (first, second))
        carried = f"+{carry}" if place else ""
        total = one + other + carry
        lines.append(f"{one}+{other}{carried}={total}")
        carry = total // 10
    return "\n".join([*lines, str(first + second)])


def texts() -> list[str]:
    """Return the texts of all problems."""
    return [text_of(first, second) for first in NUMBERS for second in NUMBERS]


def prompts() -> list[dict[str, str]]:
    """Return some problems as lines of a file of prompts, with `text` and `answer`."""
    problems = [(first, second) for first in NUMBERS for second in NUMBERS]
    problems.sort(key=lambda problem: hashlib.sha256(repr(problem).encode()).digest())
    return [
        {"text": f"{first}+{second}=\n", "answer": str(first + second)}
        for first, second in problems[:NUM_PROMPTS]
    ]
