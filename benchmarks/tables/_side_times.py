"""The times of each side, by target and run fingerprint: from cells, or from tables where there are no cells."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.benchmarks.cells._cells import Cell
from dsc_split.engines import Target
from dsc_split.engines.side._sides import recorded_targets
from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable, Side
from dsc_split.table._types import Row

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.bundles._records import TargetEntry

__all__ = [
    "SideTimes",
    "Time",
    "choose_times",
    "default_times",
    "entry_of",
    "find_times",
    "host_of",
    "newest_times",
    "runs_build",
]

logger = logging.getLogger(__name__)

MIN_DIGITS = 6
"""Fewest digits that can name a run fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """The time of one graph at one batch size."""

    status: str
    """``ok``, ``unstable``, ``out-of-memory`` or ``failed``."""
    median_ms: float | None = None
    """Milliseconds; ``None`` if nothing was measured."""
    interval_ms: tuple[float, float] | None = None
    """95 % confidence interval of ``median_ms``; ``None`` if it is not known."""
    p95_ms: float | None = None
    """95th percentile in milliseconds; ``None`` if it is not known."""
    valid: bool = True
    """Whether it was measured on the machine that the table names."""

    @classmethod
    def of_cell(cls, cell: Cell) -> Time:
        """Read a cell's statistics."""
        if cell.latency_ms is None:
            return cls(status=cell.status)
        return cls(
            status=cell.status,
            median_ms=cell.latency_ms.median,
            interval_ms=cell.latency_ms.ci,
            p95_ms=cell.latency_ms.p95,
        )

    @classmethod
    def of_row(cls, row: Row | None, side: str) -> Time:
        """Read one side of a table's row; no row means that the choice ran out of memory on one of the sides."""
        if row is None:
            return cls(status="out-of-memory")
        if side == "device":
            median_ms, interval_ms, p95_ms = row.head_ms, row.head_ci_ms, row.head_p95_ms
        else:
            median_ms, interval_ms, p95_ms = row.tail_ms, row.tail_ci_ms, row.tail_p95_ms
        return cls(status="ok", median_ms=median_ms, interval_ms=interval_ms, p95_ms=p95_ms, valid=row.timing_valid)


@dataclass(frozen=True, kw_only=True)
class SideTimes:
    """All times of one side under one target, one run fingerprint and one way of measuring."""

    side: Side
    """Target and run fingerprint."""
    emulated: Mapping[str, object] | None
    """What was emulated, and how; ``None`` if nothing was."""
    times: Mapping[tuple[str, int], Time]
    """By graph digest and batch size."""
    cells: tuple[Cell, ...] = ()
    """The cells that the times are from."""
    period_ms: float | None = None
    """Milliseconds between the starts of two calls; ``None`` if each call started right after the last."""
    newest: str = ""
    """When it was last measured, in UTC; empty if the times are from a table."""

    def get(self, graph: str, batch: int) -> Time | None:
        """Return the time of a graph at a batch size, if there is one."""
        return self.times.get((graph, batch))

    @property
    def age_order(self) -> tuple[bool, str, str]:
        """Sort key, best last: calls without a period come after paced ones, then newer after older."""
        return self.period_ms is None, self.newest, self.side.fingerprint


# ---- finding -----------------------------------------------------------------------------------------------


def find_times(
    bundle: Bundle,
    side: str,
    graphs: Mapping[str, str],
    cells: Sequence[Cell],
    tables: Sequence[LookupTable] = (),
) -> tuple[SideTimes, ...]:
    """List the known times of a side, one item per target and run fingerprint, the oldest first.

    An item that lacks a graph at every batch size is left out if another item has all graphs: two sides of one target
    share the cells of the whole model.

    Tables fill in for missing cells: for a target and fingerprint without any cell and, in the part of one side, which
    is packed without cells, for each missing time.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        graphs: Digest of the side's graph by the name of the choice that runs it.
        cells: All cells of the bundle; those of other graphs are ignored.
        tables: The bundle's tables, the most important one first.
    """
    wanted = set(graphs.values())
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.question.graph_digest in wanted:
            groups.setdefault((cell.target, cell.question.fingerprint), []).append(cell)
    of_tables: dict[tuple[str, str], SideTimes] = {}
    for table in tables:
        times = _times_of_table(table, side, graphs)
        key = (times.side.target, times.side.fingerprint)
        before = of_tables.get(key, times)
        known = {name: time for name, time in before.times.items() if time.median_ms is not None}
        of_tables[key] = dataclasses.replace(before, times={**times.times, **known})
    found = {key: _times_of_cells(group) for key, group in groups.items()}
    for key, times in of_tables.items():
        if key not in found:
            found[key] = times
        elif bundle.manifest.side is not None:
            found[key] = dataclasses.replace(found[key], times={**times.times, **found[key].times})
    whole = [item for item in found.values() if wanted <= {graph for graph, _ in item.times}]
    return tuple(sorted(whole or found.values(), key=lambda item: item.age_order))


def _times_of_cells(cells: Sequence[Cell]) -> SideTimes:
    """Choose one period, none if possible, and read the cells that were measured with it."""
    measured = [cell for cell in cells if cell.latency_ms is not None] or cells
    newest = max(measured, key=lambda cell: (cell.question.period_ms is None, cell.measured_at))
    chosen = tuple(cell for cell in cells if cell.question.period_ms == newest.question.period_ms)
    return SideTimes(
        side=Side(
            target=newest.target, fingerprint=newest.question.fingerprint, run_fingerprint=newest.run_fingerprint
        ),
        emulated=newest.emulated,
        times={(cell.question.graph_digest, cell.batch): Time.of_cell(cell) for cell in chosen},
        cells=chosen,
        period_ms=newest.question.period_ms,
        newest=max(cell.measured_at for cell in chosen),
    )


def _times_of_table(table: LookupTable, side: str, graphs: Mapping[str, str]) -> SideTimes:
    """Read one side of a table. A choice without a row ran out of memory, on an unknown side."""
    names = {choice.id: choice.name for choice in table.choices}
    times = {}
    for item in table.batches:
        rows = {names[row.choice]: row for row in item.rows}
        for choice, graph in graphs.items():
            if choice in names.values():  # a table for a memory budget has not all of them
                times[graph, item.batch] = Time.of_row(rows.get(choice), side)
    return SideTimes(
        side=table.device if side == "device" else table.server, emulated=_read_emulation(table, side), times=times
    )


def _read_emulation(table: LookupTable, side: str) -> Mapping[str, object] | None:
    """Return what was emulated on a side, by its table."""
    if isinstance(table.emulated, Mapping):
        what = table.emulated.get(side)
        return what if isinstance(what, Mapping) else None
    return None if table.emulated is None else {"how": table.emulated}


# ---- choosing ----------------------------------------------------------------------------------------------


def entry_of(bundle: Bundle, side: str, part: Side) -> TargetEntry | None:
    """Return the manifest's entry of a target: the one whose engines can run there, else the last of that name."""
    entries = recorded_targets(bundle, side, part.target)
    fitting = [entry for entry in entries if runs_build(part.run_fingerprint or {}, entry.fingerprint)]
    return next(reversed(fitting or entries), None)


def runs_build(run: Mapping[str, object], build: Mapping[str, object]) -> bool:
    """Return whether engines built for ``build`` can run on ``run``: both are fingerprints."""
    gpu = run.get("gpu")
    found = {**run, "gpu": gpu.get("name") if isinstance(gpu, Mapping) else gpu}
    return all(found.get(key) == value for key, value in build.items())


def choose_times(bundle: Bundle, side: str, found: Sequence[SideTimes], asked: str | Side) -> SideTimes:
    """Choose the times that were asked for.

    Args:
        bundle: The bundle.
        side: ``device`` or ``server``.
        found: The result of :func:`find_times`.
        asked: A target, a target's id, the first digits of a run fingerprint, or a table's ``Side``.

    Raises:
        UsageError: Nothing fits, or several fingerprints do; the message lists the known ones.
    """
    if isinstance(asked, Side):
        if exact := [item for item in found if item.side == asked]:
            return exact[0]
        raise _no_times_error(bundle, side, asked.target)
    of_target = [item for item in found if item.side.target == asked] or [
        item for item in found if (entry := entry_of(bundle, side, item.side)) and entry.id == asked
    ]
    if of_target:
        targets = sorted({item.side.target for item in of_target})
        if len(targets) > 1:
            raise UsageError(f"--{side} {asked} is the id of several targets: {', '.join(targets)}. Name one of them.")
        return newest_times(side, of_target)
    if re.fullmatch(rf"[0-9a-f]{{{MIN_DIGITS},64}}", asked):
        fitting = [item for item in found if item.side.fingerprint.startswith(asked)]
        if len(fitting) != 1:
            what = "begins several run fingerprints" if fitting else "begins no run fingerprint that was measured"
            raise UsageError(f"--{side} {asked} {what}. There are: {_list_fingerprints(fitting or found)}.")
        return fitting[0]
    target = str(Target.parse(asked))
    of_target = [item for item in found if item.side.target == target]
    if not of_target:
        raise _no_times_error(bundle, side, target)
    return newest_times(side, of_target)


def default_times(bundle: Bundle, side: str, found: Sequence[SideTimes]) -> SideTimes:
    """Choose the times of the last recorded target that has some; those of a table if no target is recorded.

    Raises:
        UsageError: No target is recorded for the side, or none has times.
    """
    recorded = bundle.manifest.targets.of(side)
    of_tables = [item for item in found if not item.cells]
    if not recorded and of_tables:
        return newest_times(side, of_tables)
    if not recorded:
        raise UsageError(
            f"bundle {str(bundle.path)!r} has no target for its {side} side yet, and no measurements there. "
            + _remedy_text(bundle, side, "")
        )
    for entry in reversed(recorded):
        if fitting := [item for item in found if entry_of(bundle, side, item.side) is entry]:
            return newest_times(side, fitting)
    raise _no_times_error(bundle, side, recorded[-1].target)


def newest_times(side: str, found: Iterable[SideTimes]) -> SideTimes:
    """Choose the newest of several times, and log a warning if there are others."""
    *others, newest = sorted(found, key=lambda item: item.age_order)
    if others:
        logger.warning(
            "%s side: %r was measured under %d run fingerprints (machines, versions or power modes); the "
            "newest is used: %s on %s",
            side,
            newest.side.target,
            len(others) + 1,
            newest.side.fingerprint[:12],
            host_of(newest.side),
        )
    if newest.period_ms is not None:
        logger.warning(
            "%s side: only paced cells are there; those with a period of %g ms are used", side, newest.period_ms
        )
    return newest


def host_of(part: Side) -> str:
    """Return the name of the machine that times were measured on."""
    return str((part.run_fingerprint or {}).get("host", "an unnamed host"))


def _list_fingerprints(found: Iterable[SideTimes]) -> str:
    parts = [f"{item.side.fingerprint[:12]} ({item.side.target} on {host_of(item.side)})" for item in found]
    return ", ".join(parts) or "none"


def _no_times_error(bundle: Bundle, side: str, target: str) -> UsageError:
    return UsageError(
        f"bundle {str(bundle.path)!r} has no measurements of its {side} side on {target!r}. "
        + _remedy_text(bundle, side, f" --{side} {target}")
    )


def _remedy_text(bundle: Bundle, side: str, options: str) -> str:
    """Return the command that measures a side, or brings its times here."""
    if bundle.manifest.side in (None, side):
        return f"Take them: dsc-split bench {bundle.path} --side {side}{options}"
    return f"Take them where the {side} is, and unite both: dsc-split merge BUNDLE {bundle.path} OTHER"
