"""Reduce the exporter's metadata to one module path per node."""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsc_split.partitioner.graph._index import MODULE_CLASSES_KEY, MODULE_KEY, scopes
from dsc_split.partitioner.graph._normalize import clear_metadata

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch.export import ExportedProgram

__all__ = ["rename_symbol", "set_module_metadata"]

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_NO_STACK = "_empty_nn_module_stack_from_metadata_hook"


def set_module_metadata(model: ir.Model, program: ExportedProgram) -> None:
    """Replace the exporter's metadata by module paths: its stack traces have local paths, and are most of the file.

    A module that is called several times has one path per call: ``act``, ``act@1``, ``act@2``. The paths of calls
    inside it begin with its path.
    """
    paths, classes = _call_paths(program)
    graphs = scopes(model)
    nodes = [node for graph in graphs for node in graph.all_nodes()]
    known = {id(node): path for node in nodes if (path := _path_of(node, paths)) is not None}
    for node in nodes:
        path = known.get(id(node))
        if path is None:
            path = known[id(node)] = _path_from_neighbours(node, known)
    for node in nodes:
        node.metadata_props.clear()
        node.metadata_props[MODULE_KEY] = known[id(node)]
        node.doc_string = None
        for value in node.outputs:
            clear_metadata(value)
    for graph in graphs:
        for inner in (graph, *graph.subgraphs()):
            inner.metadata_props.clear()
            inner.doc_string = None
            for value in inner.inputs:
                clear_metadata(value)
    for value in model.graph.initializers.values():
        clear_metadata(value)
    model.metadata_props.clear()
    model.doc_string = None
    model.metadata_props[MODULE_CLASSES_KEY] = json.dumps(classes, sort_keys=True)


def _call_paths(program: ExportedProgram) -> tuple[dict[str, str], dict[str, str]]:
    """Return the path of the module call for every node of the exported program, and the class of each path."""
    paths: dict[str, str] = {}
    classes: dict[str, str] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op != "placeholder" and stack:
            paths[node.name] = _call_path(stack, classes)
    return paths, classes


def _call_path(stack: Mapping[str, tuple[str, type | str]], classes: dict[str, str]) -> str:
    """Join the calls on a module stack to a path; only the keys say which call it is, as ``...@1``."""
    path = above = ""
    for key, (module, kind) in stack.items():
        if module == _NO_STACK:
            return ""
        if module != above:
            below = module.removeprefix(above + ".") if above else module
            call = re.search(r"@\d+$", key)
            path = ".".join(filter(None, (path, below))) + (call.group() if call else "")
            above = module
        classes.setdefault(path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
    return path


def _path_of(node: ir.Node, paths: Mapping[str, str]) -> str | None:
    """Find the path of a node by the name of the node in the exported program that it was made from."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "[]"))
    if len(scopes) < 2:
        return None
    plain = "" if scopes[-2] == _NO_STACK else str(scopes[-2])
    # A node in a body of control flow may have the same name as a node of the main graph.
    path = paths.get(scopes[-1], plain)
    return path if re.sub(r"@\d+", "", path).endswith(plain) else plain


def _path_from_neighbours(node: ir.Node, known: Mapping[int, str]) -> str:
    """Return the path for a node that the optimiser made: the innermost module with all nodes next to it."""
    tied: list[ir.Node | None] = [value.producer() for value in node.inputs if value is not None]
    tied += [use.node for value in node.outputs for use in value.uses()]
    return _common_path([known[id(other)] for other in tied if other is not None and id(other) in known])


def _common_path(paths: Iterable[str]) -> str:
    """Return the longest path that all of ``paths`` begin with."""
    split = [path.split(".") for path in paths]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join(parts[0] for parts in shared)


def rename_symbol(model: ir.Model, old: str, new: str) -> None:
    """Rename a symbolic dimension everywhere, also inside expressions."""
    import onnx_ir as ir

    if old == new:
        return
    pattern = re.compile(rf"(?<!\w){re.escape(old)}(?!\w)")
    for value in _all_values(model):
        if value.shape is not None and any(isinstance(dim, ir.SymbolicDim) for dim in value.shape):
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else dim.value and pattern.sub(new, dim.value) for dim in value.shape]
            )


def _all_values(model: ir.Model) -> Iterable[ir.Value]:
    for graph in scopes(model):
        for inner in (graph, *graph.subgraphs()):
            yield from inner.inputs
        for node in graph.all_nodes():
            yield from node.outputs
