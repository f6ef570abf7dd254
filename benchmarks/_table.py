"""From cells to the lookup table: each choice's terms at each batch size, and where the best one changes."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split import _table_json
from dsc_split._files import read_json, write_json
from dsc_split._table_types import FULL_OFFLOAD, NO_OFFLOAD, SPLIT
from dsc_split.benchmarks._cells import Cell, CellStore
from dsc_split.benchmarks._marks import describe_marks
from dsc_split.engines import Target
from dsc_split.errors import BundleError, DscError, TableError, UsageError
from dsc_split.lookup_table import BatchTable, Choice, Link, LookupTable, Row, Side

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["COUNTS", "make_table", "read_link", "write_table"]

logger = logging.getLogger(__name__)

COUNTS = ("bytes", "elements")
"""What is counted on the link: bytes as they are sent, or elements at one byte each, as the paper does."""
_PER_ELEMENT = ", one byte per element"
"""What the source of a link says where elements are counted."""


def write_table(
    bundle: Bundle,
    *,
    device: str | None = None,
    server: str | None = None,
    link: Link | str | os.PathLike[str] | None = None,
    count: str | None = None,
) -> LookupTable:
    """Make the lookup table of a bundle from its cells, and write it to ``tables/`` and ``table.json``.

    Args:
        bundle: The bundle; its cells are read.
        device: The device's target; default: the one recorded last.
        server: The server's target; default: the one recorded last.
        link: ``paper`` (no cost but the rate), a file for :func:`read_link`, or the link itself; default: that of the
            table that the bundle has, or else ``paper``.
        count: ``bytes`` or ``elements``; default: that of the table that the bundle has, or else ``bytes``.

    Raises:
        UsageError: A side has no cells for its target, or an argument is unknown.
    """
    if link is None or count is None:
        kept_link, kept_count = _kept(bundle)
        link = kept_link if link is None else link
        count = kept_count if count is None else count
    cells = list(CellStore(bundle).all())
    table = make_table(
        bundle,
        cells,
        device=_target(bundle, cells, "device", device),
        server=_target(bundle, cells, "server", server),
        link=link if isinstance(link, Link) else read_link(link),
        count=count,
    )
    document = table.to_json()
    folder = bundle.path / "tables"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise DscError(f"cannot make folder {str(folder)!r}: {e.strerror or e}.") from e
    name = f"{_file_id(bundle, 'device', table.device)}--{_file_id(bundle, 'server', table.server)}.json"
    write_json(folder / name, document)
    write_json(bundle.path / "table.json", document)
    logger.info("table: %s", folder / name)
    return table


def _kept(bundle: Bundle) -> tuple[Link, str]:
    """Give link and count of the table that a bundle has, so that making it anew does not lose them."""
    try:
        table = LookupTable.load(bundle.path / "table.json")
    except (TableError, UsageError):  # none, or a damaged one, which is written anew
        return Link(), "bytes"
    source = table.link.source.removesuffix(_PER_ELEMENT) if table.count == "elements" else table.link.source
    return dataclasses.replace(table.link, source=source), table.count


def make_table(
    bundle: Bundle,
    cells: Iterable[Cell],
    *,
    device: str,
    server: str,
    link: Link | None = None,
    count: str = "bytes",
) -> LookupTable:
    """Put cells together to a lookup table.

    A row needs both of its cells, measured; one that ran out of memory, failed or is missing is left out, and
    so is a batch size without rows. Cells that did not reach their precision are used with their wide
    intervals.

    Args:
        bundle: The bundle that the cells belong to.
        cells: All that were measured; those of other graphs or targets are passed over.
        device: The device's target, in canonical form.
        server: The server's target, in canonical form.
        link: Cost of the network; ``None``: the paper's, nothing but the rate.
        count: ``bytes`` or ``elements``.

    Raises:
        UsageError: A side has no cells for its target, no row has both of its cells, or ``count`` is unknown.
    """
    if count not in COUNTS:
        raise UsageError(f"count is {count!r}; {' or '.join(map(repr, COUNTS))} was expected.")
    link = link or Link()
    if count == "elements":
        link = dataclasses.replace(link, source=link.source + _PER_ELEMENT)
    plans = _plans(bundle, count)
    cells = list(cells)
    on_device = _side_cells(bundle, cells, "device", device, {plan.device_graph for plan in plans})
    on_server = _side_cells(bundle, cells, "server", server, {plan.server_graph for plan in plans})

    choices = tuple(plan.choice for plan in plans)
    sizes = sorted({batch for _, batch in on_device.cells} | {batch for _, batch in on_server.cells})
    batches = []
    unmeasured: dict[int, list[str]] = {}
    for batch in sizes:
        if missing := [plan.choice.name for plan in plans if not _is_measured(plan, batch, on_device, on_server)]:
            unmeasured[batch] = missing
            continue
        rows = tuple(row for plan in plans if (row := _row(plan, batch, on_device, on_server)) is not None)
        _warn_of_failures(plans, batch, on_device, on_server)
        if rows:
            batches.append(BatchTable(batch=batch, rows=rows, segments=()))
    _warn_of_gaps(bundle, unmeasured, complete=bool(batches))
    _warn_of_marks(on_device, on_server)
    if not batches:
        raise UsageError(
            f"no choice has usable times on both sides ({_statuses(cells)}). "
            f"Measure smaller batches: dsc-split bench {bundle.path} --batches 1"
        )
    emulated = {
        side: {"target": part.side.target, **part.emulated}
        for side, part in (("device", on_device), ("server", on_server))
        if part.emulated
    }
    table = LookupTable(
        pair_id=bundle.manifest["pair_id"],
        precision=bundle.manifest["precision"],
        emulated=emulated or None,
        device=on_device.side,
        server=on_server.side,
        link=link,
        choices=choices,
        batches=tuple(batches),
        count=count,
    )
    return dataclasses.replace(
        table,
        batches=tuple(dataclasses.replace(item, segments=table.switch_rates(item.batch)) for item in table.batches),
    )


def read_link(source: str | os.PathLike[str]) -> Link:
    """Read the cost of the network: ``paper``, or a JSON file with keys of the table's ``link``.

    Keys that are missing stay as in the paper's formula.

    Raises:
        UsageError: There is no such file, it does not hold a link, or it has a key that no link has.
    """
    if source == "paper":
        return Link()
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"no link {str(path)!r}: there is no such file. Give 'paper' or a JSON file.")
    known = [field.name for field in dataclasses.fields(Link)]
    try:
        document = read_json(path, "link", TableError)
        link = _table_json.read_link(document, "", defaults=Link(source=path.name))
    except TableError as e:
        raise UsageError(f"link {str(path)!r} cannot be used. {e} Known keys: {', '.join(known)}.") from e
    unknown = [key for key in document if key not in known]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise UsageError(f"link {str(path)!r} has unknown keys: {names}. Known keys: {', '.join(known)}.")
    return link


# ---- what every choice needs -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A choice, the digests of the graphs whose cells it needs, and what it sends at a batch size."""

    choice: Choice
    device_graph: str | None
    server_graph: str | None
    uplink_bytes: Callable[[int], int]
    downlink_bytes: Callable[[int], int]


def _plans(bundle: Bundle, count: str) -> tuple[_Plan, ...]:
    """List the choices that the bundle offers: full offload, the splits in graph order, no offload."""
    whole = bundle.graph_digest(bundle.manifest["model"]["path"])
    elements = count == "elements"
    splits = bundle.splits
    plans = []
    if bundle.full_offload:
        plans.append(
            _Plan(
                choice=Choice(id=0, kind=FULL_OFFLOAD, name=FULL_OFFLOAD),
                device_graph=None,
                server_graph=whole,
                uplink_bytes=bundle.input_elements if elements else bundle.input_bytes,
                downlink_bytes=functools.partial(_outputs, bundle, elements, ()),
            )
        )
    for i, split in enumerate(splits, start=1):
        if split.passthrough and not bundle.full_offload:
            logger.info("split %s sends inputs, which this bundle excludes", split.name)
            continue
        plans.append(
            _Plan(
                choice=Choice(id=i, kind=SPLIT, name=split.name, passthrough=bool(split.passthrough)),
                device_graph=bundle.graph_digest(split.head),
                server_graph=bundle.graph_digest(split.tail),
                uplink_bytes=split.elements if elements else split.size_bytes,
                downlink_bytes=functools.partial(_outputs, bundle, elements, split.early_outputs),
            )
        )
    plans.append(
        _Plan(
            choice=Choice(id=len(splits) + 1, kind=NO_OFFLOAD, name=NO_OFFLOAD),
            device_graph=whole,
            server_graph=None,
            uplink_bytes=_nothing,
            downlink_bytes=_nothing,
        )
    )
    return tuple(plans)


def _outputs(bundle: Bundle, elements: bool, early: tuple[str, ...], batch: int) -> int:
    """Count what comes back: the outputs that the head has not computed."""
    if not elements:
        return bundle.output_bytes(batch, without=early)
    return sum(tensor.elements(batch) for tensor in bundle.outputs if tensor.name not in early)


def _nothing(batch: int) -> int:
    return 0


def _is_measured(plan: _Plan, batch: int, device: _SideCells, server: _SideCells) -> bool:
    """Tell whether every cell that a choice needs is there, whatever came out of it."""
    needed = ((plan.device_graph, device), (plan.server_graph, server))
    return all(graph is None or part.status(graph, batch) is not None for graph, part in needed)


def _warn_of_gaps(bundle: Bundle, unmeasured: Mapping[int, Sequence[str]], *, complete: bool) -> None:
    """Say which batch sizes are left out: a choice that nobody timed must not look like one that is never the best.

    Raises:
        UsageError: No batch size is complete.
    """
    if not unmeasured:
        return
    sizes = ",".join(map(str, unmeasured))
    batch, missing = next(iter(unmeasured.items()))
    message = (
        f"left out of the table, for not every choice was timed on these targets: batch {sizes} "
        f"(at {batch}: {', '.join(missing)})"
    )
    hint = f"dsc-split bench {bundle.path} --batches {sizes}"
    if not complete:
        raise UsageError(f"no batch size is complete. {message[0].upper()}{message[1:]}. Time the rest: {hint}")
    logger.warning("%s. Time the rest: %s", message, hint)


def _warn_of_failures(plans: Sequence[_Plan], batch: int, device: _SideCells, server: _SideCells) -> None:
    """Name the choices that have no row at a batch size, loudly where they should have one."""
    for plan in plans:
        needed = ((plan.device_graph, device), (plan.server_graph, server))
        without = [part.status(graph, batch) for graph, part in needed if graph and not part.latency_ms(graph, batch)]
        if "failed" in without:
            logger.warning("batch %d: %s failed, and is not in the table", batch, plan.choice.name)
        elif without:
            logger.info("batch %d: %s ran out of memory, and is not in the table", batch, plan.choice.name)


def _warn_of_marks(device: _SideCells, server: _SideCells) -> None:
    """Say which cells are to be mistrusted; they are in the table all the same."""
    cells = {cell.question: cell for part in (device, server) for cell in part.cells.values()}
    marked = [cell for cell in cells.values() if cell.marks]
    if marked:
        logger.warning("%s. They are in the table.", describe_marks(marked, len(cells)))


def _row(plan: _Plan, batch: int, device: _SideCells, server: _SideCells) -> Row | None:
    """Make the row of a choice at a batch size; ``None`` where one of its cells has no times."""
    times: dict[str, Any] = {"choice": plan.choice.id}
    for part, graph, cells in (("head", plan.device_graph, device), ("tail", plan.server_graph, server)):
        median_ms, interval_ms, p95_ms = 0.0, (0.0, 0.0), 0.0
        if graph is not None:
            latency_ms = cells.latency_ms(graph, batch)
            if latency_ms is None:
                return None
            median_ms, p95_ms = float(latency_ms["median"]), float(latency_ms["p95"])
            low, high = latency_ms["ci"]
            interval_ms = (float(low), float(high))
        times |= {f"{part}_ms": median_ms, f"{part}_ci_ms": interval_ms, f"{part}_p95_ms": p95_ms}
    return Row(**times, uplink_bytes=plan.uplink_bytes(batch), downlink_bytes=plan.downlink_bytes(batch))


# ---- which cells -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _SideCells:
    """The cells of one side: one target, one run fingerprint, one way of measuring."""

    side: Side
    emulated: Mapping[str, Any] | None
    cells: Mapping[tuple[str, int], Cell]
    """By graph digest and batch size."""

    def latency_ms(self, graph: str, batch: int) -> dict[str, Any] | None:
        cell = self.cells.get((graph, batch))
        return None if cell is None else cell.latency_ms

    def status(self, graph: str, batch: int) -> str | None:
        cell = self.cells.get((graph, batch))
        return None if cell is None else cell.status


def _side_cells(bundle: Bundle, cells: list[Cell], side: str, target: str, graphs: set[str | None]) -> _SideCells:
    if graphs == {None}:  # neither a split nor full offload: the server is not used at all
        return _SideCells(side=Side(target=target, fingerprint="none"), emulated=None, cells={})
    fit = [cell for cell in cells if cell.target == target and cell.question.graph_digest in graphs]
    if not fit:
        raise UsageError(
            f"bundle {str(bundle.path)!r} has no measurements of its {side} side on {target!r}. "
            f"Take them: dsc-split bench {bundle.path} --side {side} --{side} {target}"
        )
    measured = [cell for cell in fit if cell.latency_ms is not None] or fit
    unpaced = [cell for cell in measured if cell.question.period_ms is None]
    newest = max(unpaced or measured, key=_when)
    if newest.question.period_ms is not None:
        logger.warning(
            "%s side: only paced cells are there; those with a period of %g ms are used",
            side,
            newest.question.period_ms,
        )
    fingerprints = {cell.question.fingerprint for cell in fit}
    if len(fingerprints) > 1:
        logger.warning(
            "%s side: %r was measured under %d run fingerprints (machines, versions or power modes); the "
            "newest is used: %s on %s",
            side,
            target,
            len(fingerprints),
            newest.question.fingerprint[:12],
            newest.run_fingerprint.get("host", "an unnamed host"),
        )
    chosen = [
        cell
        for cell in fit
        if cell.question.fingerprint == newest.question.fingerprint
        and cell.question.period_ms == newest.question.period_ms
    ]
    return _SideCells(
        side=Side(target=target, fingerprint=newest.question.fingerprint),
        emulated=newest.emulated,
        cells={(cell.question.graph_digest, cell.batch): cell for cell in chosen},
    )


def _when(cell: Cell) -> str:
    """Say when a cell was measured last; in UTC, so that text compares as time does."""
    return str(cell.rounds[-1]["started"]) if cell.rounds else ""


def _statuses(cells: list[Cell]) -> str:
    counts: dict[str, int] = {}
    for cell in cells:
        counts[cell.status] = counts.get(cell.status, 0) + 1
    return ", ".join(f"{number} cells {status}" for status, number in sorted(counts.items()))


def _target(bundle: Bundle, cells: list[Cell], side: str, asked: str | None) -> str:
    """Give the target of a side: as asked, else the last one recorded that has cells, else the last one recorded."""
    if asked is not None:
        return asked if any(cell.target == asked for cell in cells) else str(Target.parse(asked))
    recorded = bundle.targets(side) if side in bundle.manifest["targets"] else ()
    if not recorded:
        raise UsageError(
            f"bundle {str(bundle.path)!r} has no target for its {side} side yet, and no measurements there. "
            f"Take them: dsc-split bench {bundle.path} --side {side}"
        )
    measured = {cell.target for cell in cells}
    return next((target for target in reversed(recorded) if target in measured), recorded[-1])


def _file_id(bundle: Bundle, side: str, part: Side) -> str:
    """Name one side of a table's file: the target's id and 12 digits of the run fingerprint."""
    name = re.sub(r"[^a-z0-9]+", "-", part.target.lower()).strip("-")
    for item in bundle.manifest["targets"].get(side, ()):
        if item["target"] == part.target:
            name = str(item["id"])
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise BundleError(
            f"manifest of {str(bundle.path)!r} gives target {part.target!r} the id {name!r}, which is no file name."
        )
    return f"{name}-{part.fingerprint[:12]}"
