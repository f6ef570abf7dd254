"""What ONNX says of an op at an opset, and the type of every value, in If / Loop / Scan bodies and functions too."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsc_split.partitioner.graph._index import bodies, walk

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["FunctionKey", "Types", "formal_of", "infer_types", "nodes_by_opset", "schema_of", "type_text"]

logger = logging.getLogger(__name__)

FunctionKey = tuple[str, str, str]
"""Domain, name and overload of a function of the model."""

Types = dict["ir.Value", "ir.TypeProtocol"]
"""Types by value; values whose type nobody knows are not in it."""


def schema_of(node: ir.Node, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    """Find the schema of an op, or ``None`` where ONNX has none: another domain, or an opset before it came."""
    import onnx

    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, opsets.get("ai.onnx", 1)), domain)
    except onnx.defs.SchemaError:
        return None


def formal_of(formals: Sequence[Any], position: int) -> Any:
    """Give the formal parameter at a position; the last one may stand for any number; ``None`` beyond that."""
    import onnx

    if position < len(formals):
        return formals[position]
    last = formals[-1] if formals else None
    return last if last is not None and last.option == onnx.defs.OpSchema.FormalParameterOption.Variadic else None


def type_text(given: ir.TypeProtocol) -> str:
    """Write a type as schemas do: ``tensor(float)``, ``seq(tensor(float16))``."""
    import onnx_ir as ir

    if isinstance(given, (ir.SequenceType, ir.OptionalType)):
        kind = "seq" if isinstance(given, ir.SequenceType) else "optional"
        return f"{kind}({type_text(given.elem_type)})"
    return f"tensor({given.dtype.name.lower()})"


def nodes_by_opset(model: ir.Model) -> Iterator[tuple[ir.Node, Mapping[str, int]]]:
    """Yield every node, in bodies and functions too, with the opsets that it is read by."""
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        for node in walk(scope):
            yield node, scope.opset_imports


def infer_types(model: ir.Model) -> tuple[Types, dict[FunctionKey, set[tuple[str, ...]]]]:
    """Find the types of all values: the stated ones, and by ONNX's rules those that nobody stated.

    Args:
        model: Sorted topologically.

    Returns:
        The types, and for each function of the model the types of inputs that it is called with, as texts.
    """
    inference = _Inference(model)
    inference.scope(model.graph, model.graph.opset_imports)
    return inference.types, inference.calls


class _Inference:
    def __init__(self, model: ir.Model) -> None:
        self.types: Types = {}
        self.calls: dict[FunctionKey, set[tuple[str, ...]]] = {}
        self._functions = model.functions

    def scope(self, graph: ir.Graph | ir.Function, opsets: Mapping[str, int]) -> None:
        """Type the values of a graph or function; its inputs may have been typed before, by who calls it."""
        initializers = getattr(graph, "initializers", {})
        for value in [*graph.inputs, *initializers.values()]:
            if value.type is not None:
                self.types[value] = value.type
        for node in graph:
            inferred = self._outputs(node, opsets)
            for value, found in itertools.zip_longest(node.outputs, inferred[: len(node.outputs)]):
                known = value.type or found
                if known is not None:
                    self.types[value] = known

    def _outputs(self, node: ir.Node, opsets: Mapping[str, int]) -> Sequence[ir.TypeProtocol | None]:
        if node.op_identifier() in self._functions:
            return self._call(node)
        inner = list(bodies(node))
        if inner:
            given = node.inputs[2:] if node.op_type == "Loop" else node.inputs
            for body in inner:
                formals = body.inputs[2:] if node.op_type == "Loop" else body.inputs
                self._pass(given, formals)
                self.scope(body, opsets)
            first = inner[0].outputs[1:] if node.op_type == "Loop" else inner[0].outputs
            return [self.types.get(value) for value in first]
        if all(value.type is not None for value in node.outputs):
            return ()
        return self._by_schema(node, opsets)

    def _pass(self, given: Sequence[ir.Value | None], formals: Sequence[ir.Value]) -> None:
        for actual, formal in zip(given, formals, strict=False):
            if actual is not None and actual in self.types and formal.type is None:
                self.types[formal] = self.types[actual]

    def _call(self, node: ir.Node) -> Sequence[ir.TypeProtocol | None]:
        key = node.op_identifier()
        function = self._functions[key]
        signature = tuple(type_text(self.types[v]) if v in self.types else "" for v in node.inputs if v is not None)
        self.calls.setdefault(key, set()).add(signature)
        self._pass(node.inputs, function.inputs)
        self.scope(function, function.opset_imports)
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
