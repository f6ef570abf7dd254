"""Bring a graph from anywhere into the one form that the rest works on.

Afterwards: the only symbol in a shape is the batch, shapes are straight lines in it or absent, initialisers are no
inputs, large constants are initialisers, nodes are in execution order with none dead, every value has a name, no
output is an input, and no metadata is left but the modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsc_split.errors import ModelFileError
from dsc_split.partitioner.graph._index import MODULE_CLASSES_KEY, MODULE_KEY
from dsc_split.partitioner.graph._infer_shapes import complete_shapes
from dsc_split.partitioner.graph._shapes import BATCH, line_of, line_text

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["RunGraph", "normalize", "settle_shapes"]

logger = logging.getLogger(__name__)

RunGraph = Callable[[bytes, int, int, Sequence[str]], Mapping[str, Any]]
"""Runs a serialised graph: ``(graph, batch, seed, output names)`` to values by name."""


def normalize(model: ir.Model, *, fixed_batch: int | None, run: RunGraph) -> None:
    """Normalise ``model`` in place.

    Args:
        model: Its inputs have complete shapes, with :data:`BATCH` the only symbol.
        fixed_batch: The only batch, where there is no symbol.
        run: How to run the graph, for shapes that no inference finds.

    Raises:
        ModelFileError: The graph is not one that ONNX allows.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    passes = ir.passes.Sequential(
        common.RemoveInitializersFromInputsPass(),
        common.NameFixPass(),
        common.OutputFixPass(),
        common.LiftConstantsToInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]  # not annotated upstream
        common.TopologicalSortPass(),
        common.NameFixPass(),
    )
    try:
        passes(model)
    except (ValueError, RuntimeError) as e:
        cause = e.__cause__ or e
        raise ModelFileError(f"the graph is not one that ONNX allows: {cause}") from e
    _trim_metadata(model)
    settle_shapes(model, symbols=(BATCH,), sizes={})
    batches = (1, 2, 3) if fixed_batch is None else (fixed_batch,)
    unknown = complete_shapes(model, batches=batches, run=run)
    if unknown:
        logger.info("shapes that depend on the data: %s", ", ".join(unknown[:10]))


def _trim_metadata(model: ir.Model) -> None:
    """Drop what nobody reads, stack traces with the paths of the exporting machine among it."""
    import onnx_ir as ir

    def keep(props: Any, *keys: str) -> None:
        kept = {key: props[key] for key in keys if key in props}
        props.clear()
        props.update(kept)

    for graph in model.graphs():
        graph.doc_string = None
        keep(graph.metadata_props)
        for value in [*graph.inputs, *graph.initializers.values()]:
            _trim_value(value)
        for node in graph:
            keep(node.metadata_props, MODULE_KEY)
            node.doc_string = None
            for value in node.outputs:
                _trim_value(value)
    for function in model.functions.values():
        function.doc_string = None
        keep(function.metadata_props)
        for node in ir.traversal.RecursiveGraphIterator(function):
            keep(node.metadata_props, MODULE_KEY)
            node.doc_string = None
    leaking = [key for key in model.metadata_props if key.startswith("pkg.") and key != MODULE_CLASSES_KEY]
    for key in leaking:
        del model.metadata_props[key]


def _trim_value(value: ir.Value) -> None:
    value.doc_string = None
    value.metadata_props.clear()


def settle_shapes(model: ir.Model, *, symbols: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    """Write every dimension as a number or a line in the batch; forget a shape that has another one.

    Args:
        model: Changed in place.
        symbols: What its shapes call the batch.
        sizes: Values of other symbols.
    """
    import onnx_ir as ir

    fixed = tuple(sorted(sizes.items()))
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
        lines = [line_of(dim, symbols, fixed) for dim in dims]
        if any(line is None for line in lines):
            value.shape = None
        elif any(not isinstance(dim, int) for dim in dims):
            value.shape = ir.Shape([line_text(line) for line in lines if line is not None])
