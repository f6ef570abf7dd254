"""Convert a graph down to an opset that its targets parse, node by node and in place.

A higher opset mostly lets an op take more types. So a node needs no change if the lower schema takes its inputs,
attributes and types; if it does not, the graph is refused, and the message names the node. The schemas do not show
every difference: the export runs both graphs and compares their results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsc_split.errors import UsageError
from dsc_split.partitioner.graph._schemas import Types, formal_of, infer_types, nodes_by_opset, schema_of, type_text

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["fit_opset"]


def fit_opset(model: ir.Model, limits: Mapping[str, int]) -> bool:
    """Convert ``model`` down to the lowest of the given opsets, if its own is higher.

    Args:
        model: Normalised; changed in place, weights untouched. The caller proves that it computes the same.
        limits: Highest opset that is parsed, by target, as the user wrote it.

    Returns:
        Whether the model was changed.

    Raises:
        UsageError: A node cannot be converted; the message names it, the target and what to do. The model is not
            changed.
    """
    own = model.opset_imports.get("", 1)
    target, limit = min(limits.items(), key=lambda item: item[1], default=("", own))
    if own <= limit:
        return False
    types, _ = infer_types(model)
    changes = []
    for node, opsets in nodes_by_opset(model):
        if node.domain not in ("", "ai.onnx") or node.op_identifier() in model.functions:
            continue
        if opsets.get("", own) <= limit:
            continue
        old, new = schema_of(node, opsets), schema_of(node, {"": limit})
        reason = _misfit(node, old, new, types)
        if reason:
            raise UsageError(
                f"target {target!r} parses ONNX up to opset {limit}, and the graph has opset {own}: {node.op_type} "
                f"node {node.name!r} cannot be converted down, for {reason}. Export the model with opset {limit} or "
                "lower, or choose a target that parses more."
            )
        assert old is not None
        assert new is not None
        changes.append((node, old, new))
    for node, old, new in changes:
        _rewrite(node, old, new)
    for opsets in (model.opset_imports, *(function.opset_imports for function in model.functions.values())):
        if opsets.get("", 0) > limit:
            opsets[""] = limit
    return True


def _misfit(node: ir.Node, old: onnx.defs.OpSchema | None, new: onnx.defs.OpSchema | None, types: Types) -> str:
    """Return why a node does not fit a lower schema; empty if it fits."""
    if old is None:
        return "ONNX does not know it"
    if new is None:
        return f"it came with opset {_first_version(node.op_type)}"
    if new.deprecated:
        return f"it meant something else before opset {old.since_version}"
    if new.since_version == old.since_version:
        return ""
    for name, attribute in node.attributes.items():
        if name not in new.attributes and not _is_default(attribute, old):
            return f"its attribute {name!r} came later"
    for kind, values, formals in (("input", node.inputs, new.inputs), ("output", node.outputs, new.outputs)):
        for position, value in enumerate(values):
            if value is None or not value.name:
                continue
            formal = formal_of(formals, position)
            if formal is None:
                return f"its {kind} {position} came later"
            if value in types and type_text(types[value]) not in formal.types:
                return f"its {kind} {position} was no {type_text(types[value])} then"
    return ""


def _first_version(op_type: str) -> int:
    import onnx

    history = onnx.defs.get_all_schemas_with_history()
    return min(schema.since_version for schema in history if schema.name == op_type and schema.domain == "")


def _is_default(attribute: ir.Attr, schema: onnx.defs.OpSchema) -> bool:
    import onnx

    known = schema.attributes.get(attribute.name)
    if known is None or known.default_value.type == onnx.AttributeProto.UNDEFINED or attribute.is_ref():
        return False
    default = onnx.helper.get_attribute_value(known.default_value)
    return bool((default.decode() if isinstance(default, bytes) else default) == attribute.value)


def _rewrite(node: ir.Node, old: onnx.defs.OpSchema, new: onnx.defs.OpSchema) -> None:
    """Change the attributes of a node so that it means the same by the lower schema."""
    import onnx
    import onnx_ir as ir

    for name in [name for name in node.attributes if name not in new.attributes]:
        del node.attributes[name]
    for name, attribute in old.attributes.items():
        known = new.attributes.get(name)
        if known is None or name in node.attributes or attribute.default_value.type == onnx.AttributeProto.UNDEFINED:
            continue
        if known.default_value != attribute.default_value:
            node.attributes[name] = ir.serde.deserialize_attribute(attribute.default_value)
