"""Types that the whole project shares."""

from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A number, string, bool or None, or a list or dict of these, as read from a JSON file."""
