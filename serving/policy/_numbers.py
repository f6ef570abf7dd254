"""Check the numbers that the policy is given: return them, or raise an error that names the wrong one."""

from __future__ import annotations

import math

from dsc_split._support import numbers
from dsc_split._support.numbers import number
from dsc_split.errors import UsageError

__all__ = ["MAX_BYTES", "MAX_MS", "milliseconds", "moment", "whole"]

MAX_MS = 1e9
"""The longest duration in milliseconds that is accepted: eleven days."""
MAX_BYTES = 2**42
"""The most bytes of one transfer, as in the lookup table."""


def milliseconds(name: str, value: object, *, above_zero: bool = False) -> float:
    """Return a duration in milliseconds.

    Raises:
        UsageError: It is no number, negative, above :data:`MAX_MS`, or 0 with ``above_zero``.
    """
    taken = number(name, value, most=MAX_MS, unit="ms")
    if above_zero and taken == 0.0:
        raise UsageError(f"{name} is 0 ms; more was expected.")
    return taken


def moment(name: str, value: object) -> float:
    """Return a reading of the caller's clock in seconds.

    Raises:
        UsageError: It is no number, negative or infinite.
    """
    taken = number(name, value, unit="s")
    if taken == math.inf:
        raise UsageError(f"{name} is infinite; the seconds of a monotonic clock were expected.")
    return taken


def whole(name: str, value: object, *, least: int = 0, most: int = MAX_BYTES, unit: str = "bytes") -> int:
    """Return ``value`` as a whole number from ``least`` to ``most``.

    Raises:
        UsageError: It is no whole number, or out of range.
    """
    return numbers.whole(name, value, least=least, most=most, expected=f"{unit} from {least} to {most} were expected")
