"""Types that the whole project shares."""

from typing import Any, TypeAlias

Json: TypeAlias = Any
"""A number, string, bool, None, or a list or dict of these, as it comes from a JSON file."""
