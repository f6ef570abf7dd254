"""Rewrite float32 matrix products so that TensorRT for RTX compiles them for Turing (SM75).

For SM75 it refuses float32 ``Gemm``, ``MatMul``, two-input ``Einsum``, recurrent layers and 3-D convolutions, and
accepts 2-D convolutions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsc_split._support.optional import require
from dsc_split.engines._options import GEMM_POLICIES
from dsc_split.engines.tensorrt._gemm_forms import PRODUCTS, Forms, Names, NoFormError
from dsc_split.errors import ModelFileError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["GemmRewrite", "LeftGemm", "digest", "prove_rewrite", "rewrite_gemm"]

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_CONVOLUTIONS = {"Conv": "3-D convolution", "ConvTranspose": "3-D transposed convolution"}
_RANK_OF_3D = 5
_FLOAT16_MAX = 65504.0
_OPSET_OF_AXES_INPUT = 13
"""Since then ``ReduceSum`` and ``Unsqueeze`` take their axes as an input."""


@dataclass(frozen=True, kw_only=True)
class LeftGemm:
    """An op that SM75 refuses, and that was not rewritten."""

    name: str
    """Name of the node."""
    op_type: str
    """``Gemm``, ``MatMul``, ``Einsum``, ``LSTM``, ..."""
    reason: str
    """Why it could not be rewritten."""

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices; other ops can only become float16."""
        return self.op_type in PRODUCTS


@dataclass(frozen=True, kw_only=True)
class GemmRewrite:
    """A rewritten graph that computes the same, and the changes."""

    model: onnx.ModelProto
    """The graph; it uses the external data of the original, in the same folder."""
    converted: tuple[str, ...]
    """Names of the nodes that are now equal convolutions, in graph order."""
    summed: tuple[str, ...]
    """Names of the nodes that are now an equal multiplication and sum."""
    halved: tuple[str, ...]
    """Names of the nodes that now compute in float16, between casts."""
    left: tuple[LeftGemm, ...]
    """Nodes that were not rewritten, and will be refused."""


def rewrite_gemm(graph: Path, *, policy: str) -> GemmRewrite:
    """Rewrite the float32 ops of a graph that SM75 refuses, as far as the policy allows.

    Args:
        graph: An ONNX file with its external data beside it.
        policy: One of :data:`GEMM_POLICIES`.

    Raises:
        ModelFileError: The graph cannot be read.
        ValueError: The policy is unknown.
    """
    if policy not in GEMM_POLICIES:
        raise ValueError(f"policy {policy!r} is unknown; one of {', '.join(GEMM_POLICIES)} was expected.")
    model = _load(graph)
    names = Names(model)
    sums = policy == "sum" and model.opset_imports.get("", 0) >= _OPSET_OF_AXES_INPUT
    converted, summed, halved, left = [], [], [], []
    for scope in list(model.graphs()):
        for node in tuple(scope):
            if not _is_refused(node):
                continue
            name, forms = node.name or "", Forms(node, scope, names)
            try:
                if node.op_type not in PRODUCTS:
                    raise NoFormError(f"SM75 has no float32 {_CONVOLUTIONS.get(node.op_type, node.op_type)}")
                forms.replace([forms.convert(sums=False)])
                converted.append(name)
            except NoFormError as e:
                if sums and node.op_type in PRODUCTS and _replace_by_sum(node, scope, names):
                    summed.append(name)
                    continue
                overflow = _overflow(node)
                if policy == "fp16" and not overflow:
                    forms.replace(forms.halve())
                    halved.append(name)
                else:
                    reason = f"{e}; {overflow}" if policy == "fp16" else str(e)
                    left.append(LeftGemm(name=name, op_type=node.op_type, reason=reason))
    import onnx_ir as ir

    return GemmRewrite(
        model=ir.serde.serialize_model(model),
        converted=tuple(converted),
        summed=tuple(summed),
        halved=tuple(halved),
        left=tuple(left),
    )


def _replace_by_sum(node: ir.Node, scope: ir.Graph, names: Names) -> bool:
    """Replace a node by a multiplication and a sum; return whether that is possible."""
    forms = Forms(node, scope, names)
    try:
        forms.replace([forms.convert(sums=True)])
    except NoFormError:
        return False
    return True


def prove_rewrite(graph: Path, rewrite: GemmRewrite, feeds: Sequence[Mapping[str, np.ndarray]]) -> tuple[float, float]:
    """Run the original and the rewritten graph in ONNX Runtime on the CPU, and compare.

    Args:
        graph: The original.
        rewrite: The result of :func:`rewrite_gemm`.
        feeds: Inputs by name, one mapping per run.

    Returns:
        ``(max|difference|, max|difference| / max|original|)``, each the worst over all runs and outputs.

    Raises:
        BackendUnavailable: ONNX Runtime is not installed.
        BackendError: One of the graphs does not load or run.
    """
    from dsc_split.partitioner._weights_file import encode_graph
    from dsc_split.partitioner.proof._proof import relative_error
    from dsc_split.partitioner.proof._reference import open_session, run_session

    original = open_session(graph)
    rewritten = open_session(encode_graph(_with_rounding(rewrite)), weights_folder=graph.parent)
    max_abs = max_rel = 0.0
    for feed in feeds:
        expected = run_session(original, feed, graph.name)
        actual = run_session(rewritten, feed, f"{graph.name} rewritten")
        for name, value in expected.items():
            off_abs, off_rel = relative_error(actual[name], value)
            max_abs, max_rel = max(max_abs, off_abs), max(max_rel, off_rel)
    return max_abs, max_rel


def digest(rewrite: GemmRewrite) -> str:
    """Return the SHA-256 of the rewritten graph in its canonical form: 64 hexadecimal digits."""
    from dsc_split.partitioner._weights_file import encode_graph

    return hashlib.sha256(encode_graph(rewrite.model)).hexdigest()


def _with_rounding(rewrite: GemmRewrite) -> onnx.ModelProto:
    """Return the graph, changed so that ONNX Runtime keeps its roundings to float16."""
    if not rewrite.halved:
        return rewrite.model
    import onnx_ir as ir

    from dsc_split.partitioner.precision._rounding import keep_roundings

    model = ir.serde.deserialize_model(rewrite.model)
    casts = [
        node
        for graph in model.graphs()
        for node in graph
        if node.op_type == "Cast" and (node.name or "").rpartition(".cast")[0] in rewrite.halved
    ]
    halved = [
        cast.outputs[0] if cast.attributes.get_int("to") == ir.DataType.FLOAT16 else cast.inputs[0] for cast in casts
    ]
    keep_roundings(model, dict.fromkeys(value for value in halved if value is not None))
    return ir.serde.serialize_model(model)


# ---- what is refused ---------------------------------------------------------------------------------------


def _load(graph: Path) -> ir.Model:
    """Read a graph, infer its shapes and types, and inline its local functions."""
    require("onnx_ir", extra="onnx", purpose="rewrite graphs")
    onnx = require("onnx", extra="onnx", purpose="rewrite graphs")
    import onnx_ir as ir
    from google.protobuf.message import DecodeError
    from onnx_ir.passes import common

    try:
        proto = onnx.ModelProto.FromString(graph.read_bytes())
        if proto.functions:
            model = ir.serde.deserialize_model(proto)
            ir.passes.Sequential(common.InlinePass(), common.NameFixPass())(model)
            proto = ir.serde.serialize_model(model)
        model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))
    except (OSError, DecodeError, ValueError, onnx.shape_inference.InferenceError) as e:
        raise ModelFileError(f"{str(graph)!r} cannot be read as a graph: {e}. Export the model again.") from e
    ir.external_data.set_base_dir(model.graph, graph.parent)
    return model


def _is_refused(node: ir.Node) -> bool:
    """Return whether TensorRT for RTX refuses to compile ``node`` for SM75."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if node.domain not in ("", "ai.onnx") or not any(value.dtype and value.dtype.name == "FLOAT" for value in values):
        return False
    if node.op_type == "Einsum":
        return len(node.inputs) > 1
    if node.op_type in _CONVOLUTIONS:
        return any(value.shape is not None and len(value.shape) == _RANK_OF_3D for value in values)
    return node.op_type in PRODUCTS | _RECURRENT


def _overflow(node: ir.Node) -> str:
    """Return why float16 cannot hold the weights of ``node``; empty where it can."""
    for value in node.inputs:
        if value is None or value.const_value is None or value.const_value.dtype.name != "FLOAT":
            continue
        weights = value.const_value.numpy()
        if np.abs(weights[np.isfinite(weights)]).max(initial=0.0) > _FLOAT16_MAX:
            return f"and float16 holds nothing beyond {_FLOAT16_MAX:g}, but {value.name!r} does"
    return ""
