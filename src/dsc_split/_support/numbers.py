"""Checks of numbers that a caller gives: return the number, or raise an error that names it and what was expected.

::

    number("rtt_ms", "20", unit="ms")  # UsageError: rtt_ms '20' is no number; a number from 0 to inf ms was expected.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable

from dsc_split._support.checks import shown
from dsc_split.errors import UsageError

__all__ = ["as_float", "as_int", "finite_or_none", "number", "store_checked", "whole"]


def finite_or_none(value: float) -> float | None:
    """Return the number, or ``None`` where it is infinite or NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def as_float(value: object) -> float | None:
    """Return a number as a plain float; ``None`` where it is no number.

    Numbers of numpy are numbers. A text, a ``Decimal``, true and false, and a whole number beyond binary64 are none.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_int(value: object) -> int | None:
    """Return a whole number as a plain int; ``None`` where it is none. True, false and 1.0 are none."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # what cannot be converted raises
    except TypeError:
        return None


def number(
    name: str,
    value: object,
    *,
    least: float = 0.0,
    above: float = -math.inf,
    most: float = math.inf,
    unit: str = "",
    expected: str = "",
) -> float:
    """Return ``value`` as a plain float in a range.

    Args:
        name: What the number is, for the message.
        value: The number.
        least: Smallest number taken.
        above: Every number taken is larger than this.
        most: Largest number taken; infinity is taken by default, NaN never.
        unit: Unit of the number, for the message.
        expected: What was expected, in words; default: the range.

    Raises:
        UsageError: It is no number, or out of range.
    """
    taken = value if type(value) is float else as_float(value)
    if taken is not None and least <= taken <= most and taken > above:
        return taken
    expected = expected or f"a number from {least:g} to {most:g}{unit and ' '}{unit} was expected"
    if taken is None:
        raise UsageError(f"{name} {shown(value)} is no number; {expected}.")
    raise UsageError(f"{name} {taken:g}{unit and ' '}{unit} is out of range; {expected}.")


def whole(name: str, value: object, *, least: int = 0, most: int, expected: str) -> int:
    """Return ``value`` as a plain int from ``least`` to ``most``.

    Args:
        name: What the number is, for the message.
        value: The number.
        least: Smallest number taken.
        most: Largest number taken.
        expected: What was expected, in words.

    Raises:
        UsageError: It is no whole number, or out of range.
    """
    taken = as_int(value)
    if taken is None:
        raise UsageError(f"{name} {shown(value)} is no whole number; {expected}.")
    if not least <= taken <= most:
        raise UsageError(f"{name} {shown(taken)} is out of range; {expected}.")
    return taken


def store_checked(record: object, name: str, check: Callable[..., object], **limits: object) -> None:
    """Check a field of a frozen record, and store the plain number that the check returns.

    ::

        store_checked(self, "hysteresis", number, most=1.0)

    Raises:
        UsageError: The field is not what the check wants.
    """
    object.__setattr__(record, name, check(name, getattr(record, name), **limits))
