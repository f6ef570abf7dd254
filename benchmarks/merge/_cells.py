"""Merge the cells of several copies of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import UnsetType

from dsc_split._support.strict_json import canonical_json
from dsc_split.benchmarks.cells._cells import CellStore
from dsc_split.benchmarks.merge._targets import choose
from dsc_split.errors import DamagedError

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell
    from dsc_split.bundle import Bundle

__all__ = ["read_cells", "unite_cells"]

_RANK = {"failed": 0, "out-of-memory": 1}
"""Order of statuses: of two cells without times, the final one counts."""


def read_cells(bundle: Bundle) -> tuple[dict[str, Cell], list[str]]:
    """Read every cell of a bundle; return cells by key, and the errors of damaged ones."""
    store, cells, damaged = CellStore(bundle), {}, []
    for name in store.names():
        try:
            cell = store.read(name)
        except DamagedError as e:
            damaged.append(str(e))
        else:
            cells[cell.question.key] = cell
    return cells, damaged


def unite_cells(
    copies: Sequence[Bundle], cells: Sequence[Mapping[str, Cell]], prefer: str | None
) -> tuple[dict[str, Cell], list[str]]:
    """Merge the cells of several copies.

    A cell that begins with the rounds of another one continues it. That is no contradiction: the longer one counts.

    Args:
        copies: The bundle to merge into, then the others.
        cells: Their cells by key, in the same order.
        prefer: ``ours``, ``theirs`` or ``newer``; ``None``: contradictions are conflicts.

    Returns:
        The cells by key, and conflicts in words.
    """
    united, conflicts = {}, []
    for key in sorted({key for each in cells for key in each}):
        variants = [(number, each[key]) for number, each in enumerate(cells) if key in each]
        if all(cell == variants[0][1] for _, cell in variants):
            united[key] = variants[0][1]
            continue
        longest = [item for item in variants if not any(_continues(other, item[1]) for _, other in variants)]
        distinct = {canonical_json(cell.to_json()): (number, cell) for number, cell in reversed(longest)}
        if len(distinct) > 1 and prefer is None:
            each = "; ".join(
                f"{_cell_text(cell)} in {str(copies[number].path)!r}" for number, cell in distinct.values()
            )
            first = longest[0][1]
            conflicts.append(f"cell {key[:12]} ({first.graph}, batch {first.batch}, {first.target}): {each}")
        united[key] = choose(longest, prefer, _age)[1]
    return united, conflicts


def _continues(other: Cell, cell: Cell) -> bool:
    """Return whether ``other`` continues ``cell``."""
    count = len(cell.rounds)
    if other.rounds[:count] != cell.rounds:
        return False
    return _sort_key(other) > _sort_key(cell)


def _sort_key(cell: Cell) -> tuple[int, int, str, bytes]:
    """Sort key of cells that continue each other, the last one is the largest."""
    end = cell.environment.end
    when = "" if isinstance(end, UnsetType) else str(end.get("time", ""))
    return len(cell.rounds), _RANK.get(cell.status, 2), when, canonical_json(cell.to_json())


def _age(number: int, cell: Cell) -> tuple[str, bytes]:
    return cell.measured_at, canonical_json(cell.to_json())


def _cell_text(cell: Cell) -> str:
    if cell.latency_ms is None:
        return cell.status
    return f"{cell.latency_ms.median:.4g} ms of {cell.measured_at}"
