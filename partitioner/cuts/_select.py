"""Choose which of the cuts to make, as ``--cuts`` says."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from dsc_split.errors import CutError, UsageError
from dsc_split.partitioner.cuts._find import Cut, CutList, Ratio, live_sets
from dsc_split.partitioner.graph._index import index_graph

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["CutOptions", "select_cuts"]

_SETS = ("compressive", "natural", "frontier", "all")


@dataclass(frozen=True, kw_only=True)
class CutOptions:
    """Which cuts to look for, and which of them to make."""

    cuts: str | None = None
    """``compressive``, ``natural``, ``frontier``, ``all``, or names of cuts, modules or tensors, separated by commas.
    ``None``: ``compressive``, or ``frontier`` if full offload is excluded or its size is stated (if that is a JPEG
    smaller than every cut, no cut is compressive)."""
    modules: str | None = None
    """Only cuts at the output of a module whose path matches; ``*`` stands for any characters but a dot."""
    ratio: Ratio = "bytes"
    """The unit in which sizes are compared."""
    max_tensors: int = 1
    """Tensors that may cross at once."""
    prove: bool = True
    """Whether every pair is run against the whole model."""

    @classmethod
    def checked(
        cls,
        *,
        cuts: str | None = None,
        modules: str | None = None,
        ratio: str = "bytes",
        max_tensors: int = 1,
        prove: bool = True,
    ) -> CutOptions:
        """Make options from the words of a user.

        Raises:
            UsageError: ``ratio`` is neither ``bytes`` nor ``elements``, or ``max_tensors`` is below 1.
        """
        if ratio not in ("bytes", "elements"):
            raise UsageError(f"--ratio is {ratio!r}; 'bytes' or 'elements' is expected.")
        if max_tensors < 1:
            raise UsageError(f"--max-tensors is {max_tensors}; at least one tensor crosses a cut.")
        unit = cast("Ratio", ratio)
        return cls(cuts=cuts, modules=modules, ratio=unit, max_tensors=max_tensors, prove=prove)


def select_cuts(found: CutList, model: ir.Model, wanted: str, *, modules: str | None = None) -> list[Cut]:
    """Pick cuts from a list.

    Args:
        found: From :func:`find_cuts`.
        model: The graph of these cuts; messages name its nodes.
        wanted: A set's name, or names separated by commas.
        modules: The pattern that :func:`find_cuts` was called with, if any.

    Raises:
        CutError: A name is unknown, does not separate the graph, or is that of a refused cut; or no cut matches
            ``modules``.
    """
    if modules is not None and not found.cuts:
        raise CutError(
            f"no cut is the output of a module that matches --modules {modules!r}. "
            "List what there is: dsc-split cuts BUNDLE"
        )
    if wanted in _SETS:
        return [cut for cut in found.cuts if not cut.refused and (wanted == "all" or getattr(cut, wanted))]
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    if not names:
        raise CutError(f"--cuts {wanted!r} names nothing. Give {', '.join(_SETS)}, or names separated by commas.")
    chosen = {}
    for name in names:
        cut = _find_by_name(found, name)
        if cut is None:
            raise CutError(_why_not(found, model, name))
        if cut.refused:
            raise CutError(f"cut {name!r} cannot be made: {cut.reason.removeprefix('refused: ')}.")
        chosen[cut.name] = cut
    return sorted(chosen.values(), key=lambda cut: cut.position)


def _find_by_name(found: CutList, name: str) -> Cut | None:
    """Find a cut by its own name, else by a module that ends there, else by the only tensor that crosses."""
    matches: tuple[Callable[[Cut], bool], ...] = (
        lambda cut: cut.name == name,
        lambda cut: name in cut.modules,
        lambda cut: [tensor.name for tensor in cut.tensors] == [name],
    )
    return next((cut for match in matches for cut in found.cuts if match(cut)), None)


def _why_not(found: CutList, model: ir.Model, name: str) -> str:
    """Return why there is no cut of that name: which tensor also crosses there, or which name is similar."""
    index = index_graph(model)
    inside = [
        position
        for position in index.data_nodes
        if index.modules[position] == name or index.modules[position].startswith(f"{name}.")
    ]
    made = [position for value, position in index.position.items() if value.name == name]
    place = max(made or inside, default=None)
    if any(value.name == name for value in [*model.graph.inputs, *model.graph.outputs]):
        return f"{name!r} is an input or output of the graph: that is full offload or no offload, and no cut."
    if place is None:
        known = [cut.name for cut in found.cuts]
        named = [*_SETS, *known, *(m for cut in found.cuts for m in cut.modules)]
        near = [each for each in named if each.lower() == name.lower()] or difflib.get_close_matches(name, named, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"no cut, module or tensor is called {name!r}.{hint} List them: dsc-split cuts BUNDLE"
    if place not in index.data_nodes:
        return f"{name!r} does not depend on what is in the inputs: both sides compute it, and nothing is cut there."
    for position, live in live_sets(index, model):
        if position == place:
            own = set(index.nodes[place].outputs)
            round_it = [value for value in live if value not in own] or list(live)
            other = round_it[-1]
            reader = next((index.nodes[at] for at in index.readers[other] if at > place), None)
            also = f" is also read by tail node {reader.name!r}" if reader is not None else " is read after it"
            return (
                f"cut {name!r} does not separate the graph: {other.name!r}{also}. "
                f"Admit it with --max-tensors {len(live)}, or cut later."
                if len(live) > 1 or other not in own
                else f"cut {name!r} is left out by --modules. List what is left: dsc-split cuts"
            )
    return f"nothing is read after {name!r}: that is no offload, and no cut."
