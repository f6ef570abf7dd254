"""Cells that several copies of a bundle have, united."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import UnsetType

from dsc_split._support.files import canonical_json
from dsc_split.benchmarks.cells._cells import CellStore
from dsc_split.benchmarks.merge._targets import choose
from dsc_split.errors import DamagedError

if TYPE_CHECKING:
    from dsc_split.benchmarks.cells._cells import Cell
    from dsc_split.bundle import Bundle

__all__ = ["read_cells", "unite_cells"]

_RANK = {"failed": 0, "out-of-memory": 1}
"""Of two answers without times the one that is final says more."""


def read_cells(bundle: Bundle) -> tuple[dict[str, Cell], list[str]]:
    """Read every cell of a bundle, by key; gives the errors of those that are damaged, too."""
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
    """Unite the answers to the same questions.

    An answer that continues another one, whose rounds are its first ones, is no contradiction: the longer counts.

    Args:
        copies: The bundle that is merged into, then the others.
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
        longest = [item for item in variants if not any(_outdoes(other, item[1]) for _, other in variants)]
        distinct = {canonical_json(cell.to_json()): (number, cell) for number, cell in reversed(longest)}
        if len(distinct) > 1 and prefer is None:
            each = "; ".join(
                f"{_described(cell)} in {str(copies[number].path)!r}" for number, cell in distinct.values()
            )
            first = longest[0][1]
            conflicts.append(f"cell {key[:12]} ({first.graph}, batch {first.batch}, {first.target}): {each}")
        united[key] = choose(longest, prefer, _age)[1]
    return united, conflicts


def _outdoes(other: Cell, cell: Cell) -> bool:
    """Tell whether another answer says all that a cell says, and more."""
    count = len(cell.rounds)
    if other.rounds[:count] != cell.rounds:
        return False
    return _order(other) > _order(cell)


def _order(cell: Cell) -> tuple[int, int, str, bytes]:
    """Order answers of which one continues the other."""
    end = cell.environment.end
    when = "" if isinstance(end, UnsetType) else str(end.get("time", ""))
    return len(cell.rounds), _RANK.get(cell.status, 2), when, canonical_json(cell.to_json())


def _age(number: int, cell: Cell) -> tuple[str, bytes]:
    return cell.measured_at, canonical_json(cell.to_json())


def _described(cell: Cell) -> str:
    if cell.latency_ms is None:
        return cell.status
    return f"{cell.latency_ms.median:.4g} ms of {cell.measured_at}"
