"""Find the places where a graph can be cut, and judge them.

Paper: "Dynamic Split Computing for Efficient Deep Edge Intelligence", Eq. 3 (compressive bottlenecks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from dsc_split.bundle import TensorInfo
from dsc_split.errors import UsageError
from dsc_split.partitioner.graph._index import GraphIndex, index_graph
from dsc_split.partitioner.graph._names import ModuleEnds, matches_pattern, unique_name
from dsc_split.partitioner.graph._shapes import tensor_info

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["Cut", "CutList", "CutTensor", "Ratio", "find_cuts"]

Ratio = Literal["bytes", "elements"]


@dataclass(frozen=True, kw_only=True)
class CutTensor:
    """A tensor that crosses a cut."""

    info: TensorInfo | None
    """Type and size; ``None`` if they are not known; the cut is then refused."""
    name: str
    """ONNX value name."""
    op_type: str
    """Op that makes it; empty for a graph input."""
    passthrough: bool
    """Whether it is a graph input that the tail reads: it is sent as it is."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A place in the graph after which the tail can start: the set of tensors that cross it."""

    name: str
    """Safe as a file name, at most 100 characters, unique in its list even if case is ignored."""
    modules: tuple[str, ...]
    """Every module that ends here, the outermost first."""
    position: int
    """Position in graph order of the last node before the cut."""
    tensors: tuple[CutTensor, ...]
    """The tensors that cross, in graph order."""
    early_outputs: tuple[str, ...]
    """Graph outputs that are computed before the cut; they stay on the device."""
    elements: int
    """Elements that cross, per sample; 0 if not known."""
    size_bytes: int
    """Bytes that cross, per sample, before any encoding; 0 if not known."""
    ratio: float
    """Size divided by that of the input, in bytes or in elements."""
    natural: bool = False
    """``ratio`` is below 1."""
    compressive: bool = False
    """Natural, and strictly smaller than every earlier cut of the list (Eq. 3)."""
    frontier: bool = False
    """Strictly smaller than every earlier cut of the list, also if ``ratio`` is 1 or more."""
    refused: bool = False
    """No pair can be made here."""
    reason: str = ""
    """Why it is not compressive, or why it is refused."""

    def to_json(self) -> dict[str, object]:
        """Return the form of ``dsc-split cuts --json``."""
        return {
            "name": self.name,
            "modules": list(self.modules),
            "position": self.position,
            "elements": self.elements,
            "size_bytes": self.size_bytes,
            "ratio": self.ratio,
            "natural": self.natural,
            "compressive": self.compressive,
            "frontier": self.frontier,
            "refused": self.refused,
            "reason": self.reason,
            "early_outputs": list(self.early_outputs),
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.info.shape) if tensor.info else None,
                    "dtype": tensor.info.dtype if tensor.info else None,
                    "op_type": tensor.op_type,
                    "size_bytes": tensor.info.size_bytes(1) if tensor.info else None,
                    "passthrough": tensor.passthrough,
                }
                for tensor in self.tensors
            ],
        }


@dataclass(frozen=True, kw_only=True)
class CutList:
    """The cuts of a model, in graph order, and the size of its input."""

    model: str
    """The model's name."""
    input_bytes: int
    """Bytes of full offload, per sample."""
    input_elements: int
    """Elements of the inputs, per sample."""
    cuts: tuple[Cut, ...]

    def to_json(self) -> dict[str, object]:
        """Return the form of ``dsc-split cuts --json``."""
        return {
            "model": self.model,
            "input_bytes": self.input_bytes,
            "input_elements": self.input_elements,
            "cuts": [cut.to_json() for cut in self.cuts],
        }


def find_cuts(
    model: ir.Model,
    *,
    modules: str | None = None,
    ratio: Ratio = "bytes",
    max_tensors: int = 1,
    input_bytes: int | None = None,
    fixed_batch: int | None = None,
) -> CutList:
    """List the places where ``model`` can be cut, in graph order, in time linear in its nodes.

    Inputs and outputs are no cuts. Nor are places with nothing but casts before them, or nothing but casts after them.

    Args:
        model: Normalised (:func:`dsc_split.partitioner.load_model`, or a bundle's graph).
        modules: Keep only the cuts at the output of a module whose path matches (``*`` stands for any characters but
            a dot), and compare only these; a cut between a layer and its activation is then left out.
        ratio: Compare bytes, or elements as the paper does.
        max_tensors: Tensors that may cross a cut at once.
        input_bytes: Bytes that full offload sends per sample; by default the inputs' own size.
        fixed_batch: The only batch size of the model, if it has one; sizes per sample are computed at it.

    Raises:
        UsageError: ``max_tensors`` is below 1, or the size of an input is not known.
    """
    if max_tensors < 1:
        raise UsageError(f"--max-tensors is {max_tensors}; at least one tensor crosses a cut.")
    index = index_graph(model)
    scale = Scale.of(model, input_bytes, fixed_batch)
    ends = ModuleEnds(index, model)
    computing = [at for at in index.data_nodes if not _is_cast(index.nodes[at])]
    taken: set[str] = set()
    cuts = []
    for position, live, early in _borders(index, model, max_tensors):
        module_paths = ends.ending_at(position, live)
        # Every place gets its name before the filter, so that names do not depend on the pattern.
        name = unique_name(ends.suggest(position, live, module_paths), taken)
        if not (computing and computing[0] <= position < computing[-1]):
            continue
        if modules is not None and not (
            any(matches_pattern(path, modules) for path in module_paths) and not ends.feeds_activation(live)
        ):
            continue
        cuts.append(_describe(index, position, live, early, name, module_paths, scale))
    input_size = scale.input_bytes if ratio == "bytes" else scale.input_elements
    return CutList(
        model=model.graph.name or "model",
        input_bytes=scale.input_bytes,
        input_elements=scale.input_elements,
        cuts=tuple(_judge(cuts, ratio, input_size)),
    )


def _is_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and node.domain in ("", "ai.onnx")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The size that cuts are compared with: the input of one sample."""

    input_bytes: int
    input_elements: int
    batch: int
    """Batch size at which sizes are taken."""

    @classmethod
    def of(cls, model: ir.Model, input_bytes: int | None, fixed_batch: int | None) -> Scale:
        batch = fixed_batch or 1
        infos = [tensor_info(value) for value in model.graph.inputs]
        unknown = [value.name for value, info in zip(model.graph.inputs, infos, strict=True) if info is None]
        if unknown:
            raise UsageError(
                f"the size of input {unknown[0]!r} is not known. Give it: --input-shape {unknown[0]}=3,224,224"
            )
        known = [info for info in infos if info is not None]
        own_bytes = sum(info.size_bytes(batch) for info in known)
        return cls(
            input_bytes=_per_sample(own_bytes, batch) if input_bytes is None else input_bytes,
            input_elements=_per_sample(sum(info.elements(batch) for info in known), batch),
            batch=batch,
        )


def _per_sample(total: int, batch: int) -> int:
    return -(-total // batch)


def live_sets(index: GraphIndex, model: ir.Model) -> Iterator[tuple[int, dict[ir.Value, None]]]:
    """Yield ``(position, live)`` after each data node; ``live`` are the values made before and read after, in order.

    The dictionary is the same object each time, and changes.
    """
    unread = {value: len(positions) for value, positions in index.readers.items()}
    live = {value: None for value in model.graph.inputs if unread.get(value)}
    for position in index.data_nodes:
        for value in index.reads[position]:
            if value in index.is_data:
                unread[value] -= 1
                if not unread[value]:
                    live.pop(value, None)
        for value in index.nodes[position].outputs:
            if unread.get(value):
                live[value] = None
        yield position, live


def _borders(
    index: GraphIndex, model: ir.Model, max_tensors: int
) -> Iterator[tuple[int, tuple[ir.Value, ...], tuple[str, ...]]]:
    """Yield ``(position, crossing values, early outputs)`` of each live set that is small enough, once."""
    outputs = [(index.position.get(value, -1), value) for value in model.graph.outputs if value in index.is_data]
    previous: tuple[ir.Value, ...] = ()
    for position, live in live_sets(index, model):
        if not 0 < len(live) <= max_tensors:
            previous = ()
            continue
        crossing = tuple(live)
        if crossing == previous or all(value.producer() is None for value in crossing):
            continue
        previous = crossing
        yield position, crossing, tuple(value.name or "" for made, value in outputs if made <= position)


def _describe(
    index: GraphIndex,
    position: int,
    live: Sequence[ir.Value],
    early: tuple[str, ...],
    name: str,
    module_paths: tuple[str, ...],
    scale: Scale,
) -> Cut:
    tensors = []
    for value in live:
        producer = value.producer()
        tensors.append(
            CutTensor(
                info=tensor_info(value),
                name=value.name or "",
                op_type=producer.op_type if producer is not None else "",
                passthrough=producer is None,
            )
        )
    reason = _refusal(index, position, live, tensors)
    known = [tensor.info for tensor in tensors if tensor.info is not None]
    complete = len(known) == len(tensors)
    return Cut(
        name=name,
        modules=module_paths,
        position=position,
        tensors=tuple(tensors),
        early_outputs=early,
        elements=_per_sample(sum(info.elements(scale.batch) for info in known), scale.batch) if complete else 0,
        size_bytes=_per_sample(sum(info.size_bytes(scale.batch) for info in known), scale.batch) if complete else 0,
        ratio=0.0,
        refused=bool(reason),
        reason=reason,
    )


_SENDABLE = frozenset(
    "float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64 complex128".split()
)


def _refusal(index: GraphIndex, position: int, live: Sequence[ir.Value], tensors: Sequence[CutTensor]) -> str:
    """Return why no pair can be made at a place; empty if one can."""
    if index.random_node is not None:
        node = index.random_node
        return f"refused: {node.op_type} node {node.name!r} answers differently each time, so no proof can hold"
    for value, tensor in zip(live, tensors, strict=True):
        kind = type(value.type).__name__.removesuffix("Type").lower()
        if value.type is not None and kind != "tensor":
            return f"refused: {tensor.name!r} is a {kind}, not a tensor"
        if tensor.info is None:
            return f"refused: the size of {tensor.name!r} depends on the data, or is no straight line in the batch"
        if tensor.info.dtype not in _SENDABLE:
            return f"refused: {tensor.name!r} has type {tensor.info.dtype}, which cannot be sent as it is"
    if index.needs_batch and not any(tensor.info and tensor.info.elements_by_batch[0] for tensor in tensors):
        reader = _reader_of_batch(index, position)
        if reader is not None:
            return (
                f"refused: tail node {reader.name!r} needs the batch size, and what crosses here "
                f"({', '.join(repr(tensor.name) for tensor in tensors)}) has the same shape at every batch"
            )
    return ""


def _reader_of_batch(index: GraphIndex, position: int) -> ir.Node | None:
    """Find a node of data or of an output in the tail that needs the batch size from before ``position``."""
    tainted = {
        value
        for at in index.needs_batch
        if index.position.get(index.reads[at][0], -1) <= position
        for value in index.nodes[at].outputs
    }
    for at, node in enumerate(index.nodes):
        if any(value in tainted for value in index.reads[at]):
            if node.outputs[0] not in index.is_data:
                tainted.update(node.outputs)
            elif at > position:
                return node
        if any(value in tainted and value.is_graph_output() for value in node.outputs):
            return node
    return None


def _judge(cuts: Sequence[Cut], ratio: Ratio, input_size: int) -> Iterator[Cut]:
    """Mark the natural, compressive and frontier cuts; of two equal cuts, only the earlier one is on the frontier."""
    smallest: tuple[int, str] | None = None
    for cut in cuts:
        if cut.refused:
            yield cut
            continue
        size = cut.size_bytes if ratio == "bytes" else cut.elements
        natural = size < input_size
        frontier = smallest is None or size < smallest[0]
        share = size / input_size if input_size else float(size > 0)
        if not natural:
            reason = f"not smaller than the input, {input_size:,} {ratio}"
        elif not frontier and smallest is not None:
            reason = f"not smaller than {smallest[1]!r}, {smallest[0]:,} {ratio}"
        else:
            reason = ""
        if frontier:
            smallest = (size, cut.name)
        compressive = natural and frontier
        yield replace(cut, ratio=share, natural=natural, frontier=frontier, compressive=compressive, reason=reason)
