"""Read and write ``table.json``, version 1. The reader accepts damaged and hostile input, and raises errors for it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn, TypeVar

from dsc_split._support.checks import shown
from dsc_split.errors import TableError
from dsc_split.table._arithmetic import Lines, evaluate, slopes
from dsc_split.table._types import (
    FULL_OFFLOAD,
    NO_OFFLOAD,
    SPLIT,
    BatchTable,
    Choice,
    Link,
    Row,
    Segment,
    Side,
    TableContent,
)

__all__ = [
    "FORMAT",
    "MAX_TABLE_BYTES",
    "VERSION",
    "read_link",
    "read_table",
    "segment_at_fault",
    "table_document",
]

FORMAT = "dsc-split/table"
VERSION = 1
MAX_TABLE_BYTES = 8 * 1024 * 1024
"""Largest file; larger ones are refused before they are parsed. Real tables have a few KB."""
MAX_CHOICES = 1000
"""Most choices; the time of the checks grows with their square."""
MAX_CHOICE_ID = 2**31 - 1
"""Largest id of a choice."""
MAX_BATCHES = 4096
"""Most batch sizes."""
MAX_BATCH = 2**20
"""Largest batch size."""
MAX_BYTES = 2**42
"""Most bytes of a row, for the whole batch; with :data:`MAX_BATCH`, bytes between two batch sizes fit in 64 bits."""
MAX_VERSION = 2**53
"""Largest number that is accepted as a version."""
_ROUNDING = 1e-9
"""Relative difference that is allowed between the segments of a file and those computed here."""

_KINDS = (FULL_OFFLOAD, SPLIT, NO_OFFLOAD)
_Table = TypeVar("_Table", bound=TableContent)


def read_table(document: Mapping[str, object], kind: type[_Table]) -> _Table:
    """Read a table from a parsed ``table.json``; whether the segments fit the rows is not checked.

    Args:
        document: The parsed file.
        kind: The class of the table to make.

    Raises:
        TableError: A value is missing, of the wrong type or out of range; the message says where. Or the version is
            newer, or the table requires an unknown feature.
    """
    if not isinstance(document, Mapping):
        _fail("lookup table", document, "an object")
    if document.get("format") != FORMAT:
        _fail("format", document.get("format"), repr(FORMAT))
    version = _integer(document, "", "version", minimum=1, maximum=MAX_VERSION)
    if version > VERSION:
        raise TableError(
            f"version: the table is of version {version}; this dsc-split reads up to {VERSION}. Update dsc-split."
        )
    for i, feature in enumerate(_items(document, "", "requires", at_least=0)):
        if not isinstance(feature, str):
            _fail(f"requires[{i}]", feature, "a text")
        raise TableError(
            f"requires[{i}]: the table requires {feature!r}, which this dsc-split does not know. Update dsc-split."
        )
    choices = _read_choices(document)
    items = _items(document, "", "batches", at_most=MAX_BATCHES)
    batches = tuple(_read_batch(item, f"batches[{i}]", choices) for i, item in enumerate(items))
    _ascending([item.batch for item in batches], "batches", "batch")
    count = _text(document, "", "count") if "count" in document else "bytes"
    if count not in ("bytes", "elements"):
        _fail("count", count, "'bytes' or 'elements'")
    emulated = _value(document, "", "emulated")
    if not (emulated is None or (isinstance(emulated, (str, Mapping)) and emulated)):
        _fail("emulated", emulated, "null, or what was emulated as a text or an object")
    return kind(
        pair_id=_text(document, "", "pair_id"),
        precision=_text(document, "", "precision"),
        emulated=emulated,
        device=_read_side(document, "device"),
        server=_read_side(document, "server"),
        link=read_link(_object(document, "", "link"), "link."),
        choices=tuple(choices.values()),
        batches=batches,
        count=count,
    )


def read_link(document: Mapping[str, object], where: str, *, defaults: Link | None = None) -> Link:
    """Read a link.

    Args:
        document: The object.
        where: Text before a key in messages: ``link.``.
        defaults: Values for missing keys; ``None``: every key is required.

    Raises:
        TableError: A key is missing, of the wrong type or out of range.
    """
    if defaults is not None:
        document = {**_link_document(defaults), **document}
    downlink = _value(document, where, "downlink_rate_mb_s")
    if downlink is not None:
        downlink = _number(document, where, "downlink_rate_mb_s")
        if downlink == 0.0:
            _fail(f"{where}downlink_rate_mb_s", 0, "a number above 0, or null for the uplink's rate")
    count_downlink = _value(document, where, "count_downlink")
    if not isinstance(count_downlink, bool):
        _fail(f"{where}count_downlink", count_downlink, "true or false")
    return Link(
        c0_ms=_number(document, where, "c0_ms"),
        c1_ms_per_mb=_number(document, where, "c1_ms_per_mb"),
        rtt_ms=_number(document, where, "rtt_ms"),
        round_trips=_number(document, where, "round_trips"),
        count_downlink=count_downlink,
        downlink_rate_mb_s=downlink,
        source=_text(document, where, "source"),
    )


def table_document(table: TableContent) -> dict[str, object]:
    """Return a table as the document of ``table.json``."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "requires": [],
        "pair_id": table.pair_id,
        "precision": table.precision,
        "count": table.count,
        "emulated": table.emulated,
        "device": _side_document(table.device),
        "server": _side_document(table.server),
        "link": _link_document(table.link),
        "choices": [_choice_document(choice) for choice in table.choices],
        "batches": [
            {
                "batch": item.batch,
                "rows": [_row_document(row) for row in item.rows],
                "segments": [
                    {"choice": segment.choice, "below_rate_mb_s": segment.below_rate_mb_s} for segment in item.segments
                ],
            }
            for item in table.batches
        ],
    }


def segment_at_fault(segments: Sequence[Segment], lines: Lines) -> tuple[int, str] | None:
    """Find the first segment whose choice is not the best, by more than rounding.

    The distance of a choice's T from the smallest T is a convex function of the inverse rate. So a choice that is the
    best at both ends of a segment is the best in all of it.

    Returns:
        The segment's position and the reason; ``None`` where every segment is right.
    """
    index_of = {choice.id: index for index, choice in enumerate(lines.choices)}
    slope = slopes(lines)
    start = None
    for position, segment in enumerate(segments):
        index = index_of.get(segment.choice)
        if index is None:
            return position, f"choice {segment.choice} has no row"
        if start is None and slope[index] > min(slope) * (1.0 + _ROUNDING):
            return (
                position,
                f"choice {segment.choice} sends more than another, so it is not the best at the lowest rates",
            )
        end = sys.float_info.max if segment.below_rate_mb_s is None else segment.below_rate_mb_s
        for rate in (end,) if start is None else (start, end):
            times = evaluate(lines, rate)
            if not times[index] <= min(times) * (1.0 + _ROUNDING):
                best = lines.choices[times.index(min(times))].id
                return position, f"at {rate:g} MB/s choice {best} is faster than choice {segment.choice}"
        start = end
    return None


# ---- the parts ---------------------------------------------------------------------------------------------


def _read_choices(document: Mapping[str, object]) -> dict[int, Choice]:
    items = _items(document, "", "choices", at_most=MAX_CHOICES)
    choices: list[Choice] = []
    names = set()
    for i, item in enumerate(items):
        where = f"choices[{i}]"
        item = _expect_object(item, where)
        kind = _text(item, f"{where}.", "kind")
        if kind not in _KINDS:
            _fail(f"{where}.kind", kind, "one of " + ", ".join(map(repr, _KINDS)))
        passthrough = item.get("passthrough", False)
        if not isinstance(passthrough, bool):
            _fail(f"{where}.passthrough", passthrough, "true or false")
        choice = Choice(
            id=_integer(item, f"{where}.", "id", maximum=MAX_CHOICE_ID),
            kind=kind,
            name=_text(item, f"{where}.", "name"),
            passthrough=passthrough,
        )
        if (kind != SPLIT or choice.name in _KINDS) and choice.name != kind:
            _fail(f"{where}.name", choice.name, f"the name {kind!r}" if kind != SPLIT else "a cut's name")
        if choice.name in names:
            _fail(f"{where}.name", choice.name, "a name that no other choice has")
        names.add(choice.name)
        choices.append(choice)
    _ascending([choice.id for choice in choices], "choices", "id")
    return {choice.id: choice for choice in choices}


def _choice_document(choice: Choice) -> dict[str, object]:
    document: dict[str, object] = {"id": choice.id, "kind": choice.kind, "name": choice.name}
    if choice.passthrough:
        document["passthrough"] = True
    return document


def _read_batch(document: object, where: str, choices: Mapping[int, Choice]) -> BatchTable:
    document = _expect_object(document, where)
    items = _items(document, f"{where}.", "rows", at_most=len(choices))
    rows = tuple(_read_row(item, f"{where}.rows[{i}]", choices) for i, item in enumerate(items))
    _ascending([row.choice for row in rows], f"{where}.rows", "choice")
    return BatchTable(
        batch=_integer(document, f"{where}.", "batch", minimum=1, maximum=MAX_BATCH),
        rows=rows,
        segments=_read_segments(document, where, choices),
    )


def _read_segments(document: Mapping[str, object], where: str, choices: Mapping[int, Choice]) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    items = _items(document, f"{where}.", "segments", at_most=len(choices))
    seen: set[int] = set()
    previous = 0.0
    for i, item in enumerate(items):
        here = f"{where}.segments[{i}]."
        item = _expect_object(item, here[:-1])
        below = _value(item, here, "below_rate_mb_s")
        if (below is None) != (i == len(items) - 1):
            _fail(f"{here}below_rate_mb_s", below, "a rate; null stands at the last segment, and only there")
        if below is not None:
            below = _number(item, here, "below_rate_mb_s")
            if below <= previous:
                _fail(f"{here}below_rate_mb_s", below, f"a rate above {previous!r}, the one before")
            previous = below
        choice = _known_choice(item, here, choices)
        if choice in seen:
            _fail(f"{here}choice", choice, "a choice that no other segment has")
        seen.add(choice)
        segments.append(Segment(choice=choice, below_rate_mb_s=below))
    return tuple(segments)


def _read_row(document: object, where: str, choices: Mapping[int, Choice]) -> Row:
    document = _expect_object(document, where)
    where += "."
    timing_valid = _value(document, where, "timing_valid")
    if not isinstance(timing_valid, bool):
        _fail(f"{where}timing_valid", timing_valid, "true or false")
    row = Row(
        choice=_known_choice(document, where, choices),
        head_ms=_number(document, where, "head_ms"),
        head_ci_ms=_interval(document, where, "head_ci_ms"),
        head_p95_ms=_optional_number(document, where, "head_p95_ms"),
        tail_ms=_number(document, where, "tail_ms"),
        tail_ci_ms=_interval(document, where, "tail_ci_ms"),
        tail_p95_ms=_optional_number(document, where, "tail_p95_ms"),
        uplink_bytes=_integer(document, where, "uplink_bytes", maximum=MAX_BYTES),
        downlink_bytes=_integer(document, where, "downlink_bytes", maximum=MAX_BYTES),
        timing_valid=timing_valid,
    )
    if not choices[row.choice].uses_server:
        for key in ("tail_ms", "uplink_bytes", "downlink_bytes"):
            if getattr(row, key):
                _fail(f"{where}{key}", getattr(row, key), f"0, because {NO_OFFLOAD!r} uses no server")
    return row


def _row_document(row: Row) -> dict[str, object]:
    return {
        "choice": row.choice,
        "head_ms": row.head_ms,
        "head_ci_ms": None if row.head_ci_ms is None else list(row.head_ci_ms),
        "head_p95_ms": row.head_p95_ms,
        "tail_ms": row.tail_ms,
        "tail_ci_ms": None if row.tail_ci_ms is None else list(row.tail_ci_ms),
        "tail_p95_ms": row.tail_p95_ms,
        "uplink_bytes": row.uplink_bytes,
        "downlink_bytes": row.downlink_bytes,
        "timing_valid": row.timing_valid,
    }


def _link_document(link: Link) -> dict[str, object]:
    return {
        "c0_ms": link.c0_ms,
        "c1_ms_per_mb": link.c1_ms_per_mb,
        "rtt_ms": link.rtt_ms,
        "round_trips": link.round_trips,
        "count_downlink": link.count_downlink,
        "downlink_rate_mb_s": link.downlink_rate_mb_s,
        "source": link.source,
    }


def _read_side(document: Mapping[str, object], key: str) -> Side:
    side = _object(document, "", key)
    return Side(
        target=_text(side, f"{key}.", "target"),
        fingerprint=_text(side, f"{key}.", "fingerprint"),
        run_fingerprint=_object(side, f"{key}.", "run_fingerprint") if "run_fingerprint" in side else None,
    )


def _side_document(side: Side) -> dict[str, object]:
    document: dict[str, object] = {"target": side.target, "fingerprint": side.fingerprint}
    if side.run_fingerprint is not None:
        document["run_fingerprint"] = dict(side.run_fingerprint)
    return document


# ---- single values -----------------------------------------------------------------------------------------


def _fail(where: str, got: object, expected: str) -> NoReturn:
    raise TableError(f"{where}: got {shown(got)}; expected {expected}.")


def _value(document: Mapping[str, object], where: str, key: str) -> object:
    if key not in document:
        raise TableError(f"{where}{key}: the key is missing.")
    return document[key]


def _number(document: Mapping[str, object], where: str, key: str) -> float:
    value = _value(document, where, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(f"{where}{key}", value, "a number from 0")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0.0 <= number < math.inf:
        _fail(f"{where}{key}", value, "a number from 0")
    return abs(number)  # -0.0 reads as 0.0


def _optional_number(document: Mapping[str, object], where: str, key: str) -> float | None:
    return None if _value(document, where, key) is None else _number(document, where, key)


def _integer(document: Mapping[str, object], where: str, key: str, *, minimum: int = 0, maximum: int) -> int:
    value = _value(document, where, key)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        _fail(f"{where}{key}", value, f"a whole number from {minimum} to {maximum}")
    return value


def _known_choice(document: Mapping[str, object], where: str, choices: Mapping[int, Choice]) -> int:
    choice = _integer(document, where, "choice", maximum=MAX_CHOICE_ID)
    if choice not in choices:
        _fail(f"{where}choice", choice, "the id of one of the choices")
    return choice


def _interval(document: Mapping[str, object], where: str, key: str) -> tuple[float, float] | None:
    value = _value(document, where, key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        _fail(f"{where}{key}", value, "null or [low, high]")
    low, high = (_number({f"{key}[{i}]": value[i]}, where, f"{key}[{i}]") for i in (0, 1))
    if low > high:
        _fail(f"{where}{key}", value, "the lower end first")
    return low, high


def _text(document: Mapping[str, object], where: str, key: str) -> str:
    value = _value(document, where, key)
    if not isinstance(value, str) or not value:
        _fail(f"{where}{key}", value, "a text")
    return value


def _items(
    document: Mapping[str, object], where: str, key: str, *, at_least: int = 1, at_most: int | None = None
) -> list[object]:
    value = _value(document, where, key)
    if not isinstance(value, list):
        _fail(f"{where}{key}", value, "a list")
    if len(value) < at_least:
        _fail(f"{where}{key}", value, "at least one item")
    if at_most is not None and len(value) > at_most:
        raise TableError(f"{where}{key}: got {len(value)} items; expected at most {at_most}.")
    return value


def _object(document: Mapping[str, object], where: str, key: str) -> Mapping[str, object]:
    return _expect_object(_value(document, where, key), f"{where}{key}")


def _expect_object(value: object, where: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        _fail(where, value, "an object")
    return value


def _ascending(values: Sequence[int], where: str, key: str) -> None:
    for i, (before, after) in enumerate(itertools.pairwise(values)):
        if after == before:
            _fail(f"{where}[{i + 1}].{key}", after, "a number that does not stand twice")
        if after < before:
            _fail(f"{where}[{i + 1}].{key}", after, f"a number above {before}, the one before: they are sorted")
