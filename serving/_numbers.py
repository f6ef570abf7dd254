"""Numbers that callers give: in range, or an error that says which one is not."""

from __future__ import annotations

import math
import operator

from dsc_split.errors import UsageError

__all__ = ["MAX_BYTES", "MAX_MS", "milliseconds", "moment", "number", "whole"]

MAX_MS = 1e9
"""The longest duration in milliseconds that is believed: eleven days."""
MAX_BYTES = 2**42
"""The most bytes of one transfer, as in the lookup table."""


def number(what: str, value: float, *, least: float = 0.0, most: float = math.inf, unit: str = "") -> float:
    """Give ``value`` as a number from ``least`` to ``most``.

    Raises:
        UsageError: It is no number, or out of range.
    """
    wanted = f"a number from {least:g} to {most:g}{unit and ' '}{unit} was expected."
    try:
        taken = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{what} {value!r} is no number; {wanted}") from None
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
        raise UsageError(f"{what} is 0 ms; something that was sent took more.")
    return taken


def moment(value: float) -> float:
    """Give a reading of the caller's clock in seconds.

    Raises:
        UsageError: It is no number, negative or infinite.
    """
    taken = number("time_s", value, unit="s")
    if taken == math.inf:
        raise UsageError("time_s is infinite; the seconds of a monotonic clock were expected.")
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
        raise UsageError(f"{what} {value!r} is no whole number; {wanted}") from None
    if not least <= taken <= most:
        raise UsageError(f"{what} {taken} is out of range; {wanted}")
    return taken
