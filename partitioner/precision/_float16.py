"""Convert a whole float32 graph to float16, before it is cut: so head and tail agree on every type."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsc_split.bundles._records import KeptNode, Precision
from dsc_split.errors import ExportError
from dsc_split.partitioner.graph._index import MODULE_KEY, bodies, scopes, walk
from dsc_split.partitioner.graph._names import unused_name
from dsc_split.partitioner.graph._schemas import schema_of
from dsc_split.partitioner.precision._float16_rules import TYPE_ATTRIBUTES, HalfRules, is_float

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["HalfReport", "leaves_float32", "precision_of", "to_half", "values_of"]

logger = logging.getLogger(__name__)

_BLOCK = 1 << 22
"""Numbers of a weight that are converted at a time."""


@dataclass(frozen=True, kw_only=True)
class HalfReport:
    """The result of a conversion to float16."""

    weights_converted: int
    """Numbers in initialisers and constants that became float16; a tensor that two ops share counts once."""
    weights_overflowed: int
    """Those that are too large for a float16: they became the largest one, 65504, with their sign."""
    weights_vanished: int
    """Those that are not zero and became zero."""
    overflowed_in: tuple[str, ...]
    """Names of the initialisers and constants with numbers that overflowed."""
    kept_float32: tuple[KeptNode, ...]
    """Nodes that are computed in float32, in graph order."""


def precision_of(model: ir.Model) -> Precision:
    """Return the precision of a graph: ``fp16`` if any value is a 16-bit float, else ``fp32``."""
    import onnx_ir as ir

    half = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
    return "fp16" if any(value.dtype in half for node in model.graph for value in node.outputs) else "fp32"


def leaves_float32(model: ir.Model, *, io_precision: str | None = None) -> bool:
    """Return whether :func:`to_half` would make anything float16, apart from casts and constants.

    Args:
        model: As for :func:`to_half`; not changed.
        io_precision: As for :func:`to_half`.
    """
    return _Conversion(model, keep_io=io_precision == "fp32").has_work()


def to_half(model: ir.Model, *, io_precision: str | None = None) -> HalfReport:
    """Convert every float32 value of ``model`` to float16, except those that must stay float32.

    Nodes keep their names, order and modules, and values keep their names; so cuts keep their names too. Weights are
    read one at a time, to count them, and converted when they are stored.

    Args:
        model: Normalised; changed in place.
        io_precision: ``fp32`` keeps the types of inputs and outputs, and adds casts after the inputs and before the
            outputs; otherwise they become float16 too.

    Returns:
        Counts of the weights, and the nodes that stay float32.

    Raises:
        ExportError: A value that needs a cast between two nodes is no tensor.
    """
    return _Conversion(model, keep_io=io_precision == "fp32").run()


class _Conversion:
    def __init__(self, model: ir.Model, *, keep_io: bool) -> None:
        self._model = model
        self._keep_io = keep_io
        self._rules = HalfRules(model)
        self._weights = _Weights()
        self._half: set[ir.Value] = set()
        self._copies: dict[ir.Value, ir.Value] = {}
        self._narrowed: dict[ir.Value, ir.Value] = {}
        self._taken = {value.name for scope in scopes(model) for value in values_of(scope) if value.name}

    def run(self) -> HalfReport:
        rules, model = self._rules, self._model
        order = [node for scope in scopes(model) for node in walk(scope)]
        self._choose_values(order)
        self._convert_weights(order)
        self._convert_scope(model.graph, half_outputs=not self._keep_io)
        for key, function in model.functions.items():
            if key not in rules.kept_functions:
                self._convert_scope(function, half_outputs=True)
        kept = [node for node in order if node in rules.kept]
        return HalfReport(
            weights_converted=self._weights.converted,
            weights_overflowed=self._weights.overflowed,
            weights_vanished=self._weights.vanished,
            overflowed_in=tuple(self._weights.overflowed_in),
            kept_float32=tuple(
                KeptNode(name=node.name or None, op_type=node.op_type, reason=rules.kept[node]) for node in kept
            ),
        )

    def has_work(self) -> bool:
        """Return whether a node, an input or an output has a float32 value that becomes float16."""
        rules = self._rules
        computing = (
            node for scope in scopes(self._model) for node in walk(scope) if node.op_type not in ("Cast", "Constant")
        )
        return any(
            any(self._is_float(value) and rules.wants_half(node, i) for i, value in enumerate(node.inputs))
            or any(self._is_float(value) and rules.makes_half(node, i) for i, value in enumerate(node.outputs))
            for node in computing
        ) or any(map(self._is_float, () if self._keep_io else (*self._model.graph.inputs, *self._model.graph.outputs)))

    # ---- what becomes float16 ------------------------------------------------------------------------------

    def _is_float(self, value: ir.Value | None) -> bool:
        return is_float(self._rules.types, value)

    def _choose_values(self, order: Sequence[ir.Node]) -> None:
        """Collect the values that become float16, except weights."""
        rules = self._rules
        given = [] if self._keep_io else list(self._model.graph.inputs)
        for key, function in self._model.functions.items():
            if key not in rules.kept_functions:
                given.extend(function.inputs)
        for node in order:
            given += [value for body in bodies(node) if node not in rules.kept for value in body.inputs]
            self._half.update(
                value for i, value in enumerate(node.outputs) if self._is_float(value) and rules.makes_half(node, i)
            )
        self._half.update(value for value in given if self._is_float(value))

    def _uses(self, order: Sequence[ir.Node]) -> Iterator[tuple[ir.Value, bool]]:
        """Yield each float32 value that is read, and whether it is read as float16 there."""
        for node in order:
            for i, value in enumerate(node.inputs):
                if value is not None and self._is_float(value):
                    yield value, self._rules.wants_half(node, i)
            for body in bodies(node):
                yield from ((value, node not in self._rules.kept) for value in body.outputs)
        yield from ((value, not self._keep_io) for value in self._model.graph.outputs)

    def _convert_weights(self, order: Sequence[ir.Node]) -> None:
        """Convert initialisers and constants; one that is read in both types stays, and gets a float16 copy."""
        wanted: dict[ir.Value, set[bool]] = {}
        for value, half in self._uses(order):
            wanted.setdefault(value, set()).add(half)
        for graph in self._model.graphs():
            for value in list(graph.initializers.values()):
                if not self._is_float(value) or value.const_value is None or True not in wanted.get(value, set()):
                    continue
                target = value if wanted[value] == {True} else self._copy(graph, value)
                target.const_value = self._weights.convert(value.const_value, target.name or "")
                _set_half(target)
                self._half.add(target)
        for node in order:
            if node.op_type == "Constant" and False in wanted.get(node.outputs[0], ()):
                self._half.discard(node.outputs[0])

    def _copy(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        copy = ir.Value(
            name=unused_name(f"{value.name}_float16", self._taken),
            shape=value.shape,
            type=value.type,
            const_value=value.const_value,
        )
        graph.register_initializer(copy)
        self._copies[value] = copy
        return copy

    # ---- rewriting -----------------------------------------------------------------------------------------

    def _convert_scope(self, scope: ir.Graph | ir.Function, *, half_outputs: bool) -> None:
        for value in scope.inputs:
            if value in self._half:
                _set_half(value)
        for node in list(scope):
            for body in bodies(node):
                self._convert_scope(body, half_outputs=node not in self._rules.kept)
            for i, read in enumerate(node.inputs):
                if read is not None and self._is_float(read):
                    node.replace_input_with(i, self._cast_for(read, node, half=self._rules.wants_half(node, i)))
            if any(value in self._half for value in node.outputs):
                self._set_attributes(node)
            for value in node.outputs:
                if value in self._half:
                    _set_half(value)
        for i, value in enumerate(scope.outputs):
            if self._is_float(value) and (value in self._half) != half_outputs:
                scope.outputs[i] = self._cast_output(value, scope, half=half_outputs)

    def _cast_for(self, value: ir.Value, node: ir.Node, *, half: bool) -> ir.Value:
        """Return ``value`` in the type that ``node`` reads.

        A float32 value is cast to float16 right after it is made, and a float16 value to float32 right before it is
        read. So no cast adds a tensor that crosses a cut, and cuts stay cuts.
        """
        if half == (value in self._half):
            return value
        if not half:
            cast = self._cast(value, half=False, module=node.metadata_props.get(MODULE_KEY))
            assert node.graph is not None
            node.graph.insert_before(node, cast)
            return cast.outputs[0]
        if value in self._copies:
            return self._copies[value]
        if value not in self._narrowed:
            self._narrowed[value] = self._cast_where_made(value, half=True)
        return self._narrowed[value]

    def _cast_output(self, value: ir.Value, scope: ir.Graph | ir.Function, *, half: bool) -> ir.Value:
        """Return an output of a scope in the other type."""
        if half and value in self._narrowed:
            return self._narrowed[value]
        if value.graph is scope or value.producer() in set(scope):
            return self._cast_where_made(value, half=half)
        cast = self._cast(value, half=half, module=None)  # captured: no node here makes it
        scope.append(cast)
        return cast.outputs[0]

    def _cast_where_made(self, value: ir.Value, *, half: bool) -> ir.Value:
        """Cast a value right after it is made; the result takes over its name, because other nodes read the result."""
        producer = value.producer()
        module = producer.metadata_props.get(MODULE_KEY) if producer is not None else None
        cast = self._cast(value, half=half, module=module)
        graph = value.graph if producer is None else producer.graph
        assert graph is not None
        if producer is not None:
            graph.insert_after(producer, cast)
        else:
            first = next(iter(graph), None)
            assert first is not None, "a graph without nodes reads nothing"
            graph.insert_before(first, cast)
        result = cast.outputs[0]
        stays = value.is_graph_input() or (half and self._keep_io and value.is_graph_output())
        if not stays:
            name, value.name = value.name, unused_name(f"{value.name}_{'float32' if half else 'float16'}", self._taken)
            result.name = name
        return result

    def _cast(self, value: ir.Value, *, half: bool, module: str | None) -> ir.Node:
        import onnx_ir as ir

        if not isinstance(self._rules.types[value], ir.TensorType):
            raise ExportError(
                f"the graph cannot be converted to float16: {value.name!r} is {self._rules.types[value]}, which no "
                "node can cast between those that take float16 and those that do not. Export it with --precision fp32."
            )
        target = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        name = unused_name(f"{value.name}_{'float16' if half else 'float32'}", self._taken)
        node = ir.node("Cast", [value], {"to": int(target)}, name=f"node_{name}")
        if module is not None:
            node.metadata_props[MODULE_KEY] = module
        result = node.outputs[0]
        result.name, result.shape, result.type = name, value.shape, ir.TensorType(target)
        return node

    def _set_attributes(self, node: ir.Node) -> None:
        """Change the attributes of an op that decide its output type to float16."""
        import onnx_ir as ir

        if node.domain not in ("", "ai.onnx"):
            return
        if node.op_type in ("Constant", "ConstantOfShape"):
            given = node.attributes.get("value") or node.attributes.get("value_float")
            given = given or node.attributes.get("value_floats")
            tensor = ir.tensor(np.zeros(1, np.float32)) if given is None else _as_tensor(given)
            half = self._weights.convert(tensor, node.outputs[0].name or "")
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(half.numpy(), name=tensor.name))
        elif node.op_type in TYPE_ATTRIBUTES:
            name = TYPE_ATTRIBUTES[node.op_type]
            schema = schema_of(node, self._rules.opsets[node])
            if schema is not None and name in schema.attributes:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT16))


class _Weights:
    """Converts weights, each once, and counts what float16 cannot hold."""

    def __init__(self) -> None:
        self.converted = self.overflowed = self.vanished = 0
        self.overflowed_in: list[str] = []
        self._done: dict[object, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}

    def convert(self, tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
        """Return a float16 tensor that is computed when it is read; what it loses is counted now."""
        import onnx_ir as ir

        # Values may share a tensor, or a stretch of a file.
        key: object = id(tensor)
        if isinstance(tensor, ir.ExternalTensor):
            key = (tensor.path, tensor.offset, tensor.length, tuple(tensor.shape.numpy()))
        if key in self._done:
            return self._done[key][1]
        overflowed = vanished = 0
        for block in _blocks(tensor):
            overflowed += int((np.isfinite(block) & (np.abs(block) >= _BEYOND)).sum())
            vanished += int(((_halve(block) == 0) & (block != 0)).sum())
        self.converted += int(tensor.size)
        self.overflowed += overflowed
        self.vanished += vanished
        if overflowed:
            self.overflowed_in.append(name)
        shape = ir.Shape(list(tensor.shape.numpy()))
        result = ir.LazyTensor(_reader(tensor), ir.DataType.FLOAT16, shape, name=name)
        self._done[key] = (tensor, result)  # with the source: an id is unique only while its object lives
        return result


_LARGEST = 65504.0
_BEYOND = 65520.0
"""The smallest number that rounds to infinity and not to the largest float16."""


def _halve(array: np.ndarray) -> np.ndarray:
    """Round to float16; a finite number stays finite.

    Models use the lowest float32 as "minus infinity" in masks. With a real infinity, the softmax of a row that is
    masked as a whole would be NaN.
    """
    limited = np.where(np.isfinite(array), np.clip(array, -_LARGEST, _LARGEST), array)
    return limited.astype(np.float16)


def _reader(tensor: ir.TensorProtocol) -> Callable[[], ir.TensorProtocol]:
    import onnx_ir as ir

    def read() -> ir.TensorProtocol:
        half = np.empty(tensor.size, np.float16)
        for i, block in enumerate(_blocks(tensor)):
            half[i * _BLOCK : i * _BLOCK + block.size] = _halve(block)
        return ir.tensor(half.reshape(tensor.shape.numpy()))

    return read


def _blocks(tensor: ir.TensorProtocol) -> Iterator[np.ndarray]:
    """Yield the numbers of a tensor in blocks, so that a large tensor is never copied as a whole."""
    flat = tensor.numpy().reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        yield flat[start : start + _BLOCK]


def _as_tensor(attribute: ir.Attr) -> ir.TensorProtocol:
    import onnx_ir as ir

    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor()
    numbers = attribute.as_float() if attribute.type == ir.AttributeType.FLOAT else list(attribute.as_floats())
    return ir.tensor(np.asarray(numbers, np.float32))


def _set_half(value: ir.Value) -> None:
    if value.type is not None:
        value.type = _half_type(value.type)


def _half_type(given: ir.TypeProtocol) -> ir.TypeProtocol:
    import onnx_ir as ir

    if isinstance(given, (ir.SequenceType, ir.OptionalType)):
        return type(given)(_half_type(given.elem_type))
    return ir.TensorType(ir.DataType.FLOAT16)


def values_of(scope: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    """Yield the values of a scope and of every body in it."""
    yield from scope.inputs
    yield from getattr(scope, "initializers", {}).values()
    for node in scope:
        yield from node.outputs
        for body in bodies(node):
            yield from values_of(body)
