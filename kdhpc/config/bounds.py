"""Bounds of config values, written into their types, and the one function that checks them."""

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
    """Marks a string that must match a regular expression as a whole."""

    expression: str
    """The regular expression."""
    meaning: str
    """Describes the strings that match; it follows the word "expected" in the error."""


Count = Annotated[int, Ge(1)]
"""An integer of at least 1."""
AtLeastTwo = Annotated[int, Ge(2)]
"""An integer of at least 2, for fields where 1 would leave nothing to run, predict or fit."""
Whole = Annotated[int, Ge(0)]
"""An integer of at least 0."""
Positive = Annotated[float, Gt(0)]
"""A number greater than 0."""
NotNegative = Annotated[float, Ge(0)]
"""A number of at least 0."""
Fraction = Annotated[float, Interval(ge=0, le=1)]
"""A number from 0 to 1, both included."""
DecayRate = Annotated[float, Interval(ge=0, lt=1)]
"""Decay rate of a moving average, from 0 to below 1; at 1 new values would never count."""
ZeroStage = Annotated[int, Interval(ge=0, le=3)]
"""One of DeepSpeed's ZeRO stages."""
Word = Annotated[str, Pattern(r"[^\s\"'\\]+", "a word without spaces, quotes or backslashes")]
"""A string that is copied unquoted into a line of the batch script."""


def out_of_bounds(value: object, hint: object, key: str = "") -> Iterator[str]:
    """Yield one line for every value that its type forbids: key, value and what was expected.

    Args:
        value: a config, or a part of one.
        hint: the type of `value`. If it is a dataclass, only the fields of that class are checked,
            even where `value` belongs to a subclass with more fields.
        key: dotted path of the value in the config; empty for a whole config.
    """
    if isinstance(hint, type) and is_dataclass(hint):
        hints = get_type_hints(hint, include_extras=True)
        for name in (known.name for known in fields(hint)):
            field_key = f"{key}.{name}" if key else name
            yield from out_of_bounds(getattr(value, name), hints[name], field_key)
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
    """Yield the same lines for the items of a tuple, which have no keys of their own."""
    if Ellipsis in hints:
        hints = hints[:1] * len(items)
    for item, hint in zip(items, hints, strict=True):
        if expected := _unmet(item, hint):
            yield f"{key}={list(items)}: expected every item to be {expected}, got {item!r}"


def _unmet(value: object, hint: object) -> str:
    """Describe what a type demands if the value violates any part of it; else return ''."""
    if get_origin(hint) is not Annotated:
        return ""
    checks = [_check_mark(value, mark) for mark in _single(get_args(hint)[1:])]
    finite = not isinstance(value, float) or math.isfinite(value)
    if finite and all(met for met, _ in checks):
        return ""
    return " and ".join([*(demand for _, demand in checks), *([] if finite else ["finite"])])


def _single(marks: Iterable[object]) -> Iterator[object]:
    """Yield every mark by itself; an interval is split into its two bounds."""
    for mark in marks:
        if isinstance(mark, GroupedMetadata):
            yield from mark
        else:
            yield mark


def _check_mark(value: object, mark: object) -> tuple[bool, str]:
    """Return whether a value meets a mark, and what the mark demands, in words."""
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
    raise TypeError(f"{mark!r}: no check knows what this mark demands of {value!r}")


def list_problems(name: str, values: tuple[float, ...], example: str) -> Iterator[str]:
    """Yield what is wrong with a list of temperatures (tau) or sharpenings (beta) as a whole."""
    if not values:
        yield f"{name}s=[]: expected at least one {name}, such as {name}s={example}"
    for value in repeated(f"{value:g}" for value in values):
        yield f"{name}s={list(values)}: duplicate {name} {value}"


def name_problems(key: str, names: Iterable[str]) -> Iterator[str]:
    """Yield what is wrong with names that become parts of file names."""
    for name in names:
        if not name.replace("_", "").replace("-", "").isalnum():
            yield f"{key}.{name}: expected a name of letters, digits, - and _"


def repeated(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in Counter(names).items() if count > 1]


def refuse(problems: Iterable[str]) -> None:
    """Raise the first problem of a config, if it has any.

    Raises:
        InputError: its message is the first line of `problems`.
    """
    for problem in problems:
        raise InputError(problem)
