"""Make the head and the tail of a cut: two graphs that refer to the weights of the whole model.

Only nodes are copied: initialisers keep their reference into the one weights file. The head sends data only. If the
tail needs the batch size, which the whole model reads from the shape of an early value, the tail computes it from the
shape of a tensor that crosses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.errors import CutError
from dsc_split.partitioner.cuts._find import Cut
from dsc_split.partitioner.graph._index import GraphIndex, bodies, index_graph, is_shape_query, shape_lines, walk
from dsc_split.partitioner.graph._shapes import Line, known_shape

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["Cutter", "SplitPair"]

_PREFIX = "dsc_split/"


@dataclass(frozen=True, kw_only=True)
class SplitPair:
    """The two graphs of one cut."""

    head: onnx.ModelProto
    """Takes the inputs of the model that it needs; returns the tensors that cross, then the other early outputs."""
    tail: onnx.ModelProto
    """Takes the tensors that cross; returns the other outputs, in the order of the model."""


@dataclass(frozen=True, kw_only=True)
class _Slice:
    nodes: list[int]
    """Positions of the nodes to copy, ascending."""
    initializers: list[str]
    queries: list[int]
    """Positions of the ``Shape`` and ``Size`` nodes whose results are computed from the tensors that cross."""


class Cutter:
    """Cuts one graph at any number of places."""

    def __init__(self, proto: onnx.ModelProto, model: ir.Model) -> None:
        """Index a graph.

        Args:
            proto: The whole model, normalised, as in the bundle; it is not changed.
            model: The same model, deserialised.
        """
        self._proto = proto
        self._model = model
        self._index: GraphIndex = index_graph(model)
        graph = proto.graph
        self._infos = {info.name: info for info in [*graph.value_info, *graph.input, *graph.output]}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._values = {
            value.name: value for value in [*self._model.graph.inputs, *self._index.position] if value.name is not None
        }
        self._outputs = [output.name for output in graph.output]
        self._functions = {(function.domain, function.name): function for function in proto.functions}

    def cut(self, cut: Cut) -> SplitPair:
        """Make the pair of ``cut``, which :func:`find_cuts` found in the same graph.

        Raises:
            CutError: The cut is refused, or is not of this graph.
        """
        if cut.refused:
            raise CutError(f"cut {cut.name!r} cannot be made: {cut.reason.removeprefix('refused: ')}.")
        crossing = [tensor.name for tensor in cut.tensors]
        missing = [name for name in crossing if name not in self._values]
        if missing:
            raise CutError(
                f"cut {cut.name!r} is of another graph: there is no {missing[0]!r} here. List the cuts again."
            )
        sent = [tensor.name for tensor in cut.tensors if not tensor.passthrough]
        head_outputs = sent + [name for name in cut.early_outputs if name not in sent]
        tail_outputs = [name for name in self._outputs if name not in cut.early_outputs]
        head = self._slice(head_outputs, crossing=(), after=-1)
        tail = self._slice(tail_outputs, crossing=crossing, after=cut.position)
        read = {value.name for position in head.nodes for value in self._index.reads[position]}
        head_inputs = [info.name for info in self._proto.graph.input if info.name in read]
        return SplitPair(
            head=self._assemble(cut, "head", head, head_inputs, head_outputs),
            tail=self._assemble(cut, "tail", tail, crossing, tail_outputs),
        )

    def _slice(self, outputs: Sequence[str], *, crossing: Sequence[str], after: int) -> _Slice:
        """Walk back from ``outputs`` to the values that cross, and no further.

        Args:
            outputs: Names of the values to compute.
            crossing: Names of the values that cross; none for a head.
            after: Data nodes up to this position must not be needed.
        """
        index = self._index
        given = {self._values[name] for name in crossing}
        is_tail = bool(crossing)
        nodes: set[int] = set()
        queries: set[int] = set()
        initializers: dict[str, None] = {}
        pending = [self._values[name] for name in outputs if name in self._values]
        initializers.update((name, None) for name in outputs if name in self._initializers)
        while pending:
            value = pending.pop()
            if value in given:
                continue
            position = index.position.get(value)
            if position is None:
                if value.is_initializer() and value.name is not None:
                    initializers[value.name] = None
                continue
            if position in nodes or position in queries:
                continue
            node = index.nodes[position]
            if is_tail and is_shape_query(node) and value not in index.is_data:
                source = node.inputs[0]
                assert source is not None
                here = source in given or index.position.get(source, -1) > after or source not in index.is_data
                if not here:
                    queries.add(position)
                    continue
            assert value not in index.is_data or position > after, f"{value.name} goes round the cut"
            nodes.add(position)
            pending.extend(index.reads[position])
        return _Slice(nodes=sorted(nodes), initializers=list(initializers), queries=sorted(queries))

    # ---- writing -------------------------------------------------------------------------------------------

    def _assemble(
        self, cut: Cut, side: str, part: _Slice, inputs: Sequence[str], outputs: Sequence[str]
    ) -> onnx.ModelProto:
        import onnx

        whole = self._proto
        model = onnx.ModelProto()
        for name in ("ir_version", "producer_name", "producer_version", "domain", "model_version", "doc_string"):
            if whole.HasField(name):
                setattr(model, name, getattr(whole, name))
        model.opset_import.extend(whole.opset_import)
        for entry in whole.metadata_props:
            if not entry.key.startswith("dsc_split."):
                model.metadata_props.add(key=entry.key, value=entry.value)
        model.metadata_props.add(key="dsc_split.cut", value=cut.name)
        model.metadata_props.add(key="dsc_split.part", value=side)
        graph = model.graph
        graph.name = f"{whole.graph.name}.{side}"
        graph.doc_string = whole.graph.doc_string
        graph.input.extend(self._infos[name] for name in inputs)
        graph.output.extend(self._infos[name] for name in outputs)
        graph.initializer.extend(self._initializers[name] for name in part.initializers if name in self._initializers)
        if part.queries:
            self._answer_queries(graph, part.queries, cut)
        graph.node.extend(whole.graph.node[position] for position in part.nodes)
        borders = {*inputs, *outputs}
        made = [name for position in part.nodes for name in whole.graph.node[position].output if name]
        graph.value_info.extend(self._infos[name] for name in made if name in self._infos and name not in borders)
        here = {*borders, *made, *part.initializers}
        graph.quantization_annotation.extend(
            item for item in whole.graph.quantization_annotation if item.tensor_name in here
        )
        model.functions.extend(self._used_functions(self._index.nodes[position] for position in part.nodes))
        return model

    def _used_functions(self, nodes: Iterable[ir.Node]) -> list[onnx.FunctionProto]:
        used: dict[tuple[str, str], None] = {}
        pending = list(nodes)
        while pending:
            node = pending.pop()
            for inner in [node, *(each for body in bodies(node) for each in walk(body))]:
                key = (inner.domain, inner.op_type)
                if key in self._functions and key not in used:
                    used[key] = None
                    pending.extend(
                        each
                        for (domain, name, _), function in self._model.functions.items()
                        if (domain, name) == key
                        for each in walk(function)
                    )
        return [function for key, function in self._functions.items() if key in used]

    def _answer_queries(self, graph: onnx.GraphProto, queries: Sequence[int], cut: Cut) -> None:
        """Add nodes that compute the result of each ``Shape`` or ``Size`` node, under the same name."""
        from onnx import helper

        lines_of = {position: shape_lines(self._index.nodes[position]) for position in queries}
        batch = ""
        if any(line.scale for lines in lines_of.values() for line in lines or ()):
            batch = self._batch_from_shape(graph, cut)
        for position, lines in lines_of.items():
            node = self._index.nodes[position]
            assert lines is not None
            name = node.outputs[0].name or ""
            scalar = node.op_type == "Size"
            if not any(line.scale for line in lines):
                _constant(graph, name, [line.offset for line in lines], scalar=scalar)
                continue
            scales = _constant(graph, f"{_PREFIX}{name}/scale", [line.scale for line in lines])
            offsets = _constant(graph, f"{_PREFIX}{name}/offset", [line.offset for line in lines])
            product, total = f"{_PREFIX}{name}/product", f"{_PREFIX}{name}/sum" if scalar else name
            graph.node.append(helper.make_node("Mul", [batch, scales], [product], name=product))
            graph.node.append(helper.make_node("Add", [product, offsets], [total], name=f"{_PREFIX}{name}/sum"))
            if scalar:
                shape = _constant(graph, f"{_PREFIX}{name}/shape", [])
                graph.node.append(helper.make_node("Reshape", [total, shape], [name], name=f"{_PREFIX}{name}"))

    def _batch_from_shape(self, graph: onnx.GraphProto, cut: Cut) -> str:
        """Add nodes that compute the batch size, a vector of one element, from the shape of a tensor that crosses."""
        from onnx import helper

        tensor, axis, line = self._batch_carrier(cut)
        steps: list[tuple[str, list[str], str]] = [("Shape", [tensor], "shape")]
        at = _constant(graph, f"{_PREFIX}axis", [axis])
        steps.append(("Gather", [f"{_PREFIX}shape", at], "dim"))
        result = "dim"
        if line.offset:
            offset = _constant(graph, f"{_PREFIX}offset", [line.offset])
            steps.append(("Sub", [f"{_PREFIX}{result}", offset], "part"))
            result = "part"
        if line.scale != 1:
            scale = _constant(graph, f"{_PREFIX}scale", [line.scale])
            steps.append(("Div", [f"{_PREFIX}{result}", scale], "batch"))
            result = "batch"
        for op_type, inputs, output in steps:
            graph.node.append(helper.make_node(op_type, inputs, [f"{_PREFIX}{output}"], name=f"{_PREFIX}{output}"))
        return f"{_PREFIX}{result}"

    def _batch_carrier(self, cut: Cut) -> tuple[str, int, Line]:
        for tensor in cut.tensors:
            for axis, line in enumerate(known_shape(self._values[tensor.name]) or ()):
                if line.scale:
                    return tensor.name, axis, line
        raise CutError(f"cut {cut.name!r} cannot be made: its tail needs the batch size, which no tensor shows.")


def _constant(graph: onnx.GraphProto, name: str, numbers: Sequence[int], *, scalar: bool = False) -> str:
    from onnx import TensorProto, helper

    dims: list[int] = [] if scalar else [len(numbers)]
    graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, dims, list(numbers)))
    return name
