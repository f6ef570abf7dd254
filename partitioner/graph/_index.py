"""Index a graph for the cut search: which values carry data, which nodes read them, and which module made them.

A value is **data** when it depends on the contents of the inputs. A value that depends only on constants and on the
shapes of the inputs is **free**: both sides compute it, so it never crosses a cut. Only ``Shape`` and ``Size`` make a
free value from data, and only where every dimension of the data is a straight line in the batch, as in ``2*batch``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsc_split.partitioner.graph._shapes import Line, count_elements, known_shape

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["MODULE_CLASSES_KEY", "MODULE_KEY", "GraphIndex", "index_graph", "scopes", "shape_lines"]

MODULE_KEY = "dsc_split.module"
"""Node metadata: dotted path of the innermost module call that the node comes from; empty for the root."""

MODULE_CLASSES_KEY = "dsc_split.module_classes"
"""Model metadata: JSON object from module path to class name."""

_RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


@dataclass(kw_only=True)
class GraphIndex:
    """A graph in execution order, with each value's readers and kind."""

    nodes: list[ir.Node]
    """The main graph's nodes, sorted topologically."""
    reads: list[tuple[ir.Value, ...]]
    """For each node, the values it reads: its inputs, and those that its If / Loop / Scan bodies capture."""
    is_data: set[ir.Value]
    """Values that depend on the contents of the inputs."""
    data_nodes: list[int]
    """Positions of the nodes that make data, ascending."""
    readers: dict[ir.Value, list[int]]
    """Positions of the data nodes that read a data value."""
    position: dict[ir.Value, int]
    """Position of the node that makes each value; inputs are not listed."""
    random_node: ir.Node | None
    """A node whose result differs from run to run; ``None`` if there is none."""
    needs_batch: list[int]
    """Positions of the free nodes that read the batch size from the shape of a data value."""
    modules: list[str] = field(default_factory=list)
    """For each node, the innermost module it comes from; empty for the root, or where the module is not known."""


def shape_lines(node: ir.Node) -> tuple[Line, ...] | None:
    """Return the result of a ``Shape`` or ``Size`` node as straight lines in the batch; ``None`` if it is not known."""
    value = node.inputs[0]
    shape = known_shape(value) if value is not None else None
    if shape is None:
        return None
    if node.op_type == "Size":
        elements = count_elements(shape)
        return None if elements is None else (elements,)
    rank = len(shape)
    bounds = [node.attributes.get("start"), node.attributes.get("end")]
    start = 0 if bounds[0] is None else bounds[0].as_int()
    end = rank if bounds[1] is None else bounds[1].as_int()
    start, end = (min(max(bound + rank if bound < 0 else bound, 0), rank) for bound in (start, end))
    return shape[start:end]


def is_shape_query(node: ir.Node) -> bool:
    """Return whether a node reads only the shape of its input."""
    return node.op_type in ("Shape", "Size") and node.domain in ("", "ai.onnx")


def index_graph(model: ir.Model) -> GraphIndex:
    """Index the main graph of ``model`` in one pass over its nodes.

    Args:
        model: Normalised: sorted topologically, no dead nodes, shapes known as far as they can be.
    """
    random_functions = _random_functions(model)
    index = GraphIndex(
        nodes=list(model.graph),
        reads=[],
        is_data=set(model.graph.inputs),
        data_nodes=[],
        readers={},
        position={},
        random_node=None,
        needs_batch=[],
    )
    for position, node in enumerate(index.nodes):
        reads = reads_of(node, model.graph)
        index.reads.append(reads)
        index.modules.append(node.metadata_props.get(MODULE_KEY, ""))
        random = _is_random(node, random_functions)
        if random:
            index.random_node = index.random_node or node
        data = random or any(value in index.is_data for value in reads)
        if data and is_shape_query(node):
            lines = shape_lines(node)
            if lines is not None:
                data = False
                if any(line.scale for line in lines):
                    index.needs_batch.append(position)
        for value in node.outputs:
            index.position[value] = position
        if data:
            index.data_nodes.append(position)
            index.is_data.update(node.outputs)
            for value in reads:
                if value in index.is_data:
                    index.readers.setdefault(value, []).append(position)
    return index


def reads_of(node: ir.Node, graph: ir.Graph) -> tuple[ir.Value, ...]:
    """List the values that ``node`` of ``graph`` reads, each once: its inputs, and those that its bodies capture."""
    return tuple(dict.fromkeys([value for value in node.inputs if value is not None] + _captured(node, graph)))


def _captured(node: ir.Node, graph: ir.Graph) -> list[ir.Value]:
    """List the values of ``graph`` that the bodies of ``node`` read, in reading order."""
    captured: dict[ir.Value, None] = {}
    for body in bodies(node):
        for inner in walk(body):
            for value in inner.inputs:
                if value is not None and value.graph is graph:
                    captured[value] = None
        for each in _graphs_in(body):
            captured.update((value, None) for value in each.outputs if value.graph is graph)
    return list(captured)


def bodies(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs that are attributes of ``node``."""
    if not node.attributes:
        return
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type.name == "GRAPH":
            yield attribute.as_graph()
        elif attribute.type.name == "GRAPHS":
            yield from attribute.as_graphs()


def walk(graph: ir.Graph | ir.Function) -> Iterator[ir.Node]:
    """Yield the nodes of ``graph`` and of every body in it."""
    for node in graph:
        yield node
        for body in bodies(node):
            yield from walk(body)


def _graphs_in(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    for node in graph:
        for body in bodies(node):
            yield from _graphs_in(body)


def scopes(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """List the main graph and the functions of ``model``."""
    return [model.graph, *model.functions.values()]


def _random_functions(model: ir.Model) -> set[tuple[str, str, str]]:
    """Find the functions of the model that call a random op, directly or through other functions."""
    functions = model.functions

    @functools.cache
    def random(key: tuple[str, str, str]) -> bool:
        return any(
            _is_random_op(node) or (node.op_identifier() in functions and random(node.op_identifier()))
            for node in walk(functions[key])
        )

    return {key for key in functions if random(key)}


def _is_random_op(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type in _RANDOM_OPS:
        return True
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = node.inputs[2].const_value
        return training is None or bool(training.numpy())
    return False


def _is_random(node: ir.Node, random_functions: set[tuple[str, str, str]]) -> bool:
    def random(each: ir.Node) -> bool:
        return _is_random_op(each) or (bool(random_functions) and each.op_identifier() in random_functions)

    return random(node) or any(random(inner) for body in bodies(node) for inner in walk(body))
