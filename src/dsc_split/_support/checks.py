"""Refuse values of a document that may be damaged or hostile; messages name their place."""

from __future__ import annotations

from typing import NoReturn

from dsc_split.errors import DamagedError

__all__ = ["MAX_INTEGER", "fail", "shown"]

MAX_INTEGER = 2**53
"""Largest whole number that is accepted: larger ones are not exact in every language that reads the documents."""


def fail(value: object, where: str, expected: str) -> NoReturn:
    """Raise ``DamagedError`` for a wrong value; ``where`` is its place: ``splits[0].name``."""
    raise DamagedError(f"{where}: got {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """Return a value's text for messages, at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
