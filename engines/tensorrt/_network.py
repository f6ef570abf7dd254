"""A graph as TensorRT reads it: parsed, looked over, and described."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split.engines._engine_file import PlanTensor
from dsc_split.engines.tensorrt._library import TrtLibrary, interruptible
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
"""TensorRT's element types by their names in ONNX."""

COMPUTE_LAYERS = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "EINSUM")
"""Layers where the time goes: what they compute in is what the engine computes in."""


@dataclass(frozen=True, kw_only=True)
class ParsedNetwork:
    """A network definition, with what has to live as long as it does."""

    builder: Any
    """The builder that it belongs to."""
    network: Any
    """The network definition."""
    parser: Any
    """The parser, which holds the weights."""

    @property
    def inputs(self) -> list[Any]:
        """Input tensors, in order."""
        return [self.network.get_input(index) for index in range(self.network.num_inputs)]

    @property
    def outputs(self) -> list[Any]:
        """Output tensors, in order."""
        return [self.network.get_output(index) for index in range(self.network.num_outputs)]

    def describe(self, tensor: Any, tensors: Mapping[str, TensorInfo]) -> PlanTensor:
        """Describe an input or output: name, ONNX type, shape with the bundle's words for what is free."""
        known = tensors.get(tensor.name)
        shape: tuple[int | str | None, ...] = tuple(size if size >= 0 else None for size in tensor.shape)
        if known is not None and len(known.shape) == len(shape):
            shape = known.shape
        dtype: Any = dtype_name(tensor.dtype)  # one that readers do not know is refused when it is written
        return PlanTensor(name=tensor.name, dtype=dtype, shape=shape)

    def compute_types(self) -> dict[str, list[str]]:
        """Return the names of the layers where the time goes, by the type that they compute in."""
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


def dtype_name(dtype: Any) -> str:
    """Return the ONNX name of a TensorRT element type."""
    return DTYPES.get(dtype.name, str(dtype.name).lower())


def parse_network(library: TrtLibrary, graph: bytes, path: Path) -> ParsedNetwork:
    """Parse a graph into a strongly typed network.

    Args:
        library: TensorRT or TensorRT for RTX.
        graph: The serialised ONNX model.
        path: Where it lies, or would: external weights are looked for beside it.

    Raises:
        BackendError: It cannot be parsed; the message names the node.
    """
    trt = library.trt
    library.logger.errors()
    builder = trt.Builder(library.logger.native)
    # Precision is what the graph says. In TensorRT 10 that is a choice, with a bit of its own in each version.
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, library.logger.native)
    with interruptible():
        parsed = parser.parse(graph, str(path))
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not parsed or errors:
        raise BackendError("; ".join(map(_explain, errors)) or _logged(library) or "the parser gives no reason")
    library.logger.errors()
    if network.num_outputs == 0:
        raise BackendError("it is empty: the parser finds no outputs in it. The file is damaged; export it again.")
    return ParsedNetwork(builder=builder, network=network, parser=parser)


def _explain(error: Any) -> str:
    """Say in a sentence what the parser's error is about."""
    operator, name = error.node_operator() or "?", error.node_name() or "?"
    node = f"{operator} node {name!r}"
    text = " ".join(str(error.desc()).split())
    code = error.code().name
    if "Plugin not found" in text or "plugin creator" in text.lower():
        return f"there is no operator {operator!r} (node {name!r}). Replace it in the model, or choose another target"
    if code in ("UNSUPPORTED_NODE", "UNSUPPORTED_GRAPH"):
        return f"it cannot do {node}{_reason(text)}. Replace it in the model, or choose another target"
    if "Failed to import initializer" in text:
        weight = re.sub(r".*Failed to import initializer: ?", "", text).strip(" .")
        return f"weight {weight!r} cannot be read: its file is missing, too short, or of a type that is not supported"
    if code == "MODEL_DESERIALIZE_FAILED":
        return "it is no ONNX model, or is cut short. Export it again"
    return f"{node}: {text} ({code})"


def _reason(text: str) -> str:
    return "" if text in ("", "false") else f": {text}"


def _logged(library: TrtLibrary) -> str:
    return "; ".join(library.logger.errors())
