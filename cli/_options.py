"""Parsers of option values that several commands share; their errors name the value and what was expected.

They are for ``typer.Option(parser=...)``::

    batches: Annotated[Parsed, typer.Option(parser=positive_integers, metavar="N,...")] = None
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import typer

from dsc_split._support.sizes import parse_size

__all__ = ["Parsed", "number", "positive_integers", "positive_numbers", "size_bytes"]

Parsed = Any
"""Type of an option whose parser returns a tuple or a dictionary: Typer would read ``tuple[int, ...]`` differently."""
MAX_INTEGER = 2**31 - 1
"""A larger batch size or thread count is a typing error."""


def size_bytes(text: str) -> int:
    """Parse a size, ``8GiB``, ``500 MB`` or ``1048576``, into bytes.

    Raises:
        typer.BadParameter: The text is not a size, or it is zero.
    """
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def positive_integers(text: str) -> tuple[int, ...]:
    """Parse ``1,2,4`` into whole numbers from 1, sorted, each once.

    Raises:
        typer.BadParameter: The text is not such a list.
    """
    numbers = set()
    for item in _split_list(text, "1,2,4"):
        if not re.fullmatch(r"[0-9]+", item) or not 1 <= int(item) <= MAX_INTEGER:
            raise typer.BadParameter(
                f"{item!r} in {text!r} is no whole number from 1; a list such as 1,2,4 was expected."
            )
        numbers.add(int(item))
    return tuple(sorted(numbers))


def positive_numbers(text: str) -> tuple[float, ...]:
    """Parse ``0.5,1,2`` into finite numbers above 0, sorted, each once.

    Raises:
        typer.BadParameter: The text is not such a list.
    """
    parse = number(above=0.0)
    return tuple(sorted({parse(item) for item in _split_list(text, "0.5,1,2")}))


def number(
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    infinite: bool = False,
) -> Callable[[str], float]:
    """Make a parser of numbers in a range. NaN is never in a range.

    Args:
        at_least: The smallest allowed value.
        above: All allowed values are larger than this.
        at_most: The largest allowed value.
        infinite: Whether ``inf`` is allowed.

    Returns:
        A function for ``typer.Option(parser=...)``.
    """
    limits = [
        *([f"at least {at_least:g}"] if at_least > -math.inf else []),
        *([f"above {above:g}"] if above > -math.inf else []),
        *([f"at most {at_most:g}"] if at_most < math.inf else []),
        *([] if infinite else ["finite"]),
    ]
    expected = f"a number ({', '.join(limits)})" if limits else "a number"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is no number: {expected} was expected.") from None
        inside = value >= at_least and value > above and value <= at_most
        if not inside or (math.isinf(value) and not infinite):
            raise typer.BadParameter(f"{text!r} is out of range: {expected} was expected.")
        return value

    parse.__name__ = "number"
    return parse


def _split_list(text: str, example: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    if "" in items:
        raise typer.BadParameter(f"{text!r} is no list: numbers with commas between were expected, such as {example}.")
    return items
