"""What an ONNX graph refers to beyond itself, read from its bytes before any library takes them.

A back-end that resolves references by itself would open whatever a graph names. And a graph with EPContext nodes holds
a compiled engine, native code like any other. Both are found without the package ``onnx``, which a device lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsc_split.errors import DamagedError

__all__ = ["GraphFacts", "scan_graph"]

CONTEXT = b"EPContext"
"""Operator whose nodes carry a compiled engine, in whatever domain."""
MARKS = (CONTEXT, b"location")
"""A message without these bytes holds neither such a node nor a reference to a file."""
MAX_TAG_BYTES = 5
MAX_DEPTH = 100
"""Messages within messages; graphs that nest deeper are refused."""

# Fields of the messages of onnx.proto that lead to nodes and tensors.
_INNER: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
}
_OP_TYPE, _ATTRIBUTE, _EXTERNAL_DATA = 4, 5, 13
_NAME, _KEY, _VALUE, _INTEGER, _STRING = 1, 1, 2, 3, 4

_Span = tuple[int, int]
_Field = tuple[int, int | _Span]


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What :func:`scan_graph` found."""

    locations: tuple[str, ...]
    """Files that hold its weights, as it names them; sorted, each once."""
    has_ep_context: bool
    """Whether nodes of it carry a compiled engine."""
    context_files: tuple[str, ...]
    """Files that hold such engines, as it names them; those in the graph itself are not among them."""


def scan_graph(data: bytes) -> GraphFacts:
    """Find what a graph refers to, in functions and the bodies of If, Loop and Scan, too.

    Raises:
        DamagedError: It is no ONNX model, or is damaged.
    """
    scan = _Scan(data)
    scan.walk("model", (0, len(data)), 0)
    return GraphFacts(
        locations=tuple(sorted(scan.locations)),
        has_ep_context=scan.has_ep_context,
        context_files=tuple(sorted(scan.context_files)),
    )


class _Scan:
    """One walk through a model."""

    def __init__(self, data: bytes) -> None:
        self.locations: set[str] = set()
        self.context_files: set[str] = set()
        self.has_ep_context = False
        self._data = data

    def walk(self, kind: str, span: _Span, depth: int) -> None:
        """Visit a message and all in it that may matter."""
        if depth > MAX_DEPTH:
            raise DamagedError(f"it is no ONNX model: messages lie in it more than {MAX_DEPTH} deep")
        inner = _INNER.get(kind, {})
        is_context = False
        attributes = []
        for number, value in self._fields(span):
            if not isinstance(value, tuple):
                continue
            if kind == "tensor" and number == _EXTERNAL_DATA:
                self._add_location(value)
            if kind == "node" and number == _OP_TYPE:
                is_context = is_context or self._bytes(value) == CONTEXT
            if kind == "node" and number == _ATTRIBUTE:
                attributes.append(value)
            if number in inner and any(self._data.find(mark, *value) >= 0 for mark in MARKS):
                self.walk(inner[number], value, depth + 1)
        if is_context:
            self.has_ep_context = True
            self._add_context(attributes)

    def _add_location(self, span: _Span) -> None:
        entry = self._texts(span)
        if entry.get(_KEY) == "location":
            self.locations.add(entry.get(_VALUE, ""))

    def _add_context(self, attributes: list[_Span]) -> None:
        """Note the file that a node names, unless it says that the engine is in the node."""
        embedded, file = 1, None
        for span in attributes:
            fields = dict(self._fields(span))
            texts = self._texts(span)
            if texts.get(_NAME) == "embed_mode":
                value = fields.get(_INTEGER, 0)
                embedded = value if isinstance(value, int) else 0
            if texts.get(_NAME) == "ep_cache_context":
                file = texts.get(_STRING, "")
        if embedded != 1 and file is not None:
            self.context_files.add(file)

    def _texts(self, span: _Span) -> dict[int, str]:
        """Return the fields of a message that may be text, by number."""
        found = {number: value for number, value in self._fields(span) if isinstance(value, tuple)}
        return {number: self._bytes(value).decode(errors="replace") for number, value in found.items()}

    def _bytes(self, span: _Span) -> bytes:
        return self._data[span[0] : span[1]]

    def _fields(self, span: _Span) -> Iterator[_Field]:
        """Yield the fields of a message: numbers as they are, everything else as its place in the file."""
        position, end = span
        while position < end:
            start = position
            tag, position = self._varint(position, end)
            number, wire_type = tag >> 3, tag & 7
            if not number or tag >= 2**32 or position - start > MAX_TAG_BYTES:  # some libraries drop the upper bits
                raise DamagedError(f"it is no ONNX model: the tag at byte {start} is none")
            if wire_type == 0:
                value, position = self._varint(position, end)
                yield number, value
                continue
            if wire_type == 2:
                size, position = self._varint(position, end)
            elif wire_type in (1, 5):
                size = 8 if wire_type == 1 else 4
            else:
                raise DamagedError(f"it is no ONNX model: a field of type {wire_type} at byte {position}")
            if size > end - position:
                raise DamagedError(f"it is no ONNX model: a field at byte {position} is longer than what holds it")
            if wire_type == 2:
                yield number, (position, position + size)
            position += size

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 64:
            byte = self._data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value, position
            shift += 7
        raise DamagedError(f"it is no ONNX model: the number at byte {position} does not end")
