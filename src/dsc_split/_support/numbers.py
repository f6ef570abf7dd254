"""Check numbers from a caller: return the number, or raise an error that names it and what was expected.

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
    """Return a number, or ``None`` for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def as_float(value: object) -> float | None:
    """Return a number as a plain float; ``None`` where it is no number.

    Numbers of numpy are accepted. Texts, ``Decimal``, booleans, and whole numbers too large for binary64 are not.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def as_int(value: object) -> int | None:
    """Return a whole number as a plain int; ``None`` for other values, such as booleans and 1.0."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # other types raise TypeError
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
        name: Name of the number, for the message.
        value: The number.
        least: Smallest allowed number.
        above: Number that ``value`` must be larger than.
        most: Largest allowed number; by default infinity is allowed. NaN never is.
        unit: Unit of the number, for the message.
        expected: The end of the message; default: the range.

    Raises:
        UsageError: The value is no number, or out of range.
    """
    checked = value if type(value) is float else as_float(value)
    if checked is not None and least <= checked <= most and checked > above:
        return checked
    expected = expected or f"a number from {least:g} to {most:g}{unit and ' '}{unit} was expected"
    if checked is None:
        raise UsageError(f"{name} {shown(value)} is no number; {expected}.")
    raise UsageError(f"{name} {checked:g}{unit and ' '}{unit} is out of range; {expected}.")


def whole(name: str, value: object, *, least: int = 0, most: int, expected: str) -> int:
    """Return ``value`` as a plain int from ``least`` to ``most``.

    Args:
        name: Name of the number, for the message.
        value: The number.
        least: Smallest allowed number.
        most: Largest allowed number.
        expected: The end of the message: ``a whole number from 1 was expected``.

    Raises:
        UsageError: The value is no whole number, or out of range.
    """
    checked = as_int(value)
    if checked is None:
        raise UsageError(f"{name} {shown(value)} is no whole number; {expected}.")
    if not least <= checked <= most:
        raise UsageError(f"{name} {shown(checked)} is out of range; {expected}.")
    return checked


def store_checked(record: object, name: str, check: Callable[..., object], **limits: object) -> None:
    """Check a field of a frozen record, and replace its value by the number that the check returns.

    ::

        store_checked(self, "hysteresis", number, most=1.0)

    Raises:
        UsageError: The check refuses the value.
    """
    object.__setattr__(record, name, check(name, getattr(record, name), **limits))
