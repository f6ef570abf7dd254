"""How values of a document that may be damaged or hostile are refused, by place."""

from __future__ import annotations

from typing import NoReturn

from dsc_split.errors import DamagedError

__all__ = ["MAX_INTEGER", "fail", "shown"]

MAX_INTEGER = 2**53
"""Whole numbers beyond this are refused: they are not exact in every language that reads the documents."""


def fail(value: object, where: str, expected: str) -> NoReturn:
    """Raise the error that says where a value stands, and what was expected there."""
    raise DamagedError(f"{where}: got {shown(value)}; expected {expected}.")


def shown(value: object) -> str:
    """Return a value as messages show it, in at most 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no numbers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
