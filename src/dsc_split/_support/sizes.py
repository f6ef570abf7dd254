"""Read and write sizes in bytes as texts for people."""

from __future__ import annotations

import re

__all__ = ["parse_size", "size_text"]

_UNITS = {
    "": 1,
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_UNITS_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_size(text: str) -> int:
    """Return the bytes of a size: ``8GiB``, ``500 MB`` or ``1048576``; upper and lower case are the same.

    Raises:
        ValueError: The text is no size, or the size is below 1 byte or not below 2^63; the message is a full sentence.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS_BY_LOWER_CASE.get(match[2].lower()) if match else None
    if match is None or factor is None:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise ValueError(f"{text!r} is no size: a number and a unit were expected, such as 8GiB (units: {units}).")
    value = float(match[1]) * factor
    if not 1 <= value < 2**63:
        raise ValueError(f"size {text!r} is out of range: at least 1 byte and less than 2^63 are taken.")
    return round(value)


def size_text(size_bytes: int) -> str:
    """Write a size in MB (10^6 bytes), or from 10 GB in GB (10^9 bytes): ``53.6 MB``, ``12.4 GB``."""
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e10 else f"{size_bytes / 1e6:,.1f} MB"
