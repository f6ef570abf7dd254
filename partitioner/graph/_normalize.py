"""Bring a graph of any origin into the one form that all later steps expect.

Afterwards:

- The only symbol in a shape is the batch; every dimension is a straight line in it, or the shape is absent.
- No initialiser is an input, and large constants are initialisers.
- Nodes are in execution order, and each is used; every value has a name; no output is an input.
- The only metadata left is that of the modules.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from dsc_split.errors import ModelFileError
from dsc_split.partitioner.graph._index import MODULE_CLASSES_KEY, MODULE_KEY
from dsc_split.partitioner.graph._infer_shapes import RunGraph, complete_shapes
from dsc_split.partitioner.graph._shapes import BATCH, line_of, line_text

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["normalize", "settle_shapes"]

logger = logging.getLogger(__name__)


def normalize(model: ir.Model, *, fixed_batch: int | None, run: RunGraph) -> None:
    """Normalise ``model`` in place.

    Args:
        model: Its inputs have complete shapes, and :data:`BATCH` is the only symbol in them.
        fixed_batch: The only batch size, if there is no symbol.
        run: Runs the graph, for shapes that inference does not find.

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
    """Drop metadata that nothing reads, such as stack traces with paths of the exporting machine."""
    import onnx_ir as ir

    def keep(props: MutableMapping[str, str], *keys: str) -> None:
        kept = {key: props[key] for key in keys if key in props}
        props.clear()
        props.update(kept)

    for graph in model.graphs():
        graph.doc_string = None
        keep(graph.metadata_props)
        for value in [*graph.inputs, *graph.initializers.values()]:
            clear_metadata(value)
        for node in graph:
            keep(node.metadata_props, MODULE_KEY)
            node.doc_string = None
            for value in node.outputs:
                clear_metadata(value)
    for function in model.functions.values():
        function.doc_string = None
        keep(function.metadata_props)
        for node in ir.traversal.RecursiveGraphIterator(function):
            keep(node.metadata_props, MODULE_KEY)
            node.doc_string = None
    leaking = [key for key in model.metadata_props if key.startswith("pkg.") and key != MODULE_CLASSES_KEY]
    for key in leaking:
        del model.metadata_props[key]


def clear_metadata(value: ir.Value) -> None:
    """Drop the metadata and the description of a value."""
    value.doc_string = None
    value.metadata_props.clear()


def settle_shapes(model: ir.Model, *, symbols: tuple[str, ...], sizes: Mapping[str, int]) -> None:
    """Write every dimension as a number or as a straight line in the batch; drop a shape with any other dimension.

    Args:
        model: Changed in place.
        symbols: The symbols in its shapes that mean the batch.
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
