"""Types that the whole project shares."""

from typing import Any, Literal, TypeAlias

Json: TypeAlias = Any
"""A number, string, bool or None, or a list or dict of these, as read from a JSON file."""
Corruption: TypeAlias = Literal["swap", "drop", "repeat"]
"""What is done to one token of a sequence: exchanged with the next one, taken away, said twice."""
