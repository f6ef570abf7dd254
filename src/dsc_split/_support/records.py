"""Records: frozen, typed classes for JSON documents, which msgspec reads and writes.

One class defines the keys of a document; all code that reads the document gets the record::

    class Point(Record):
        x: float
        label: Text = ""

    point = read_record({"x": 1.0}, Point)
    to_document(point)  # {"x": 1.0, "label": ""}

Keys that a record does not name are kept, and written again: a newer version may need them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
"""A text that is not empty."""
Integer = Annotated[int, Meta(ge=-MAX_INTEGER, le=MAX_INTEGER)]
"""A whole number that binary64 represents exactly."""
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
"""An object with any keys: facts of a back-end or a machine."""

R = TypeVar("R")
_UNKNOWN = ""
"""Key under which msgspec sees the unknown keys; no document has it."""


if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: object):
        return lambda kind: kind


class _RecordMeta(msgspec.StructMeta):
    """Sets ``kw_only`` for every record, because subclasses do not inherit this option of msgspec."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any) -> Any:
        return super().__new__(mcs, name, bases, namespace, **{"kw_only": True, **options})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(msgspec.field,))
class Record(msgspec.Struct, metaclass=_RecordMeta, frozen=True, repr_omit_defaults=True):
    """Base of all records: frozen, with keyword arguments only."""

    unknown_keys: object = msgspec.field(default=msgspec.UNSET, name=_UNKNOWN)
    """JSON of the keys that were read and that the record does not name; a text, so that records can be hashed."""


def read_record(document: object, kind: type[R]) -> R:
    """Convert a parsed JSON document to a record.

    Args:
        document: Result of :func:`~dsc_split._support.strict_json.read_json`, which refuses duplicate keys and NaN.
        kind: Class of the record.

    Raises:
        DamagedError: A key is missing, or a value has a wrong type or is out of range. The message says where, and
            what was found and expected: ``splits[0].name: got 5; expected a text.``
    """
    try:
        record = msgspec.convert(document, kind)
    except msgspec.ValidationError as e:
        _explain(document, kind, str(e))
        raise
    _keep_unknown(record, document)
    return record


def to_document(record: object) -> dict[str, Any]:
    """Return a record as plain data for JSON: dictionaries, and lists or tuples."""
    document: dict[str, Any] = msgspec.to_builtins(record)
    _add_unknown(record, document)
    return document


def _keep_unknown(value: object, document: Any) -> None:
    """Store in each record the keys of its document that it does not name."""
    for item, part in _children(value, document):
        _keep_unknown(item, part)
    if isinstance(value, Record):
        known = set(value.__struct_encode_fields__) - {_UNKNOWN}
        unknown = {key: part for key, part in document.items() if key not in known}
        if unknown and value.__struct_config__.forbid_unknown_fields:
            raise DamagedError(f"{next(iter(unknown))}: the key is unknown.")
        msgspec.structs.force_setattr(value, "unknown_keys", json.dumps(unknown) if unknown else msgspec.UNSET)


def _add_unknown(value: object, document: Any) -> None:
    """Put the unknown keys of each record into the document that was made of it."""
    for item, part in _children(value, document):
        _add_unknown(item, part)
    if isinstance(value, Record) and isinstance(value.unknown_keys, str):
        del document[_UNKNOWN]
        document.update(json.loads(value.unknown_keys))


def _children(value: object, document: Any) -> Iterator[tuple[object, Any]]:
    """Yield the parts of a value that may contain records, each with its part of the document."""
    parts: Iterable[tuple[object, Any]]
    if isinstance(value, Record):
        names = zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True)
        parts = ((getattr(value, name), document[key]) for name, key in names if key != _UNKNOWN and key in document)
    elif dataclasses.is_dataclass(value):
        parts = ((getattr(value, field.name), document[field.name]) for field in dataclasses.fields(value))
    elif isinstance(value, dict):
        parts = ((item, document[key]) for key, item in value.items())
    elif isinstance(value, (tuple, list)):
        parts = zip(value, document, strict=True)
    else:
        return
    yield from ((item, part) for item, part in parts if item is not part)


def json_schema(kind: type[Record], *, title: str) -> dict[str, Any]:
    """Return the JSON Schema of a record's documents."""
    schema = msgspec.json.schema(kind, schema_hook=lambda _: {"description": "any value"})
    for definition in schema["$defs"].values():
        definition.get("properties", {}).pop(_UNKNOWN, None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


# ---- messages ----------------------------------------------------------------------------------------------

_MESSAGE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<place>.*)`)?", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>\w+)|\[(?P<index>\d+)\]|\[\.\.\.\]")


def _explain(document: object, kind: type[object], message: str) -> None:
    """Raise an error of this package for a message of msgspec.

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
        else:  # a key of an object with free keys, which msgspec does not name
            steps.append(_wrong_key(document, kind, message, steps))
            where += f"[{shown(steps[-1])}]"
        expected = _type_at(expected, steps[-1])
    for pattern, fault in (
        (r"Object missing required field `(\w+)`", "missing"),
        (r"Object contains unknown field `(.*)`", "unknown"),
    ):
        if key := re.fullmatch(pattern, what):
            raise DamagedError(f"{where}{'.' if where else ''}{key[1]}: the key is {fault}.")
    if match and match["key"]:
        raise DamagedError(f"{where}: it has a key that it must not have ({what}).")
    if not what.startswith(("Expected ", "Invalid enum value ")):
        raise DamagedError(f"{where}: {what}" if where else what)  # a full sentence from the record's __post_init__
    value = _value_at(document, steps)
    fail(value, where or "document", _in_words(expected, value))


def _type_at(kind: inspect.Type, step: str | int) -> inspect.Type:
    """Return the type of a field, of an item of a list, or of the value of a free key."""
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
    """Describe a type for the message about a wrong ``value``: ``a whole number from 0``."""
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_in_words(one, value) for one in kind.types)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(map(repr, kind.values))
    if isinstance(kind, (inspect.IntType, inspect.FloatType)):
        form = "d" if isinstance(kind, inspect.IntType) else "g"
        words = "a whole number" if form == "d" else "a number"
        is_beyond = isinstance(value, int) and abs(value) > MAX_INTEGER
        for word, bound in (("from", kind.ge), ("to", kind.le)):
            if bound is not None and (abs(bound) != MAX_INTEGER or is_beyond):
                words += f" {word} {bound:{form}}"
        return words
    if isinstance(kind, inspect.StrType):
        return "64 hexadecimal digits" if kind.pattern == _SHA256 else "a text"
    if isinstance(kind, inspect.TupleType):
        return f"a list of {len(kind.item_types)} items"
    if isinstance(kind, (inspect.VarTupleType, inspect.ListType)):
        least = f"at least {kind.min_length}" if kind.min_length else ""
        most = f"at most {kind.max_length}" if kind.max_length is not None else ""
        return f"a list of {' and '.join(filter(None, (least, most)))} items" if least or most else "a list"
    return {inspect.BoolType: "true or false", inspect.NoneType: "null"}.get(type(kind), "an object")


def _value_at(document: Any, steps: Sequence[str | int]) -> Any:
    for step in steps:
        document = document[step]
    return document


def _wrong_key(document: object, kind: type[object], message: str, steps: Sequence[str | int]) -> str:
    """Find the key with the wrong value in an object with free keys, by trying halves: msgspec does not name it."""
    entries = list(_value_at(document, steps).items())
    while len(entries) > 1:
        half = entries[: len(entries) // 2]
        entries = half if _has_error(_replaced(document, steps, dict(half)), kind, message) else entries[len(half) :]
    return str(entries[0][0])


def _has_error(document: object, kind: type[object], message: str) -> bool:
    try:
        msgspec.convert(document, kind)
    except msgspec.ValidationError as e:
        return str(e) == message
    return False


def _replaced(document: Any, steps: Sequence[str | int], value: object) -> Any:
    """Return a copy of a document with another value at one place."""
    if not steps:
        return value
    first, *rest = steps
    copy: Any = dict(document) if isinstance(document, Mapping) else list(document)
    copy[first] = _replaced(document[first], rest, value)
    return copy
