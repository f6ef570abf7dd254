"""Turn graphs of a bundle into separate models: each with only the weights that it reads."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from dsc_split._support.files import new_file
from dsc_split._support.optional import require
from dsc_split.errors import BundleError

if TYPE_CHECKING:
    import onnx

    from dsc_split.bundle import Bundle

__all__ = ["LoneGraph", "Piece", "copy_pieces", "detach_graph"]

WEIGHTS_FILE = "weights.data"
"""Name of the weights file of every model; it differs from the names of all graphs."""
ALIGNMENT = 64
PAGE_BYTES = 4096
LARGE_BYTES = 1024 * 1024
"""Larger weights start on a page, so that a runtime can map them into memory."""
BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A stretch of the bundle's weights that a graph reads, and its copy in the graph's weights."""

    start: int
    """Its first byte in the bundle's weights."""
    size_bytes: int
    """Its length in bytes."""
    own_start: int
    """Its first byte in the graph's own weights file."""


@dataclass(frozen=True, kw_only=True)
class LoneGraph:
    """A graph that refers to its own weights file."""

    data: bytes
    """The ONNX file."""
    weights_name: str
    """Name of the weights file beside it; empty if it needs none."""
    pieces: tuple[Piece, ...]
    """The contents of that file, in the order of the bundle's weights."""


def detach_graph(bundle: Bundle, relative: str, inputs: Sequence[str], outputs: Sequence[str]) -> LoneGraph:
    """Read a graph, and make it refer to a file with only its own weights.

    Args:
        bundle: The bundle.
        relative: The graph's path in it.
        inputs: Names of the inputs that it must have.
        outputs: Names of the outputs that it must have.

    Raises:
        BundleError: The graph is missing, damaged or not the one in the manifest, or its weights are not in the
            bundle's weights file.
        SignatureError: The graph holds an engine, and the bundle is packed and not trusted.
        BackendUnavailable: The package ``onnx`` is not installed.
    """
    from dsc_split.engines._source import GraphReader
    from dsc_split.partitioner._weights_file import encode_graph, stored_tensors

    data = GraphReader(bundle).read(relative).data
    proto = _parse(data, relative)
    _check_border(proto, inputs, outputs, relative)
    external = [tensor for tensor in stored_tensors(proto) if tensor.data_location == tensor.EXTERNAL]
    if not external:
        return LoneGraph(data=data, weights_name="", pieces=())
    limit = bundle.listed(_weights_of(bundle)).size_bytes
    spans = [_span(tensor, relative, limit) for tensor in external]
    pieces = _lay_out(spans)
    starts = [piece.start for piece in pieces]
    for tensor, (start, size_bytes) in zip(external, spans, strict=True):
        piece = pieces[bisect.bisect_right(starts, start) - 1] if size_bytes else None
        own_start = piece.own_start + start - piece.start if piece else 0
        del tensor.external_data[:]
        for key, value in (("location", WEIGHTS_FILE), ("offset", own_start), ("length", size_bytes)):
            tensor.external_data.add(key=key, value=str(value))
    return LoneGraph(data=encode_graph(proto), weights_name=WEIGHTS_FILE, pieces=pieces)


def copy_pieces(bundle: Bundle, outputs: Mapping[Path, Sequence[Piece]]) -> dict[Path, str]:
    """Read the bundle's weights once, and write the pieces of each output.

    No file is left if the weights are not those in the manifest.

    Args:
        bundle: The bundle.
        outputs: The files to write, and the pieces of each.

    Returns:
        SHA-256 of each file, 64 hexadecimal digits.

    Raises:
        BundleError: The weights are missing, or not those in the manifest.
        DscError: A file cannot be written.
    """
    weights = _weights_of(bundle)
    listed = bundle.listed(weights)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(bundle.storage.open(weights))
        copies = [_Copy(stack.enter_context(new_file(path)), pieces) for path, pieces in outputs.items()]
        digest, position = hashlib.sha256(), 0
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
            for copy in copies:
                copy.write(block, position)
            position += len(block)
        if digest.hexdigest() != listed.sha256:
            raise BundleError(
                f"weights {weights!r} in {str(bundle.path)!r} have SHA-256 {digest.hexdigest()[:12]}...; the manifest "
                f"says {listed.sha256[:12]}.... The file was changed or damaged. Copy, unpack or export it again."
            )
        return {path: copy.digest.hexdigest() for path, copy in zip(outputs, copies, strict=True)}


def _weights_of(bundle: Bundle) -> str:
    """Return the path of the bundle's weights.

    Raises:
        BundleError: It has none.
    """
    path = bundle.manifest.model.weights.path
    if path is None:
        raise BundleError(f"manifest of {str(bundle.path)!r} names no weights. Export the model again.")
    return path


class _Copy:
    """An output file, while the weights are read block by block."""

    def __init__(self, file: BinaryIO, pieces: Sequence[Piece]) -> None:
        self.digest = hashlib.sha256()
        self._file = file
        self._pieces = pieces
        self._next = 0
        self._size_bytes = 0

    def write(self, block: bytes, position: int) -> None:
        """Write the part of a block that belongs to this file; the block begins at ``position`` of the weights."""
        view = memoryview(block)
        while self._next < len(self._pieces):
            piece = self._pieces[self._next]
            end = piece.start + piece.size_bytes
            first, last = max(piece.start, position), min(end, position + len(block))
            if first < last:
                self._write_at(view[first - position : last - position], piece.own_start + first - piece.start)
            if end > position + len(block):
                return
            self._next += 1

    def _write_at(self, data: memoryview, start: int) -> None:
        for part in (b"\0" * (start - self._size_bytes), data):
            self.digest.update(part)
            self._size_bytes += self._file.write(part)


def _parse(data: bytes, relative: str) -> onnx.ModelProto:
    require("onnx", extra="onnx", purpose="write ONNX models that stand alone")
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.ModelProto.FromString(data)
    except DecodeError as e:
        raise BundleError(f"{relative!r} is no ONNX graph: {e}. Export the model again.") from e


def _check_border(proto: onnx.ModelProto, inputs: Sequence[str], outputs: Sequence[str], relative: str) -> None:
    inside = {tensor.name for tensor in proto.graph.initializer}
    for kind, found, wanted in (
        ("inputs", {value.name for value in proto.graph.input} - inside, set(inputs)),
        ("outputs", {value.name for value in proto.graph.output}, set(outputs)),
    ):
        if found != wanted:
            raise BundleError(
                f"graph {relative!r} has the {kind} {sorted(found)}; by the manifest {sorted(wanted)} were expected. "
                "Export the model again."
            )


def _span(tensor: onnx.TensorProto, relative: str, limit: int) -> tuple[int, int]:
    """Return the first byte and the length of a tensor in the bundle's weights."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        start, size_bytes = int(entries["offset"]), int(entries["length"])
    except (KeyError, ValueError) as e:
        raise BundleError(
            f"graph {relative!r}: weights {tensor.name!r} do not say where they lie. Export the model again."
        ) from e
    if start < 0 or size_bytes < 0 or start + size_bytes > limit:
        raise BundleError(
            f"graph {relative!r}: weights {tensor.name!r} lie at bytes {start} to {start + size_bytes} of a file of "
            f"{limit}. Export the model again."
        )
    return start, size_bytes


def _lay_out(spans: Iterable[tuple[int, int]]) -> tuple[Piece, ...]:
    """Lay out the stretches in the graph's own file, each byte once; stretches that overlap are one piece."""
    joined: list[tuple[int, int]] = []
    for start, size_bytes in sorted(span for span in spans if span[1]):
        last, last_bytes = joined[-1] if joined else (0, 0)
        if start < last + last_bytes:
            joined[-1] = last, max(last_bytes, start + size_bytes - last)
        else:
            joined.append((start, size_bytes))
    pieces, end = [], 0
    for start, size_bytes in joined:
        end += -end % (PAGE_BYTES if size_bytes >= LARGE_BYTES else ALIGNMENT)
        pieces.append(Piece(start=start, size_bytes=size_bytes, own_start=end))
        end += size_bytes
    return tuple(pieces)
