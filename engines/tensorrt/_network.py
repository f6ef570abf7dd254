"""Parse a graph with TensorRT, and describe the network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split.engines._engine_file import PlanTensor
from dsc_split.engines.tensorrt._library import Trt, TrtLibrary, interruptible
from dsc_split.errors import BackendError

if TYPE_CHECKING:
    from dsc_split.bundle import TensorInfo

__all__ = ["ParsedNetwork", "parse_network"]

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
    "FP8": "float8",
    "INT4": "int4",
    "FP4": "float4",
}
"""ONNX names of TensorRT's element types."""

COMPUTE_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")
"""Layers that take most of the time; their precision is the precision of the engine."""


@dataclass(frozen=True, kw_only=True)
class ParsedNetwork:
    """A network definition, with the objects that it needs as long as it exists."""

    builder: Trt
    """The builder of the network."""
    network: Trt
    """The network definition."""
    parser: Trt
    """The parser, which holds the weights."""

    @property
    def inputs(self) -> list[Trt]:
        """Input tensors, in order."""
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]

    @property
    def outputs(self) -> list[Trt]:
        """Output tensors, in order."""
        return [self.network.get_output(index) for index in range(self.network.num_outputs)]

    def describe(self, tensor: Trt, tensors: Mapping[str, TensorInfo]) -> PlanTensor:
        """Describe an input or output: name, ONNX type, and shape with the bundle's names of free dimensions."""
        known = tensors.get(tensor.name)
        shape: tuple[int | str | None, ...] = tuple(size if size >= 0 else None for size in tensor.shape)
        if known is not None and len(known.shape) == len(shape):
            shape = known.shape
        dtype: Trt = dtype_name(tensor.dtype)  # an unknown name is refused when the file is written
        return PlanTensor(name=tensor.name, dtype=dtype, shape=shape)

    def compute_types(self) -> dict[str, list[str]]:
        """Return the names of the layers that take most of the time, by element type."""
        found: dict[str, list[str]] = {}
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if layer.type.name in COMPUTE_LAYERS:
                tensor = layer.get_input(0)
                found.setdefault(dtype_name(tensor.dtype), []).append(layer.name)
        return found

    def count_types(self) -> dict[str, int]:
        """Count all layers by the type of their first output."""
        layers = (self.network.get_layer(index) for index in range(self.network.num_layers))
        return dict(Counter(dtype_name(layer.get_output(0).dtype) for layer in layers if layer.num_outputs))


def dtype_name(dtype: Trt) -> str:
    """Return the ONNX name of a TensorRT element type."""
    return DTYPES.get(dtype.name, str(dtype.name).lower())


def parse_network(library: TrtLibrary, graph: bytes, path: Path) -> ParsedNetwork:
    """Parse a graph into a strongly typed network.

    Args:
        library: TensorRT or TensorRT for RTX.
        graph: The serialised ONNX model.
        path: Its file, which may be missing; external weights are read from the same folder.

    Raises:
        BackendError: It cannot be parsed; the message names the node.
    """
    trt = library.trt
    library.logger.errors()
    builder = trt.Builder(library.logger.native)
    # The graph determines the precision. In TensorRT 10 this is a flag, whose bit differs between versions.
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, library.logger.native)
    with interruptible():
        parsed = parser.parse(graph, str(path))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not parsed or errors:
        raise BackendError(
            "; ".join(map(_explain, errors)) or "; ".join(library.logger.errors()) or "the parser gives no reason"
        )
    library.logger.errors()
    if network.num_outputs == 0:
        raise BackendError("it is empty: the parser finds no outputs in it. The file is damaged; export it again.")
    return ParsedNetwork(builder=builder, network=network, parser=parser)


def _explain(error: Trt) -> str:
    """Return a sentence about an error of the parser."""
    operator, name = error.node_operator() or "?", error.node_name() or "?"
    node = f"{operator} node {name!r}"
    text = " ".join(str(error.desc()).split())
    code = error.code().name
    if "Plugin not found" in text or "plugin creator" in text.lower():
        return f"there is no operator {operator!r} (node {name!r}). Replace it in the model, or choose another target"
    if code in ("UNSUPPORTED_NODE", "UNSUPPORTED_GRAPH"):
        reason = "" if text in ("", "false") else f": {text}"
        return f"it cannot do {node}{reason}. Replace it in the model, or choose another target"
    if "Failed to import initializer" in text:
        weight = re.sub(r".*Failed to import initializer: ?", "", text).strip(" .")
        return f"weight {weight!r} cannot be read: its file is missing, too short, or of a type that is not supported"
    if code == "MODEL_DESERIALIZE_FAILED":
        return "it is no ONNX model, or is cut short. Export it again"
    return f"{node}: {text} ({code})"
