"""The size of a value at each batch size: its dimensions as straight lines in the batch.

A dimension is known when it is a number, or an expression with no symbol but the batch that is a straight line:
``batch``, ``64*batch``, ``batch + 1``. That covers what networks do to a batch: merge it into windows, split off
heads. From such a shape the tail can compute the batch size again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.bundle import TensorInfo

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["BATCH", "Line", "fit_line", "known_shape", "line_of", "line_text", "tensor_info"]

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
    """Return the straight line through the points ``{batch: size}``; ``None`` if there is none.

    One point gives a constant.
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
        The line; ``None`` if the dimension is unknown, has other symbols, or is no straight line.
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
    """Return the dimensions of a value; ``None`` if one is not known."""
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
    """Multiply the dimensions; ``None`` if the product is no straight line in the batch."""
    return fit_line({batch: math.prod(line.at(batch) for line in shape) for batch in _CHECKED_BATCHES})


def tensor_info(value: ir.Value) -> TensorInfo | None:
    """Describe a value that is sent; ``None`` if its type or size is not known."""
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
