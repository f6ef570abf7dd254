"""Records: frozen, typed forms of JSON documents, read and written by msgspec.

A record says what a document holds, in one place; everything that reads the document gets the record::

    class Point(Record):
        x: float
        label: Text = ""

    point = read_record({"x": 1.0}, Point)
    to_document(point)  # {"x": 1.0, "label": ""}

Keys that a record does not name are ignored when a document is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, inspect

from dsc_split._support.checks import MAX_INTEGER, fail, shown
from dsc_split.errors import DamagedError

__all__ = [
    "Count",
    "Facts",
    "Integer",
    "NotNegative",
    "Positive",
    "Record",
    "Sha256",
    "Text",
    "json_schema",
    "read_record",
    "to_document",
]

Text = Annotated[str, Meta(min_length=1)]
"""Any text but an empty one."""
Integer = Annotated[int, Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]
"""A whole number that every language reads exactly."""
Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
"""A whole number from 0."""
Positive = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
"""A whole number from 1."""
NotNegative = Annotated[float, Meta(ge=0)]
"""A number from 0."""
_SHA256 = "^[0-9a-f]{64}$"
Sha256 = Annotated[str, Meta(pattern=_SHA256, min_length=64, max_length=64)]
"""64 hexadecimal digits."""
Facts = dict[str, object]
"""An object whose keys are free: what a back-end says of itself or of a machine."""

R = TypeVar("R")


if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: object):
        return lambda kind: kind


class _RecordMeta(msgspec.StructMeta):
    """Lets the fields of every record be keywords, which msgspec does not inherit."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **options})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, metaclass=_RecordMeta, frozen=True):
    """Base of all records: frozen, and made with keywords alone."""


def read_record(document: object, kind: type[R]) -> R:
    """Convert a parsed JSON document to a record.

    Args:
        document: What :func:`~dsc_split._support.strict_json.read_json` returned, which refuses duplicate keys and NaN.
        kind: The record's type.

    Raises:
        DamagedError: A key is missing, or a value is of another type or out of range. The message says where, what
            was found and what was expected: ``splits[0].name: got 5; expected a text.``
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as e:
        _explain(document, kind, str(e))
        raise


def to_document(record: object) -> dict[str, Any]:
    """Return a record as plain data that JSON can hold: dictionaries, and lists or tuples."""
    document: dict[str, Any] = msgspec.to_builtins(record)
    return document


def json_schema(kind: type[Record], *, title: str) -> dict[str, Any]:
    """Return the JSON Schema of a record's documents."""
    schema = msgspec.json.schema(kind, schema_hook=lambda _: {"description": "any value"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


# ---- messages ----------------------------------------------------------------------------------------------

_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<place>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+)\]|\[\.\.\.\]")


def _explain(document: object, kind: type[object], message: str) -> None:
    """Raise the error of this package that says what msgspec's message says.

    Raises:
        DamagedError: Always.
    """
    match = _MESSAGE.fullmatch(message)
    what, place = (match["what"], match["place"] or "") if match else (message, "")
    expected, where = inspect.type_info(kind), ""
    steps: list[str | int] = []
    for step in _STEP.finditer(place):
        if step["name"]:
            steps.append(step["name"])
            where += f".{step['name']}" if where else step["name"]
        elif step["index"]:
            steps.append(int(step["index"]))
            where += f"[{step['index']}]"
        else:  # some key of an object with free keys
            steps.append(_wrong_key(document, kind, message, steps))
            where += f"[{shown(steps[-1])}]"
        expected = _inside(expected, steps[-1])
    for pattern, fault in (
        (r"Object missing required field `(\w+)`", "missing"),
        (r"Object contains unknown field `(.*)`", "unknown"),
    ):
        if key := re.fullmatch(pattern, what):
            raise DamagedError(f"{where}{'.' if where else ''}{key[1]}: the key is {fault}.")
    if match and match["key"]:
        raise DamagedError(f"{where}: it has a key that it must not have ({what}).")
    if not what.startswith(("Expected ", "Invalid enum value ")):
        raise DamagedError(f"{where}: {what}" if where else what)  # a sentence of the record's own
    value = _at(document, steps)
    fail(value, where or "document", _in_words(expected, value))


def _inside(kind: inspect.Type, step: str | int) -> inspect.Type:
    """Return the type of a field, an item, or a value under a free key."""
    for one in kind.types if isinstance(kind, inspect.UnionType) else (kind,):
        if isinstance(one, inspect.StructType):
            return next(field.type for field in one.fields if field.encode_name == step)
        if isinstance(one, inspect.DictType):
            return one.value_type
        if isinstance(one, inspect.TupleType) and isinstance(step, int):
            return one.item_types[step]
        if isinstance(one, (inspect.VarTupleType, inspect.ListType)):
            return one.item_type
    return inspect.AnyType()


def _in_words(kind: inspect.Type, value: object) -> str:
    """Say what is expected where ``value`` stands: ``a whole number from 0``."""
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_in_words(one, value) for one in kind.types)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(repr, kind.values))
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        words = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
        is_beyond = isinstance(value, int) and abs(value) > MAX_INTEGER
        least = kind.ge if isinstance(kind, inspect.IntType) or kind.ge is None else f"{kind.ge:g}"
        first = f" from {least}" if kind.ge not in (None, -MAX_INTEGER) else ""
        last = f" to {kind.le}" if kind.le is not None and (kind.le != MAX_INTEGER or is_beyond) else ""
        return words + first + last
    if isinstance(kind, inspect.StrType):
        return "64 hexadecimal digits" if kind.pattern == _SHA256 else "a text"
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)} items"
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)):
        least = f"at least {kind.min_length}" if kind.min_length else ""
        most = f"at most {kind.max_length}" if kind.max_length is not None else ""
        return f"a list of {' and '.join(filter(None, (least, most)))} items" if least or most else "a list"
    return {inspect.BoolType: "true or false", inspect.NoneType: "null"}.get(type(kind), "an object")


def _at(document: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        document = document[step]
    return document


def _wrong_key(document: object, kind: type[object], message: str, steps: Sequence[str | int]) -> str:
    """Find the key of an object with free keys whose value is wrong: msgspec does not name it."""
    entries = list(_at(document, steps).items())
    while len(entries) > 1:
        half = entries[: len(entries) // 2]
        entries = half if _has_error(_with(document, steps, dict(half)), kind, message) else entries[len(half) :]
    return str(entries[0][0])


def _has_error(document: object, kind: type[object], message: str) -> bool:
    try:
        msgspec.convert(document, kind)
    except msgspec.ValidationError as e:
        return str(e) == message
    return False


def _with(document: Any, steps: Sequence[str | int], value: object) -> Any:
    """Copy a document with another value at a place."""
    if not steps:
        return value
    first, *rest = steps
    copy: Any = dict(document) if isinstance(document, Mapping) else list(document)
    copy[first] = _with(document[first], rest, value)
    return copy
