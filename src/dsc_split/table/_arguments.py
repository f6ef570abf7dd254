"""What a question to the lookup table may say, checked."""

from __future__ import annotations

import math
import operator

from dsc_split._support.checks import shown
from dsc_split.errors import UsageError

__all__ = ["batch_size", "finite_number", "is_p95", "number"]


def batch_size(batch: int) -> int:
    """Take a batch size: a whole number from 1."""
    try:
        size = operator.index(batch)
    except TypeError:
        raise UsageError(f"batch {shown(batch)} is no batch size; a whole number from 1 was expected.") from None
    if size < 1 or isinstance(batch, bool):
        raise UsageError(f"batch {shown(batch)} is no batch size; a whole number from 1 was expected.")
    return size


def number(what: str, unit: str, value: float) -> float:
    """Take a number from 0; infinity is one."""
    try:
        taken = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"{what} {shown(value)} is no number; {unit} from 0 were expected.") from None
    if not taken >= 0.0:
        raise UsageError(f"{what} {taken:g} is out of range; {unit} from 0 were expected.")
    return taken


def finite_number(what: str, unit: str, value: float) -> float:
    """Take a finite number from 0."""
    taken = number(what, unit, value)
    if taken == math.inf:
        raise UsageError(
            f"{what} is infinite; {unit} from 0 were expected. To leave the server out, allow 'no-offload' alone."
        )
    return taken


def is_p95(percentile: float | None) -> bool:
    """Say whether the 95th percentile is asked for, and not the median."""
    if percentile not in (None, 50, 95):
        raise UsageError(f"percentile {percentile!r} is not in the table; 50, the median, or 95 was expected.")
    return percentile == 95
