"""Find the schema of an op at an opset, and the type of every value, also in If / Loop / Scan bodies and functions."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from dsc_split.partitioner.graph._index import bodies, scopes, walk

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["FunctionKey", "Types", "formal_of", "infer_types", "nodes_by_opset", "schema_of", "type_text"]

logger = logging.getLogger(__name__)

FunctionKey = tuple[str, str, str]
"""Domain, name and overload of a function of the model."""

Types = dict["ir.Value", "ir.TypeProtocol"]
"""Types by value; a value whose type is not known is not listed."""


def schema_of(node: ir.Node, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    """Return the schema of an op; ``None`` if ONNX has none: the domain is another, or the opset is too old."""
    import onnx

    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, opsets.get("ai.onnx", 1)), domain)
    except onnx.defs.SchemaError:
        return None


def formal_of(
    formals: Sequence[onnx.defs.OpSchema.FormalParameter], position: int
) -> onnx.defs.OpSchema.FormalParameter | None:
    """Return the formal parameter at a position; the last one may stand for many; ``None`` if there is none."""
    import onnx

    if position < len(formals):
        return formals[position]
    last = formals[-1] if formals else None
    return last if last is not None and last.option == onnx.defs.OpSchema.FormalParameterOption.Variadic else None


def type_text(given: ir.TypeProtocol) -> str:
    """Return a type as schemas write it: ``tensor(float)``, ``seq(tensor(float16))``."""
    import onnx_ir as ir

    if isinstance(given, (ir.SequenceType, ir.OptionalType)):
        kind = "seq" if isinstance(given, ir.SequenceType) else "optional"
        return f"{kind}({type_text(given.elem_type)})"
    return f"tensor({given.dtype.name.lower()})"


def nodes_by_opset(model: ir.Model) -> Iterator[tuple[ir.Node, Mapping[str, int]]]:
    """Yield every node, also of bodies and functions, with the opsets that apply to it."""
    for scope in scopes(model):
        for node in walk(scope):
            yield node, scope.opset_imports


def infer_types(model: ir.Model) -> tuple[Types, dict[FunctionKey, set[tuple[str, ...]]]]:
    """Find the types of all values: those that the model states, and the others by ONNX's type inference.

    Args:
        model: Sorted topologically.

    Returns:
        The types, and for each function of the model the input types of its calls, as texts.
    """
    inference = _Inference(model)
    inference.infer_scope(model.graph, model.graph.opset_imports)
    return inference.types, inference.calls


class _Inference:
    def __init__(self, model: ir.Model) -> None:
        self.types: Types = {}
        self.calls: dict[FunctionKey, set[tuple[str, ...]]] = {}
        self._functions = model.functions

    def infer_scope(self, graph: ir.Graph | ir.Function, opsets: Mapping[str, int]) -> None:
        """Find the types in a graph or function; those of its inputs may be known already from its caller."""
        initializers = getattr(graph, "initializers", {})
        for value in [*graph.inputs, *initializers.values()]:
            if value.type is not None:
                self.types[value] = value.type
        for node in graph:
            inferred = self._output_types(node, opsets)
            for value, found in itertools.zip_longest(node.outputs, inferred[: len(node.outputs)]):
                known = value.type or found
                if known is not None:
                    self.types[value] = known

    def _output_types(self, node: ir.Node, opsets: Mapping[str, int]) -> Sequence[ir.TypeProtocol | None]:
        if node.op_identifier() in self._functions:
            return self._call_types(node)
        inner = list(bodies(node))
        if inner:
            given = node.inputs[2:] if node.op_type == "Loop" else node.inputs
            for body in inner:
                formals = body.inputs[2:] if node.op_type == "Loop" else body.inputs
                self._pass_types(given, formals)
                self.infer_scope(body, opsets)
            first = inner[0].outputs[1:] if node.op_type == "Loop" else inner[0].outputs
            return [self.types.get(value) for value in first]
        if all(value.type is not None for value in node.outputs):
            return ()
        return self._by_schema(node, opsets)

    def _pass_types(self, given: Sequence[ir.Value | None], formals: Sequence[ir.Value]) -> None:
        for actual, formal in zip(given, formals, strict=False):
            if actual is not None and actual in self.types and formal.type is None:
                self.types[formal] = self.types[actual]

    def _call_types(self, node: ir.Node) -> Sequence[ir.TypeProtocol | None]:
        key = node.op_identifier()
        function = self._functions[key]
        signature = tuple(type_text(self.types[v]) if v in self.types else "" for v in node.inputs if v is not None)
        self.calls.setdefault(key, set()).add(signature)
        self._pass_types(node.inputs, function.inputs)
        self.infer_scope(function, function.opset_imports)
        return [self.types.get(value) for value in function.outputs]

    def _by_schema(self, node: ir.Node, opsets: Mapping[str, int]) -> Sequence[ir.TypeProtocol | None]:
        import onnx
        import onnx_ir as ir

        schema = schema_of(node, opsets)
        if schema is None:
            return ()
        given = {v.name or "": ir.serde.serialize_type(self.types[v]) for v in node.inputs if v in self.types}
        try:
            found = onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), given)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, KeyError) as e:
            logger.debug("type of %s %r is not inferred: %s", node.op_type, node.name, e)
            return ()
        texts = [found.get(value.name or "") for value in node.outputs]
        return [ir.serde.deserialize_type_proto_for_type(each) if each is not None else None for each in texts]
