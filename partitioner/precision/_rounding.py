"""Make ONNX Runtime round to float16 wherever a graph does.

On the CPU it computes most float16 ops in float32 and drops the casts between them, so nothing is rounded: a number
that overflows or vanishes in float16 does not show. A GPU rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dsc_split.partitioner.graph._index import is_shape_query, scopes, walk
from dsc_split.partitioner.graph._names import unused_name
from dsc_split.partitioner.graph._schemas import infer_types
from dsc_split.partitioner.precision._float16 import values_of

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["half_values", "keep_roundings"]


def half_values(model: ir.Model) -> list[ir.Value]:
    """List the float16 tensors that nodes compute, also in bodies and functions, in graph order."""
    import onnx_ir as ir

    types, _ = infer_types(model)

    def is_half(given: ir.TypeProtocol | None) -> bool:
        return isinstance(given, ir.TensorType) and given.dtype == ir.DataType.FLOAT16

    return [
        value
        for scope in scopes(model)
        for node in walk(scope)
        if node.op_type != "Constant"
        for value in node.outputs
        if is_half(types.get(value))
    ]


def keep_roundings(model: ir.Model, values: Iterable[ir.Value]) -> None:
    """Add two Reshapes, to the same shape, after each of some float16 values: ONNX Runtime then keeps the casts.

    One Reshape is not enough: ONNX Runtime computes a single float16 node between float32 nodes in float32.

    Args:
        model: Changed in place: it computes the same, and the readers of a value read the second Reshape.
        values: Made by nodes, also in bodies and functions; outputs of a graph or function stay as they are.
    """
    import onnx_ir as ir

    taken = {value.name for scope in scopes(model) for value in values_of(scope) if value.name}
    for value in values:
        uses = [(user, i) for user, i in value.uses() if not is_shape_query(user)]
        producer = value.producer()
        if not uses or producer is None or producer.graph is None:
            continue
        shape = ir.node("Shape", [value])
        first = ir.node("Reshape", [value, shape.outputs[0]])
        second = ir.node("Reshape", [first.outputs[0], shape.outputs[0]])
        for node in (shape, first, second):
            node.outputs[0].name = unused_name(f"{value.name}_{node.op_type.lower()}", taken)
            node.name = f"node_{node.outputs[0].name}"
        producer.graph.insert_after(producer, [shape, first, second])
        for user, i in uses:
            user.replace_input_with(i, second.outputs[0])
