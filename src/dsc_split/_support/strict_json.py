"""Read JSON that may be damaged or hostile, and write it in the canonical form that digests are computed from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from dsc_split._support.files import write_bytes
from dsc_split._support.hashing import sha256_text
from dsc_split.errors import DamagedError

__all__ = ["body_digest", "canonical_json", "read_json", "write_json"]

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Largest file, unless the caller gives another limit; larger ones are refused before they are parsed."""
MAX_JSON_DEPTH = 64
"""Most levels of nested objects and lists."""
_BOM = b"\xef\xbb\xbf"
_MAX_DIGITS = 308
"""Every whole number of at most so many digits is in the range of binary64."""
_ZEROS = bytes.maketrans(b"123456789", b"000000000")


def write_json(path: Path, document: object) -> None:
    """Write ``document`` to ``path`` as indented JSON, all or nothing; NaN and infinity raise ``ValueError``."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def canonical_json(document: object) -> bytes:
    """Return ``document`` in canonical form, from which digests are computed: sorted keys, no blanks, ASCII, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def body_digest(body: object) -> str:
    """Return the SHA-256 of the canonical form of a document without its digest, 64 hexadecimal digits."""
    return sha256_text(canonical_json(body))


def read_json(
    source: Path | bytes, what: str, error: Callable[[str], DamagedError], *, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any]:
    """Read a JSON object that may be damaged or hostile.

    Args:
        source: The path of a file, or its bytes.
        what: Name of the file for messages: ``lookup table``.
        error: Class of the error to raise.
        max_bytes: Largest size; larger input is refused before it is parsed.

    Raises:
        DamagedError: The file cannot be read, is too large, is no UTF-8, no JSON or no object, or has a byte order
            mark, a duplicate key, NaN, a number too large for binary64, half a surrogate pair, or too many levels.
    """
    if isinstance(source, Path):
        what = f"{what} {str(source)!r}"
        try:
            data = _read_at_most(source, max_bytes + 1)
        except OSError as e:
            raise error(f"{what} cannot be read: {e.strerror or e}.") from e
    else:
        data = source
    if len(data) > max_bytes:
        raise error(f"{what} has more than {max_bytes} bytes; no more are read.")
    try:
        document = _parse(data)
        if isinstance(document, dict) and _is_deeper(document, MAX_JSON_DEPTH):
            raise RecursionError
    except UnicodeDecodeError as e:
        raise error(f"{what} is not UTF-8: {e.reason} at byte {e.start}.") from e
    except UnicodeEncodeError as e:
        raise error(f"{what} is no valid JSON: a text holds half a surrogate pair.") from e
    except ValueError as e:
        raise error(f"{what} is no valid JSON: {e}.") from e
    except RecursionError as e:
        raise error(f"{what} is nested too deeply; at most {MAX_JSON_DEPTH} levels are read.") from e
    if not isinstance(document, dict):
        raise error(f"{what} holds a JSON {type(document).__name__}; an object was expected.")
    return document


def _read_at_most(path: Path, size_bytes: int) -> bytes:
    """Read the start of a file, which may also be a pipe or a device."""
    with path.open("rb") as file:
        return file.read(size_bytes)


def _parse(data: bytes) -> object:
    """Parse JSON, and refuse text that other readers refuse or read differently."""
    if data.startswith(_BOM):
        raise ValueError("it begins with a byte order mark; write it without")
    text = data.decode("utf-8")
    has_long_numbers = b"0" * (_MAX_DIGITS + 1) in data.translate(_ZEROS)
    document = json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        parse_int=_whole if has_long_numbers else None,
        object_pairs_hook=_refuse_duplicates,
    )
    if "\\u" in text:
        json.dumps(document, ensure_ascii=False).encode("utf-8")
    return document


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"number {digits[:40]} is out of range")
    return number


def _whole(digits: str) -> int:
    _finite(digits)  # this also limits the number of digits
    return int(digits)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice in one object")
        result[key] = value
    return result


def _is_deeper(document: dict[str, object], levels: int) -> bool:
    """Return whether objects and lists have more than ``levels`` levels; the document is level one."""
    level: list[dict[str, object] | list[object]] = [document]
    for _ in range(levels):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
    return bool(level)
