"""Find the files and the compiled code that an ONNX graph refers to, before a library loads the graph.

A back-end may open every file that a graph names. A graph with EPContext nodes contains a compiled engine, which is
native code. This module finds both in the bytes, without the package ``onnx``, which a device does not have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsc_split.errors import DamagedError

__all__ = ["GraphFacts", "scan_graph"]

CONTEXT = b"EPContext"
"""Operator whose nodes hold a compiled engine, in any domain."""
MARKS = (CONTEXT, b"location")
"""A message without these bytes has no such node and no reference to a file."""
MAX_TAG_BYTES = 5
MAX_DEPTH = 100
"""Most levels of messages within messages."""

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
    """Files with weights, as the graph names them; sorted, each once."""
    has_ep_context: bool
    """Whether a node holds or names a compiled engine."""
    context_files: tuple[str, ...]
    """Files with compiled engines, as the graph names them, sorted; engines inside the graph are not listed."""


def scan_graph(data: bytes) -> GraphFacts:
    """Find external files and compiled code in a model, including functions and the bodies of If, Loop and Scan.

    Raises:
        DamagedError: The bytes are no ONNX model, or are damaged.
    """
    scan = _Scan(data)
    scan.walk("model", (0, len(data)), 0)
    return GraphFacts(
        locations=tuple(sorted(scan.locations)),
        has_ep_context=scan.has_ep_context,
        context_files=tuple(sorted(scan.context_files)),
    )


class _Scan:
    """Collects the facts of one model."""

    def __init__(self, data: bytes) -> None:
        self.locations: set[str] = set()
        self.context_files: set[str] = set()
        self.has_ep_context = False
        self._data = data

    def walk(self, kind: str, span: _Span, depth: int) -> None:
        """Visit a message, and the messages in it that may hold a reference or an EPContext node."""
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
        """Add the file that an EPContext node names, unless the engine is inside the node (``embed_mode`` 1)."""
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
        """Return all fields of a message that can be text, by field number."""
        found = {number: value for number, value in self._fields(span) if isinstance(value, tuple)}
        return {number: self._bytes(value).decode(errors="replace") for number, value in found.items()}

    def _bytes(self, span: _Span) -> bytes:
        return self._data[span[0] : span[1]]

    def _fields(self, span: _Span) -> Iterator[_Field]:
        """Yield the number and value of each field of a message; a text or message is given as its (start, end)."""
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
