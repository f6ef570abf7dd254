"""Check the arguments of a question to the lookup table."""

from __future__ import annotations

import math
from collections.abc import Iterable

from dsc_split._support.checks import shown
from dsc_split._support.numbers import as_int, number
from dsc_split.errors import UsageError

__all__ = ["batch_size", "data_rate", "finite_number", "is_p95", "named_choices"]


def batch_size(batch: object) -> int:
    """Return a batch size as a plain int.

    Raises:
        UsageError: It is no whole number from 1.
    """
    size = as_int(batch)
    if size is None or size < 1:
        raise UsageError(f"batch {shown(batch)} is no batch size; a whole number from 1 was expected.")
    return size


def data_rate(name: str, value: object) -> float:
    """Return a data rate in MB/s as a plain float.

    Raises:
        UsageError: It is no number from 0; infinity is one.
    """
    return number(name, value, expected="MB/s from 0 were expected")


def finite_number(name: str, unit: str, value: object) -> float:
    """Return a number as a plain float.

    Raises:
        UsageError: It is no finite number from 0.
    """
    checked = number(name, value, expected=f"{unit} from 0 were expected")
    if checked == math.inf:
        raise UsageError(
            f"{name} is infinite; {unit} from 0 were expected. To leave the server out, allow 'no-offload' alone."
        )
    return checked


def is_p95(percentile: float | None) -> bool:
    """Return whether a percentile is 95, and not 50 or ``None``.

    Raises:
        UsageError: It is another percentile.
    """
    if percentile not in (None, 50, 95):
        raise UsageError(f"percentile {shown(percentile)} is not in the table; 50, the median, or 95 was expected.")
    return percentile == 95


def named_choices(allow: Iterable[str | int]) -> tuple[str | int, ...]:
    """Return the names and ids of a mask as a tuple, without checking that such choices exist.

    Raises:
        UsageError: The mask is a text, or no collection.
    """
    if isinstance(allow, str):
        raise UsageError(f"'allow' takes a collection of choices; got the text {allow!r}. Write [{allow!r}].")
    if not isinstance(allow, Iterable):
        raise UsageError(f"'allow' takes a collection of choices, by name or id; got {allow!r}.")
    return tuple(allow)
