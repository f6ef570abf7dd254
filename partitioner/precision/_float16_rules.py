"""Decide which values of a graph become float16 and which nodes stay float32, before anything is changed.

ONNX's schemas decide: a value becomes float16 if the schema lets the op that makes it make float16. Two tables here
hold the exceptions. A value that decides a size, an index or a comparison (a resize scale, a slice start) also stays
float32, if it depends on shapes and constants only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsc_split.partitioner.graph._index import bodies, is_shape_query, walk
from dsc_split.partitioner.graph._schemas import Types, formal_of, infer_types, nodes_by_opset, schema_of, type_text

if TYPE_CHECKING:
    import onnx
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
"""Positions of the inputs that stay float32 although the rest of the op becomes float16, by op."""

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
"""Ops with an attribute that decides the type of their output, and its name."""


def is_float(types: Types, value: ir.Value | None) -> bool:
    """Return whether a value is a float32 tensor, or a sequence of them."""
    import onnx_ir as ir

    return value is not None and value in types and types[value].dtype == ir.DataType.FLOAT


class HalfRules:
    """Decides once for every node of a model; the model is not changed."""

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self.types, self._calls = infer_types(model)
        self.opsets = dict(nodes_by_opset(model))
        """The opsets that apply to each node."""
        self._data = _data_values(model)
        self.kept: dict[ir.Node, str] = {}
        """Nodes that stay float32 as a whole, and why."""
        self.kept_functions = {
            key
            for key, function in model.functions.items()
            if len(self._calls.get(key, ())) != 1 or _takes_type(function)
        }
        """Functions that stay as they are: calls differ in their types, or pass a type as an attribute."""
        for node in self.opsets:
            self._judge(node)
        self._keep_exact()
        self._settle_functions()

    def wants_half(self, node: ir.Node, position: int) -> bool:
        """Return whether a node reads this float32 input as float16."""
        return self._is_half(node, position, output=False)

    def makes_half(self, node: ir.Node, position: int) -> bool:
        """Return whether this float32 output of a node becomes float16."""
        return self._is_half(node, position, output=True)

    # ---- nodes ---------------------------------------------------------------------------------------------

    def _float_ports(self, node: ir.Node) -> list[tuple[int, bool]]:
        """List the float32 inputs and outputs of a node as (position, whether it is an output)."""
        inputs = [(i, False) for i, value in enumerate(node.inputs) if is_float(self.types, value)]
        return inputs + [(i, True) for i, value in enumerate(node.outputs) if is_float(self.types, value)]

    def _judge(self, node: ir.Node) -> None:
        floats = self._float_ports(node)
        if node in self.kept or not floats or node.op_identifier() in self._functions:
            return
        if node.domain in ("", "ai.onnx") and node.op_type in _KEPT_OPS:
            self._keep(node, _KEPT_OPS[node.op_type])
        elif schema_of(node, self.opsets[node]) is None:
            self._keep(node, f"nothing is known of ops of {node.domain or 'ONNX'!r} by that name")
        elif not any(self._is_half(node, position, output=output) for position, output in floats):
            stays = ", ".join(_KEPT_INPUTS.get(node.op_type, {}).values())
            self._keep(node, f"its {stays} stays float32" if stays else "ONNX has no float16 for it at this opset")

    def _keep(self, node: ir.Node, reason: str) -> None:
        self.kept.setdefault(node, reason)
        for body in bodies(node):
            for inner in walk(body):
                self.kept.setdefault(inner, reason)

    def _is_half(self, node: ir.Node, position: int, *, output: bool) -> bool:
        if node in self.kept:
            return False
        key = node.op_identifier()
        if key in self._functions:
            return key not in self.kept_functions
        schema = schema_of(node, self.opsets[node])
        assert schema is not None, f"{node.op_type} was not judged"
        formal = formal_of(schema.outputs if output else schema.inputs, position)
        return formal is not None and formal.type_str in self._half_variables(node, schema)

    def _half_variables(self, node: ir.Node, schema: onnx.defs.OpSchema) -> set[str]:
        """List the type variables of a schema that may be float16 for a node, by the schema and by our table."""
        fit: dict[str, bool] = {}
        kept = _KEPT_INPUTS.get(node.op_type, {}) if node.domain in ("", "ai.onnx") else {}
        for position, output in self._float_ports(node):
            formal = formal_of(schema.outputs if output else schema.inputs, position)
            if formal is None:
                continue
            value = node.outputs[position] if output else node.inputs[position]
            assert value is not None
            half = type_text(self.types[value]).replace("(float)", "(float16)")
            allowed = half in formal.types and (output or position not in kept)
            fit[formal.type_str] = fit.get(formal.type_str, True) and allowed
        return {name for name, fits in fit.items() if fits}

    # ---- exact values --------------------------------------------------------------------------------------

    def _keep_exact(self) -> None:
        """Keep the nodes that compute the exact values, walking back from their readers until data is met."""
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
        """Keep each function that a kept node calls: all its calls share one body."""
        while True:
            before = len(self.kept_functions)
            for key in self.kept_functions:
                for node in walk(self._functions[key]):
                    self._keep(node, f"function {key[1]!r} is kept in float32")
            called = {node.op_identifier() for node in self.kept}
            self.kept_functions |= called & set(self._functions)
            if len(self.kept_functions) == before:
                return


def _takes_type(function: ir.Function) -> bool:
    """Return whether a caller decides a type inside a function, by an attribute."""
    typed = {**TYPE_ATTRIBUTES, "Constant": "", "ConstantOfShape": ""}
    return any(
        attribute.is_ref() and node.op_type in typed
        for node in walk(function)
        for attribute in node.attributes.values()
    )


def _data_values(model: ir.Model) -> set[ir.Value]:
    """Find the values that depend on the contents of the inputs; in a body or function, of its own inputs."""
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
