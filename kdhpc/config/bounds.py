"""What a value may be, as part of its type, and the one function that checks it."""

import math
import operator
import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Union, get_args, get_origin, get_type_hints

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Interval, Le, Lt

from kdhpc.errors import InputError


@dataclass(frozen=True)
class Pattern(BaseMetadata):
    """Marks a text that has to match as a whole."""

    expression: str
    """A regular expression."""
    meaning: str
    """What it lets through, to follow "expected"."""


Count = Annotated[int, Ge(1)]
"""At least one."""
AtLeastTwo = Annotated[int, Ge(2)]
"""At least two: one alone would leave nothing to run, predict or fit."""
Whole = Annotated[int, Ge(0)]
"""A number of things of which there may be none."""
Positive = Annotated[float, Gt(0)]
"""More than 0."""
NotNegative = Annotated[float, Ge(0)]
"""0 or more."""
Fraction = Annotated[float, Interval(ge=0, le=1)]
"""Part of a whole: none of it, all of it, or between."""
DecayRate = Annotated[float, Interval(ge=0, lt=1)]
"""What a moving average keeps of itself; with all of it, nothing new would ever count."""
ZeroStage = Annotated[int, Interval(ge=0, le=3)]
"""One of DeepSpeed's ZeRO stages."""
Word = Annotated[str, Pattern(r"[^\s\"'\\]+", "a word without spaces, quotes or backslashes")]
"""Text that stands as it is in a line of the batch script."""


def out_of_bounds(value: object, hint: object, key: str = "") -> Iterator[str]:
    """A line for every value that its type forbids: its key, the value, what is expected.

    Args:
        value: a config, or a part of one.
        hint: its type. Of a config, only the fields that this class knows are looked at.
        key: where the value stands in the config; nothing for a whole config.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for name in (known.name for known in fields(hint)):
            there = f"{key}.{name}" if key else name
            yield from out_of_bounds(getattr(value, name), hints[name], there)
    elif get_origin(hint) in {Union, types.UnionType}:
        for kind in get_args(hint) if value is not None else ():
            yield from out_of_bounds(value, kind, key)
    elif get_origin(hint) is dict and isinstance(value, dict):
        for name, item in value.items():
            yield from out_of_bounds(item, get_args(hint)[1], f"{key}.{name}")
    elif get_origin(hint) is tuple and isinstance(value, tuple):
        yield from _items_out_of_bounds(value, get_args(hint), key)
    elif expected := _unmet(value, hint):
        shown = repr(value) if isinstance(value, str) else value
        yield f"{key}={shown}: expected {expected}"


def _items_out_of_bounds(
    items: tuple[object, ...], hints: tuple[object, ...], key: str
) -> Iterator[str]:
    """The same for a tuple, whose items have no keys of their own."""
    if Ellipsis in hints:
        hints = hints[:1] * len(items)
    for item, hint in zip(items, hints, strict=True):
        if expected := _unmet(item, hint):
            yield f"{key}={list(items)}: expected every item to be {expected}, got {item}"


def _unmet(value: object, hint: object) -> str:
    """What the marks of a type demand, if the value does not meet all of it; else nothing."""
    if get_origin(hint) is not Annotated:
        return ""
    judged = [_judged(value, mark) for mark in _single(get_args(hint)[1:])]
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and all(met for met, _ in judged):
        return ""
    return " and ".join([*(words for _, words in judged), *([] if finite else ["finite"])])


def _single(marks: Iterable[object]) -> Iterator[object]:
    """Every mark by itself: an interval is two."""
    for mark in marks:
        if isinstance(mark, GroupedMetadata):
            yield from mark
        else:
            yield mark


def _judged(value: object, mark: object) -> tuple[bool, str]:
    """Whether a value meets a mark, and what the mark demands, in words."""
    if isinstance(mark, Pattern) and isinstance(value, str):
        return re.fullmatch(mark.expression, value) is not None, mark.meaning
    if isinstance(value, int | float):
        match mark:
            case Ge(low):
                return operator.ge(value, low), f"at least {low}"
            case Gt(low):
                return operator.gt(value, low), f"more than {low}"
            case Le(high):
                return operator.le(value, high), f"at most {high}"
            case Lt(high):
                return operator.lt(value, high), f"less than {high}"
    raise TypeError(f"{mark!r}: no check knows what this demands of {value!r}")


def list_problems(name: str, values: tuple[float, ...], example: str) -> Iterator[str]:
    """What is wrong with a list of temperatures or sharpenings as a whole."""
    if not values:
        yield f"{name}s=[]: expected at least one {name}, such as {name}s={example}"
    for value in repeated(f"{value:g}" for value in values):
        yield f"{name}s={list(values)}: duplicate {name} {value}"


def name_problems(key: str, names: Iterable[str]) -> Iterator[str]:
    """What is wrong with names that become parts of file names."""
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():
            yield f"{key}.{name}: expected a name of letters, digits, - and _"


def repeated(names: Iterable[str]) -> list[str]:
    """Names that come more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def refuse(problems: Iterable[str]) -> None:
    """Refuse a config for the first of its problems, if it has any.

    Raises:
        InputError: which is that line.
    """
    for problem in problems:
        raise InputError(problem)
