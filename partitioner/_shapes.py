"""How large a value is at each batch size: its dimensions as straight lines in the batch.

A dimension is known when it is a number, or an expression in the batch symbol alone that is a straight line:
``batch``, ``64*batch``, ``batch + 1``. That covers what networks do to a batch (merge it into windows, split heads
off), and lets the tail find the batch again from the shape of what crosses the cut.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc_split._optional import require
from dsc_split.bundle import TensorInfo

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BATCH", "Line", "fit_line", "known_shape", "line_of", "line_text", "tensor_info"]

logger = logging.getLogger(__name__)

BATCH = "batch"
"""The one symbol that a normalised graph has."""

_CHECKED_BATCHES = (1, 2, 3, 5, 8, 64)


@dataclass(frozen=True)
class Line:
    """``scale * batch + offset``."""

    scale: int
    offset: int

    def at(self, batch: int) -> int:
        """Evaluate at ``batch``."""
        return self.scale * batch + self.offset


def fit_line(points: Mapping[int, int]) -> Line | None:
    """Find the straight line through ``{batch: size}``, or ``None`` where there is none.

    With one point alone the size is taken as it is.
    """
    (first, at_first), *rest = sorted(points.items())
    if not rest:
        return Line(0, at_first)
    second, at_second = rest[0]
    scale, remainder = divmod(at_second - at_first, second - first)
    line = Line(scale, at_first - scale * first)
    if remainder or any(line.at(batch) != size for batch, size in rest):
        return None
    return line


@functools.lru_cache(maxsize=4096)
def line_of(
    dim: int | str | None, symbols: tuple[str, ...] = (BATCH,), fixed: tuple[tuple[str, int], ...] = ()
) -> Line | None:
    """Read a dimension as a straight line in the batch.

    Args:
        dim: A number, an expression, or ``None`` for unknown.
        symbols: The symbols that mean the batch.
        fixed: Values of other symbols.

    Returns:
        The line, or ``None`` where the dimension is unknown, has other symbols, or is no straight line.
    """
    if isinstance(dim, int):
        return Line(0, dim) if dim >= 0 else None
    if not dim:
        return None
    if dim in symbols:
        return Line(1, 0)
    import onnx_ir as ir

    points = {}
    for batch in _CHECKED_BATCHES:
        try:
            size = ir.SymbolicDim(dim).evaluate({**dict.fromkeys(symbols, batch), **dict(fixed)})
        except (ValueError, TypeError, ZeroDivisionError):
            return None
        if not isinstance(size, int):
            return None
        points[batch] = size
    return fit_line(points)


def line_text(line: Line) -> int | str:
    """Write a line as a dimension: ``3``, ``batch``, ``64*batch``, ``batch + 1``."""
    if line.scale == 0:
        return line.offset
    text = BATCH if line.scale == 1 else f"{line.scale}*{BATCH}"
    return f"{text} + {line.offset}" if line.offset > 0 else f"{text} - {-line.offset}" if line.offset else text


def known_shape(value: ir.Value) -> tuple[Line, ...] | None:
    """Give the dimensions of a value, or ``None`` where one is not known."""
    if value.shape is None:
        return None
    lines = []
    for dim in value.shape:
        line = line_of(dim if isinstance(dim, int) else dim.value)
        if line is None:
            return None
        lines.append(line)
    return tuple(lines)


@functools.lru_cache(maxsize=4096)
def count_elements(shape: tuple[Line, ...]) -> Line | None:
    """Multiply the dimensions; ``None`` where the product is no straight line in the batch."""
    return fit_line({b: _product(line.at(b) for line in shape) for b in _CHECKED_BATCHES})


def _product(numbers: Iterable[int]) -> int:
    return functools.reduce(lambda a, b: a * b, numbers, 1)


def tensor_info(value: ir.Value) -> TensorInfo | None:
    """Describe a value that crosses a border, or ``None`` where its type or size is not known."""
    shape = known_shape(value)
    elements = count_elements(shape) if shape is not None else None
    if value.dtype is None or elements is None or shape is None:
        return None
    return TensorInfo(
        name=value.name or "",
        dtype={"FLOAT": "float32", "DOUBLE": "float64"}.get(value.dtype.name, value.dtype.name.lower()),
        shape=tuple(line_text(line) for line in shape),
        elements_by_batch=(elements.scale, elements.offset),
        itemsize=int(value.dtype.itemsize) if value.dtype.name != "STRING" else 0,
    )


# ---- finding shapes that the file does not state --------------------------------------------------------------

Feed = Callable[[int, int], Mapping[str, Any]]
"""``(batch, seed)`` to inputs by name."""


def complete_shapes(
    model: ir.Model,
    *,
    batches: Sequence[int],
    run: Callable[[bytes, int, int, Sequence[str]], Mapping[str, Any]],
) -> list[str]:
    """Fill in the shapes and types that the values of the main graph lack; changes ``model``.

    First ONNX's own inference, at each batch as a number, which settles what a symbol leaves open; then, for what is
    still unknown, by running the graph with those values as outputs.

    Args:
        model: Its inputs have known shapes in :data:`BATCH`.
        batches: Batch sizes to look at: 1, 2, 3, or the only one of a fixed batch.
        run: Runs a serialised graph: ``(graph, batch, seed, output names)`` to values by name.

    Returns:
        Names of the values that stay unknown: their size depends on the data, or is no line in the batch.
    """
    unknown = _unknown_values(model)
    if unknown:
        _infer_at_batches(model, unknown, batches)
        unknown = _unknown_values(model)
    if unknown:
        logger.info("%d shapes are not stated and not inferred; running the model to see them", len(unknown))
        _observe(model, unknown, batches, run)
        unknown = _unknown_values(model)
    return sorted(unknown)


def _unknown_values(model: ir.Model) -> dict[str, ir.Value]:
    import onnx_ir as ir

    values = [output for node in model.graph for output in node.outputs if output.name and output.uses()]
    values += [output for output in model.graph.outputs if output.producer() is not None]
    return {
        value.name: value
        for value in values
        if value.name
        and (value.type is None or isinstance(value.type, ir.TensorType))
        and (known_shape(value) is None or value.dtype is None)
    }


def _infer_at_batches(model: ir.Model, unknown: Mapping[str, ir.Value], batches: Sequence[int]) -> None:
    import onnx
    import onnx_ir as ir

    proto = ir.serde.serialize_model(model)
    borders = [(field, list(field)) for field in (proto.graph.input, proto.graph.output)]
    stated = [info for info in proto.graph.value_info if info.name not in unknown]
    seen: dict[str, dict[int, tuple[int, ...]]] = {}
    for batch in batches:
        # What is put back is copied, so each batch starts from what the file says.
        for field, infos in [*borders, (proto.graph.value_info, stated)]:
            del field[:]
            field.extend(infos)
            for info in field:
                _set_batch(info, batch)
        try:
            inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=False, data_prop=True)
        except (onnx.shape_inference.InferenceError, ValueError) as e:
            logger.info("ONNX shape inference failed: %s", e)
            return
        for info in [*inferred.graph.value_info, *inferred.graph.output]:
            value = unknown.get(info.name)
            tensor = info.type.tensor_type
            if value is None or info.type.WhichOneof("value") != "tensor_type":
                continue
            if value.dtype is None and tensor.elem_type:
                value.type = ir.TensorType(ir.DataType(tensor.elem_type))
            if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                seen.setdefault(info.name, {})[batch] = tuple(dim.dim_value for dim in tensor.shape.dim)
    _set_shapes(unknown, seen, batches)


def _set_batch(info: Any, batch: int) -> None:
    """Put a number for the batch into a ``ValueInfoProto``; forget dimensions that are not known."""
    if info.type.WhichOneof("value") != "tensor_type":
        return
    for dim in info.type.tensor_type.shape.dim:
        if dim.HasField("dim_param"):
            line = line_of(dim.dim_param)
            dim.Clear()
            if line is not None:
                dim.dim_value = line.at(batch)


def _set_shapes(
    values: Mapping[str, ir.Value], seen: Mapping[str, Mapping[int, tuple[int, ...]]], batches: Sequence[int]
) -> None:
    import onnx_ir as ir

    for name, by_batch in seen.items():
        if set(by_batch) != set(batches) or len({len(shape) for shape in by_batch.values()}) != 1:
            continue
        rank = len(by_batch[batches[0]])
        lines = [fit_line({batch: shape[axis] for batch, shape in by_batch.items()}) for axis in range(rank)]
        if all(line is not None for line in lines):
            values[name].shape = ir.Shape([line_text(line) for line in lines if line is not None])


_OBSERVED_AT_ONCE = 64


def _observe(
    model: ir.Model,
    unknown: Mapping[str, ir.Value],
    batches: Sequence[int],
    run: Callable[[bytes, int, int, Sequence[str]], Mapping[str, Any]],
) -> None:
    import numpy as np
    import onnx_ir as ir

    onnx = require("onnx", extra="onnx", purpose="read and cut graphs")
    proto = ir.serde.serialize_model(model)
    names = list(unknown)
    seen: dict[str, dict[int, tuple[int, ...]]] = {}
    varies: set[str] = set()
    for start in range(0, len(names), _OBSERVED_AT_ONCE):
        chunk = names[start : start + _OBSERVED_AT_ONCE]
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in chunk)
        graph = proto.SerializeToString()
        for batch, seed in [(batch, 0) for batch in batches] + [(batches[-1], 1)]:
            for name, array in run(graph, batch, seed, chunk).items():
                if not isinstance(array, np.ndarray):
                    varies.add(name)
                    continue
                shape = tuple(array.shape)
                if seen.setdefault(name, {}).setdefault(batch, shape) != shape:
                    varies.add(name)
                if unknown[name].dtype is None:
                    unknown[name].type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    _set_shapes(unknown, {name: shapes for name, shapes in seen.items() if name not in varies}, batches)
