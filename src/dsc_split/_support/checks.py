"""Checks of the form of a JSON document that may be damaged or hostile: types, ranges and keys, by place.

A check takes a value and where it stands, and raises :class:`DamagedError` where it is something else than
expected. Checks of objects and lists are put together from others::

    check = fields({"name": text, "shape": items(count)}, {"notes": items(text)})
    check(document, "")
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from dsc_split.errors import DamagedError

__all__ = [
    "Check",
    "count",
    "entries",
    "fail",
    "fields",
    "flag",
    "integer",
    "items",
    "number",
    "one_of",
    "or_null",
    "positive",
    "shown",
    "some_object",
    "text",
]

MAX_INTEGER = 2**53
"""Whole numbers beyond this are refused: they are not exact in every language that reads the documents."""

Check = Callable[[Any, str], None]


def fail(value: Any, where: str, expected: str) -> NoReturn:
    """Say where something stands, and what was expected there."""
    raise DamagedError(f"{where}: got {shown(value)}; expected {expected}.")


def shown(value: Any) -> str:
    """Show a value in a message, in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


# ---- single values -----------------------------------------------------------------------------------------


def text(value: Any, where: str) -> None:
    """Take any text but an empty one."""
    if not isinstance(value, str) or not value:
        fail(value, where, "a text")


def flag(value: Any, where: str) -> None:
    """Take true and false."""
    if not isinstance(value, bool):
        fail(value, where, "true or false")


def integer(value: Any, where: str) -> None:
    """Take whole numbers."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INTEGER:
        fail(value, where, "a whole number")


def count(value: Any, where: str) -> None:
    """Take whole numbers from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
        fail(value, where, "a whole number from 0")


def positive(value: Any, where: str) -> None:
    """Take whole numbers from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_INTEGER:
        fail(value, where, "a whole number from 1")


def number(value: Any, where: str) -> None:
    """Take finite numbers from 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        fail(value, where, "a number from 0")


def some_object(value: Any, where: str) -> None:
    """Take any object."""
    if not isinstance(value, Mapping):
        fail(value, where, "an object")


# ---- values in values --------------------------------------------------------------------------------------


def one_of(*known: str) -> Check:
    """Take some texts alone."""

    def check(value: Any, where: str) -> None:
        if value not in known:
            fail(value, where, " or ".join(map(repr, known)))

    return check


def or_null(inner: Check) -> Check:
    """Take null, too."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            inner(value, where)

    return check


def items(inner: Check, *, at_least: int = 0, at_most: int | None = None) -> Check:
    """Take lists of so many items, each checked."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or len(value) < at_least or (at_most is not None and len(value) > at_most):
            limits = ", ".join(
                [*([f"at least {at_least}"] if at_least else []), *([f"at most {at_most}"] if at_most else [])]
            )
            fail(value, where, f"a list of items ({limits})" if limits else "a list")
        for i, item in enumerate(value):
            inner(item, f"{where}[{i}]")

    return check


def entries(inner: Check) -> Check:
    """Take objects with any keys, each value checked."""

    def check(value: Any, where: str) -> None:
        some_object(value, where)
        for key, item in value.items():
            inner(item, f"{where}[{key!r}]")

    return check


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Take objects with such keys, each value checked; further keys are left alone."""

    def check(value: Any, where: str) -> None:
        some_object(value, where)
        prefix = f"{where}." if where else ""
        for key, inner in required.items():
            if key not in value:
                raise DamagedError(f"{prefix}{key}: the key is missing.")
            inner(value[key], prefix + key)
        for key, inner in (optional or {}).items():
            if key in value:
                inner(value[key], prefix + key)

    return check
