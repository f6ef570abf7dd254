"""Find the shapes that a file does not state: first by ONNX's shape inference, then by running the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dsc_split._support.optional import require
from dsc_split.errors import ModelFileError
from dsc_split.partitioner._weights_file import INLINE_BELOW_BYTES
from dsc_split.partitioner.graph._index import is_shape_query, reads_of
from dsc_split.partitioner.graph._shapes import fit_line, known_shape, line_of, line_text

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["RunGraph", "complete_shapes"]

logger = logging.getLogger(__name__)

RunGraph = Callable[[bytes, int, int, Sequence[str]], Mapping[str, object]]
"""Runs a serialised graph: ``(graph, batch, seed, output names)`` to values by name."""

_DATA_SIZED = frozenset({"Compress", "NonMaxSuppression", "NonZero", "StringSplit", "Unique"})
"""Ops whose results have a size that depends on the contents of their inputs."""

_SIZING_INPUTS = {
    "CenterCropPad": (1,),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "If": (0,),
    "Loop": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
"""Positions of the inputs whose contents decide the size of the result, by op."""


def complete_shapes(model: ir.Model, *, batches: Sequence[int], run: RunGraph) -> list[str]:
    """Fill in the missing shapes and types of the values of the main graph; changes ``model``.

    ONNX's own inference comes first, once per batch size: it finds more with a number than with a symbol. For the
    values that are still unknown, the graph is run with them as outputs.

    Args:
        model: Its inputs have known shapes in :data:`BATCH`.
        batches: Batch sizes to try: 1, 2 and 3, or the only one of a fixed batch.
        run: Runs the graph.

    Returns:
        Names of the values that stay unknown: their size depends on the data, or is no straight line in the batch.
    """
    unknown = _unknown_values(model)
    if unknown:
        _infer_at_batches(model, unknown, batches)
        unknown = _unknown_values(model)
    data_sized = _data_sized(model, unknown)
    unknown = {name: value for name, value in unknown.items() if value not in data_sized}
    if unknown:
        logger.info("%d shapes are not stated and not inferred; running the model to see them", len(unknown))
        _observe(model, unknown, batches, run)
    return sorted(_unknown_values(model))


def _unknown_values(model: ir.Model) -> dict[str, ir.Value]:
    import onnx_ir as ir

    values = [output for node in model.graph for output in node.outputs if output.name and output.uses()]
    values += [output for output in model.graph.outputs if output.producer() is not None]
    return {
        value.name: value
        for value in values
        if value.name
        and (value.type is None or isinstance(value.type, ir.TensorType))
        and (known_shape(value) is None or value.dtype is None)
    }


def _data_sized(model: ir.Model, unknown: Mapping[str, ir.Value]) -> set[ir.Value]:
    """Find the unknown values whose size depends on the contents of the inputs: it differs from run to run."""
    content: set[ir.Value | None] = set(model.graph.inputs)
    sized: set[ir.Value] = set()
    for node in model.graph:
        reads = reads_of(node, model.graph)
        from_sized = any(value in sized for value in reads)
        if is_shape_query(node):
            content.update(node.outputs if from_sized else ())
            continue
        if any(value in content for value in reads):
            content.update(node.outputs)
            places = _SIZING_INPUTS.get(node.op_type, ())
            by_content = any(value in content for place, value in enumerate(node.inputs) if place in places)
            if from_sized or by_content or node.op_type in _DATA_SIZED:
                sized.update(value for value in node.outputs if value.name in unknown)
    return sized


def _infer_at_batches(model: ir.Model, unknown: Mapping[str, ir.Value], batches: Sequence[int]) -> None:
    import onnx
    import onnx_ir as ir

    proto = ir.serde.serialize_model(model)
    for initializer in proto.graph.initializer:
        _leave_out_weights(initializer)
    borders = [(field, list(field)) for field in (proto.graph.input, proto.graph.output)]
    stated = [info for info in proto.graph.value_info if info.name not in unknown]
    seen: dict[str, dict[int, tuple[int, ...]]] = {}
    for batch in batches:
        # ``extend`` copies, so each batch starts from the shapes of the file.
        for field, infos in [*borders, (proto.graph.value_info, stated)]:
            del field[:]
            field.extend(infos)
            for info in field:
                _set_batch(info, batch)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError) as e:
            logger.info("ONNX shape inference failed: %s", e)
            return
        for info in [*inferred.graph.value_info, *inferred.graph.output]:
            value = unknown.get(info.name)
            tensor = info.type.tensor_type
            if value is None or info.type.WhichOneof("value") != "tensor_type":
                continue
            if value.dtype is None and tensor.elem_type:
                value.type = ir.TensorType(ir.DataType(tensor.elem_type))
            if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                seen.setdefault(info.name, {})[batch] = tuple(dim.dim_value for dim in tensor.shape.dim)
    _set_shapes(unknown, seen, batches)


def _leave_out_weights(tensor: onnx.TensorProto) -> None:
    """Drop the data of a large tensor, and mark it as external: inference reads only small tensors."""
    if len(tensor.raw_data) >= INLINE_BELOW_BYTES:
        tensor.ClearField("raw_data")
        tensor.data_location = tensor.EXTERNAL
        tensor.external_data.add(key="location", value="left out")


def _set_batch(info: onnx.ValueInfoProto, batch: int) -> None:
    """Replace the batch symbol in a shape by a number; drop dimensions that are not known."""
    if info.type.WhichOneof("value") != "tensor_type":
        return
    for dim in info.type.tensor_type.shape.dim:
        if dim.HasField("dim_param"):
            line = line_of(dim.dim_param)
            dim.Clear()
            if line is not None:
                dim.dim_value = line.at(batch)


def _set_shapes(
    values: Mapping[str, ir.Value], seen: Mapping[str, Mapping[int, tuple[int, ...]]], batches: Sequence[int]
) -> None:
    import onnx_ir as ir

    for name, by_batch in seen.items():
        if set(by_batch) != set(batches) or len({len(shape) for shape in by_batch.values()}) != 1:
            continue
        rank = len(by_batch[batches[0]])
        lines = [fit_line({batch: shape[axis] for batch, shape in by_batch.items()}) for axis in range(rank)]
        if all(line is not None for line in lines):
            values[name].shape = ir.Shape([line_text(line) for line in lines if line is not None])


_OBSERVED_AT_ONCE = 64


def _observe(model: ir.Model, unknown: Mapping[str, ir.Value], batches: Sequence[int], run: RunGraph) -> None:
    import numpy as np
    import onnx_ir as ir
    from google.protobuf.message import EncodeError

    onnx = require("onnx", extra="onnx", purpose="read and cut graphs")
    proto = ir.serde.serialize_model(model)
    names = list(unknown)
    seen: dict[str, dict[int, tuple[int, ...]]] = {}
    varies: set[str] = set()
    for start in range(0, len(names), _OBSERVED_AT_ONCE):
        chunk = names[start : start + _OBSERVED_AT_ONCE]
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in chunk)
        try:
            graph = proto.SerializeToString()
        except (EncodeError, ValueError) as e:  # one message holds 2 GB at most
            raise ModelFileError(
                f"the model does not state the shapes of {len(unknown)} values, such as {names[0]!r}, and with its "
                "weights inside it is too large to be run to see them. Save it with external weights, or with shapes."
            ) from e
        for batch, seed in [(batch, 0) for batch in batches] + [(batches[-1], 1)]:
            for name, array in run(graph, batch, seed, chunk).items():
                if not isinstance(array, np.ndarray):
                    varies.add(name)
                    continue
                shape = tuple(array.shape)
                if seen.setdefault(name, {}).setdefault(batch, shape) != shape:
                    varies.add(name)
                if unknown[name].dtype is None:
                    unknown[name].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    _set_shapes(unknown, {name: shapes for name, shapes in seen.items() if name not in varies}, batches)
