"""Numbers that callers give: in range, or an error that says which one is not."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

from dsc_split.errors import UsageError

__all__ = ["MAX_BYTES", "MAX_MS", "checked", "milliseconds", "moment", "number", "whole"]

MAX_MS = 1e9
"""The longest duration in milliseconds that is believed: eleven days."""
MAX_BYTES = 2**42
"""The most bytes of one transfer, as in the lookup table."""


def checked(record: object, name: str, check: Callable[..., object], **limits: Any) -> None:
    """Check a field of a frozen record, and store what the check gives: plain Python numbers.

    Raises:
        UsageError: The field is not what the check wants.
    """
    object.__setattr__(record, name, check(name, getattr(record, name), **limits))


def number(what: str, value: float, *, least: float = 0.0, most: float = math.inf, unit: str = "") -> float:
    """Give ``value`` as a number from ``least`` to ``most``.

    Raises:
        UsageError: It is no number, or out of range.
    """
    wanted = f"a number from {least:g} to {most:g}{unit and ' '}{unit} was expected."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{what} {value!r} is no number; {wanted}")
    try:
        taken = float(value)
    except OverflowError:
        taken = math.inf if value > 0 else -math.inf
    if not least <= taken <= most:
        raise UsageError(f"{what} {taken:g} is out of range; {wanted}")
    return taken


def milliseconds(what: str, value: float, *, above_zero: bool = False) -> float:
    """Give a duration in milliseconds.

    Raises:
        UsageError: It is no number, negative, 0 where more is needed, or longer than anything that is measured.
    """
    taken = number(what, value, most=MAX_MS, unit="ms")
    if above_zero and taken == 0.0:
        raise UsageError(f"{what} is 0 ms; more was expected.")
    return taken


def moment(what: str, value: float) -> float:
    """Give a reading of the caller's clock in seconds.

    Raises:
        UsageError: It is no number, negative or infinite.
    """
    taken = number(what, value, unit="s")
    if taken == math.inf:
        raise UsageError(f"{what} is infinite; the seconds of a monotonic clock were expected.")
    return taken


def whole(what: str, value: int, *, least: int = 0, most: int = MAX_BYTES, unit: str = "bytes") -> int:
    """Give ``value`` as a whole number from ``least`` to ``most``.

    Raises:
        UsageError: It is no whole number, or out of range.
    """
    wanted = f"{unit} from {least} to {most} were expected."
    try:
        taken = operator.index(value)
    except TypeError:
        taken = None
    if taken is None or isinstance(value, bool):
        raise UsageError(f"{what} {value!r} is no whole number; {wanted}")
    if not least <= taken <= most:
        raise UsageError(f"{what} {taken} is out of range; {wanted}")
    return taken
