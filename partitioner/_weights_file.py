"""Write the graph of a model into a bundle, and its weights once, into one file beside it."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.files import new_file, write_bytes
from dsc_split.bundles._records import FileEntry

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["StoredFile", "encode_graph", "store_bytes", "store_graph", "store_weights", "stored_tensors"]

INLINE_BELOW_BYTES = 1024
"""Smaller tensors stay in the graph, where shape inference reads them."""

_ALIGNMENT = 64
_BLOCK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that was written."""

    sha256: str
    size_bytes: int

    def listed_as(self, role: str) -> FileEntry:
        """Return its entry in a manifest."""
        return FileEntry(sha256=self.sha256, size_bytes=self.size_bytes, role=role)


def store_weights(model: ir.Model, path: Path) -> StoredFile | None:
    """Write every large initialiser of ``model`` to ``path``, each once, and hash the file meanwhile.

    The large initialisers of the model then refer to the file; small ones stay in the model.

    Returns:
        The file, or ``None`` if no initialiser is large.

    Raises:
        DscError: The file cannot be written.
    """
    import onnx_ir as ir

    _load_small(model)
    placed: dict[int, tuple[int, int]] = {}
    large = [
        (value, value.const_value)
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and value.const_value.nbytes >= INLINE_BELOW_BYTES
    ]
    if not large:
        return None
    digest = hashlib.sha256()
    position = 0
    with new_file(path) as file:

        def write(data: bytes | memoryview) -> None:
            nonlocal position
            digest.update(data)
            file.write(data)
            position += len(data)

        for _, tensor in large:
            if id(tensor) in placed:
                continue
            # Large weights start on a page, so that a runtime can map them into memory.
            alignment = mmap.PAGESIZE if tensor.nbytes >= 1024 * 1024 else _ALIGNMENT
            write(b"\0" * (-position % alignment))
            placed[id(tensor)] = (position, tensor.nbytes)
            for block in _blocks(tensor):
                write(block)
    for value, tensor in large:
        offset, length = placed[id(tensor)]
        value.const_value = ir.ExternalTensor(
            path.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(list(tensor.shape.numpy())),
            name=value.name or "",
            base_dir=str(path.parent),
        )
    return StoredFile(sha256=digest.hexdigest(), size_bytes=position)


def _load_small(model: ir.Model) -> None:
    """Load small weights from the source's weights file into the graph, so that it no longer refers to that file."""
    import onnx_ir as ir

    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < INLINE_BELOW_BYTES:
                value.const_value = ir.tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=value.name)


def _blocks(tensor: ir.TensorProtocol) -> Iterator[memoryview]:
    import numpy as np

    array = tensor.numpy()
    if array.dtype.itemsize * array.size == tensor.nbytes and array.flags.c_contiguous:
        data = memoryview(array.reshape(-1).view(np.uint8).data)
    else:
        data = memoryview(tensor.tobytes())
    for start in range(0, len(data), _BLOCK_BYTES):
        yield data[start : start + _BLOCK_BYTES]


def encode_graph(proto: onnx.ModelProto) -> bytes:
    """Return the bytes of a graph in its canonical form, which digests are computed from."""
    return bytes(proto.SerializeToString(deterministic=True))


def stored_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a model stores: in its graph, in its functions, and in the bodies of nodes."""
    graphs: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    for graph in graphs:
        yield from getattr(graph, "initializer", ())
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
            graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def store_graph(model: ir.Model, path: Path) -> StoredFile:
    """Write a graph in its canonical form.

    Raises:
        DscError: The file cannot be written.
    """
    import onnx_ir as ir

    return store_bytes(encode_graph(ir.serde.serialize_model(model)), path)


def store_bytes(data: bytes, path: Path) -> StoredFile:
    """Write bytes to a file, all or nothing.

    Raises:
        DscError: The file cannot be written.
    """
    write_bytes(path, data)
    return StoredFile(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
