"""Which values of a graph become float16 and which nodes go on in float32, before anything is changed.

ONNX's schemas decide: a value becomes float16 where the op that makes it may make float16. What they do not know
stands in two tables here. Beyond that, what decides a size, an index or a comparison (how far to resize, where to
slice, which window a pixel is in) is computed as exactly as before, as long as it follows from shapes and constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsc_split.partitioner.graph._index import bodies, is_shape_query, walk
from dsc_split.partitioner.graph._schemas import (
    Types,
    formal_of,
    infer_types,
    nodes_by_opset,
    schema_of,
    type_text,
)

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["TYPE_ATTRIBUTES", "HalfRules", "is_float"]

_KEPT_OPS = {
    "BitCast": "it reads the bits of a number, and those of a float16 are others",
    "CumSum": "it adds up along an axis, and a float16 counts to 2048 in ones",
    "CumProd": "it multiplies along an axis, and the error grows with each step",
    "GridSample": "its grid says where to read, and a float16 is no pixel of a large image",
    "AffineGrid": "its grid says where to read, and a float16 is no pixel of a large image",
    "Range": "it counts, and a float16 counts to 2048 in ones",
    "RoiAlign": "its boxes are in pixels, and a float16 is no pixel of a large image",
}
"""Ops that are computed in float32 although ONNX allows float16, and why."""

_KEPT_INPUTS = {
    "DequantizeLinear": {1: "scale"},  # 11 bits of a scale are an error of every value
    "OneHot": {1: "depth"},  # a size
    "QuantizeLinear": {1: "scale"},
    "Resize": {1: "roi", 2: "scales"},  # they decide the size of the output
}
"""Inputs, by place, that stay float32 though the rest of the op need not."""

_EXACT = "what it computes decides a size, an index or a comparison, and not by the data"

TYPE_ATTRIBUTES = {
    "Bernoulli": "dtype",
    "BlackmanWindow": "output_datatype",
    "Cast": "to",
    "DequantizeLinear": "output_dtype",
    "EyeLike": "dtype",
    "HammingWindow": "output_datatype",
    "HannWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
    "RandomNormal": "dtype",
    "RandomNormalLike": "dtype",
    "RandomUniform": "dtype",
    "RandomUniformLike": "dtype",
    "SequenceEmpty": "dtype",
}
"""Ops whose output has the type that an attribute says, and which attribute."""


def is_float(types: Types, value: ir.Value | None) -> bool:
    """Tell whether a value is float32, or a sequence of such."""
    import onnx_ir as ir

    return value is not None and value in types and types[value].dtype == ir.DataType.FLOAT


class HalfRules:
    """Decides on every node of a model once; the model is not changed."""

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self.types, self._calls = infer_types(model)
        self.opsets = dict(nodes_by_opset(model))
        """The opsets that each node is read by."""
        self._data = _data_values(model)
        self.kept: dict[ir.Node, str] = {}
        """Nodes that go on in float32 as a whole, and why."""
        self.kept_functions = {
            key for key, function in model.functions.items() if len(self._calls.get(key, ())) != 1 or _is_open(function)
        }
        """Functions whose bodies stay as they are: called with several types, or typed by who calls them."""
        for node in self.opsets:
            self._judge(node)
        self._keep_exact()
        self._settle_functions()

    def wants_half(self, node: ir.Node, position: int) -> bool:
        """Tell whether a float32 input of a node is to be float16."""
        return self._port(node, position, output=False)

    def makes_half(self, node: ir.Node, position: int) -> bool:
        """Tell whether a float32 output of a node becomes float16."""
        return self._port(node, position, output=True)

    # ---- nodes ---------------------------------------------------------------------------------------------

    def _floats(self, node: ir.Node) -> list[tuple[int, bool]]:
        """List the float32 inputs and outputs of a node: position, and whether it is an output."""
        inputs = [(i, False) for i, value in enumerate(node.inputs) if is_float(self.types, value)]
        return inputs + [(i, True) for i, value in enumerate(node.outputs) if is_float(self.types, value)]

    def _judge(self, node: ir.Node) -> None:
        floats = self._floats(node)
        if node in self.kept or not floats or node.op_identifier() in self._functions:
            return
        if node.domain in ("", "ai.onnx") and node.op_type in _KEPT_OPS:
            self._keep(node, _KEPT_OPS[node.op_type])
        elif schema_of(node, self.opsets[node]) is None:
            self._keep(node, f"nothing is known of ops of {node.domain or 'ONNX'!r} by that name")
        elif not any(self._port(node, position, output=output) for position, output in floats):
            stays = ", ".join(_KEPT_INPUTS.get(node.op_type, {}).values())
            self._keep(node, f"its {stays} stays float32" if stays else "ONNX has no float16 for it at this opset")

    def _keep(self, node: ir.Node, reason: str) -> None:
        self.kept.setdefault(node, reason)
        for body in bodies(node):
            for inner in walk(body):
                self.kept.setdefault(inner, reason)

    def _port(self, node: ir.Node, position: int, *, output: bool) -> bool:
        if node in self.kept:
            return False
        key = node.op_identifier()
        if key in self._functions:
            return key not in self.kept_functions
        schema = schema_of(node, self.opsets[node])
        assert schema is not None, f"{node.op_type} was not judged"
        formal = formal_of(schema.outputs if output else schema.inputs, position)
        return formal is not None and formal.type_str in self._variables(node, schema)

    def _variables(self, node: ir.Node, schema: Any) -> set[str]:
        """List the type variables of a node that may be bound to float16: by the schema, and by our table."""
        fit: dict[str, bool] = {}
        kept = _KEPT_INPUTS.get(node.op_type, {}) if node.domain in ("", "ai.onnx") else {}
        for position, output in self._floats(node):
            formal = formal_of(schema.outputs if output else schema.inputs, position)
            if formal is None:
                continue
            value = node.outputs[position] if output else node.inputs[position]
            assert value is not None
            half = type_text(self.types[value]).replace("(float)", "(float16)")
            allowed = half in formal.types and (output or position not in kept)
            fit[formal.type_str] = fit.get(formal.type_str, True) and allowed
        return {name for name, fits in fit.items() if fits}

    # ---- what is exact -------------------------------------------------------------------------------------

    def _keep_exact(self) -> None:
        """Walk back from what is asked for in float32, or made no float of, as long as no data is met."""
        pending: list[ir.Value] = []
        for node in self.opsets:
            floats = [value for value in node.inputs if value is not None and is_float(self.types, value)]
            ends = floats and not any(is_float(self.types, value) for value in node.outputs)
            if ends and node.op_identifier() not in self._functions and not self._data.intersection(floats):
                self._keep(node, _EXACT)
            pending += [
                value
                for position, value in enumerate(node.inputs)
                if value in floats and not self.wants_half(node, position)
            ]
        while pending:
            made = pending.pop()
            producer = made.producer()
            if made in self._data or producer is None or producer in self.kept or producer.op_type == "Constant":
                continue
            self._keep(producer, _EXACT)
            pending += [value for value in producer.inputs if value is not None and is_float(self.types, value)]

    def _settle_functions(self) -> None:
        """Keep each function as it is that is called by what is kept: it has one body for all its calls."""
        while True:
            before = len(self.kept_functions)
            for key in self.kept_functions:
                for node in walk(self._functions[key]):
                    self._keep(node, f"function {key[1]!r} is kept in float32")
            called = {node.op_identifier() for node in self.kept}
            self.kept_functions |= called & set(self._functions)
            if len(self.kept_functions) == before:
                return


def _is_open(function: ir.Function) -> bool:
    """Tell whether who calls a function decides on a type inside it."""
    typed = {**TYPE_ATTRIBUTES, "Constant": "", "ConstantOfShape": ""}
    return any(
        attribute.is_ref() and node.op_type in typed
        for node in walk(function)
        for attribute in node.attributes.values()
    )


def _data_values(model: ir.Model) -> set[ir.Value]:
    """Find the values that depend on what is in the inputs; in bodies and functions, on what is given to them."""
    data: set[ir.Value] = set()

    def spread(scope: ir.Graph | ir.Function) -> None:
        data.update(scope.inputs)
        for node in scope:
            inner = list(bodies(node))
            for body in inner:
                spread(body)
            if inner or (not is_shape_query(node) and any(value in data for value in node.inputs)):
                data.update(node.outputs)

    spread(model.graph)
    for function in model.functions.values():
        spread(function)
    return data
