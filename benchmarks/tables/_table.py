"""From cells to lookup tables: each choice's terms at each batch size, and where the best one changes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.files import read_json, write_json
from dsc_split.benchmarks.cells._caveats import describe_marks
from dsc_split.benchmarks.cells._cells import Cell, CellStore
from dsc_split.benchmarks.tables._rows import IncompleteError, Plan, make_batches, make_plans
from dsc_split.benchmarks.tables._side_times import (
    SideTimes,
    choose_times,
    default_times,
    entry_of,
    find_times,
    newest_times,
)
from dsc_split.engines.side._sides import SIDES, last_target
from dsc_split.errors import BundleBusyError, BundleError, DamagedError, DscError, TableError, UsageError
from dsc_split.lookup_table import Link, LookupTable, Side, State
from dsc_split.table import _json as _table_json

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["COUNTS", "adopt_tables", "make_table", "read_link", "save_table", "write_table", "write_tables"]

logger = logging.getLogger(__name__)

COUNTS = ("bytes", "elements")
"""What is counted on the link: bytes as they are sent, or elements at one byte each, as the paper does."""
FOLDER = "tables"
"""Folder of the tables in a bundle; the one asked for last is ``table.json``, too."""
TABLE = "table.json"
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

    A side without cells, as in a part that was packed without them, keeps the times that the bundle's table has.

    Args:
        bundle: The bundle; its cells are read.
        device: The device's target, a target's id, or six or more digits of a run fingerprint; default: the target
            recorded last, in a server's part the table's own.
        server: The server's, likewise.
        link: ``paper`` (no cost but the rate), a file for :func:`read_link`, or the link itself; default: that of the
            table that the bundle has, or else ``paper``.
        count: ``bytes`` or ``elements``; default: that of the table that the bundle has, or else ``bytes``.

    Raises:
        UsageError: A side has no times for what is asked, an argument is unknown, or the bundle is packed.
    """
    table = _Maker(bundle, link=link, count=count).main({"device": device, "server": server})
    save_table(bundle, table)
    return table


def write_tables(bundle: Bundle, *, device: str | Side | None = None, server: str | Side | None = None) -> list[Path]:
    """Write one table for each pair of run fingerprints that was timed whole, and ``table.json``.

    Link and count are those of the table that the bundle has. Files that are right already are left alone.

    Args:
        bundle: The bundle; its cells are read.
        device: Whose times ``table.json`` has, as in :func:`write_table`, or target and fingerprint; default: the kind
            of device that it has them of now, or else the target recorded last.
        server: The server's, likewise.

    Returns:
        The tables' files in ``tables/``, that of ``table.json`` first.

    Raises:
        UsageError: No pair is complete, or not the one asked for; or the bundle is packed.
    """
    maker = _Maker(bundle)
    asked = {"device": device, "server": server}
    tables = {}
    for pair in itertools.product(*(maker.recorded(side) for side in SIDES)):
        try:
            table = maker.make(*pair, level=logging.INFO)
        except IncompleteError as e:
            logger.info("no table of %s and %s: %s", *(part.side.fingerprint[:12] for part in pair), e)
            continue
        tables[_name(bundle, table)] = table
    try:
        main = maker.main(asked, keep=True)
    except IncompleteError:
        if not tables or device is not None or server is not None:
            raise
        main = list(tables.values())[-1]
    _tell_budget(bundle)
    path = save_table(bundle, main)
    return [path, *(_save(bundle, name, table) for name, table in tables.items() if name != path.name)]


def save_table(bundle: Bundle, table: LookupTable) -> Path:
    """Write a table to ``tables/`` and ``table.json``; gives the file in ``tables/``.

    A sealed bundle is opened first. A file that says the same already is left alone.

    Raises:
        UsageError: The bundle is packed.
        DscError: It cannot be written.
    """
    path = _save(bundle, _name(bundle, table), table)
    _put(bundle, bundle.file(TABLE), table)
    return path


def adopt_tables(bundle: Bundle, others: Sequence[Bundle]) -> None:
    """Take the tables of copies for pairs of run fingerprints that a bundle has none of; the last copy's first."""
    known = {(table.device, table.server) for table in _tables(bundle)}
    for other in reversed(others):
        tables = _tables(other)
        for table in (*tables[1:], *tables[:1]):  # table.json, the first one, may be cut down to a memory budget
            pair = (table.device, table.server)
            if pair not in known and table.pair_id == bundle.manifest.pair_id:
                known.add(pair)
                _save(bundle, _name(bundle, table), table)


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
        device: The device's target, a target's id, or six or more digits of a run fingerprint.
        server: The server's, likewise.
        link: Cost of the network; ``None``: the paper's, nothing but the rate.
        count: ``bytes`` or ``elements``.

    Raises:
        UsageError: A side has no cells for its target, no row has both of its cells, or ``count`` is unknown.
    """
    maker = _Maker(bundle, link=link or Link(), count=count, cells=list(cells), tables=())
    return maker.main({"device": device, "server": server})


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


# ---- making ------------------------------------------------------------------------------------------------


class _Maker:
    """Makes tables of one bundle: what is known of both sides, the link, and what is counted."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        link: Link | str | os.PathLike[str] | None = None,
        count: str | None = None,
        cells: Sequence[Cell] | None = None,
        tables: Sequence[LookupTable] | None = None,
    ) -> None:
        self._bundle = bundle
        tables = _tables(bundle) if tables is None else tables
        current = tables[0] if tables else None
        kept_link, kept_count = (Link(), "bytes") if current is None else _kept(current)
        self._count = kept_count if count is None else count
        if self._count not in COUNTS:
            raise UsageError(f"count is {count!r}; {' or '.join(map(repr, COUNTS))} was expected.")
        link = kept_link if link is None else link if isinstance(link, Link) else read_link(link)
        suffix = _PER_ELEMENT if self._count == "elements" else ""
        self._link = dataclasses.replace(link, source=link.source + suffix)
        self._current = current
        self._plans = make_plans(bundle, self._count)
        cells = list(CellStore(bundle).all()) if cells is None else cells
        self._found = {side: find_times(bundle, side, _graphs(self._plans, side), cells, tables) for side in SIDES}

    def main(self, asked: Mapping[str, str | Side | None], *, keep: bool = False) -> LookupTable:
        """Make the table of what is asked for.

        Args:
            asked: By side: a target, an id or digits of a fingerprint; ``None`` where nothing is.
            keep: Whether a side that nothing is asked of stays what it is in the table that is there.
        """
        device, server = (self._choose(side, asked[side], keep=keep) for side in SIDES)
        return self.make(device, server)

    def recorded(self, side: str) -> Sequence[SideTimes]:
        """List the times of the targets that are recorded for a side, or stand in its tables."""
        if not self._uses(side):
            return [self._choose(side, None)]
        return [item for item in self._found[side] if not item.cells or entry_of(self._bundle, side, item.side)]

    def make(self, device: SideTimes, server: SideTimes, *, level: int = logging.WARNING) -> LookupTable:
        """Make the table of two sides; ``level`` is how loudly its flaws are told."""
        batches = make_batches(self._bundle, self._plans, device, server, level=level)
        _tell_marks(device, server, level)
        emulated = {
            side: {"target": part.side.target, **part.emulated}
            for side, part in (("device", device), ("server", server))
            if part.emulated
        }
        table = LookupTable(
            pair_id=self._bundle.manifest.pair_id,
            precision=self._bundle.manifest.precision,
            emulated=emulated or None,
            device=device.side,
            server=server.side,
            link=self._link,
            choices=tuple(plan.choice for plan in self._plans),
            batches=batches,
            count=self._count,
        )
        return dataclasses.replace(
            table,
            batches=tuple(
                dataclasses.replace(item, segments=table.switch_rates(State(batch=item.batch))) for item in batches
            ),
        )

    def _choose(self, side: str, asked: str | Side | None, *, keep: bool = False) -> SideTimes:
        bundle, found = self._bundle, self._found[side]
        if not self._uses(side):
            target = asked.target if isinstance(asked, Side) else asked or last_target(bundle, side)
            return SideTimes(side=Side(target=target, fingerprint="none"), emulated=None, times={})
        if asked is not None:
            return choose_times(bundle, side, found, asked)
        if self._current is not None and (keep or bundle.manifest.side not in (None, side)):
            part = self._current.device if side == "device" else self._current.server
            now = [item for item in found if item.side == part]
            kind = entry_of(bundle, side, now[0].side) if now else None
            if kind is not None:
                return newest_times(side, [item for item in found if entry_of(bundle, side, item.side) is kind])
        return default_times(bundle, side, found)

    def _uses(self, side: str) -> bool:
        """Tell whether a side has anything to do: without splits and full offload the server has not."""
        return bool(_graphs(self._plans, side))


def _graphs(plans: Sequence[Plan], side: str) -> dict[str, str]:
    """Give the digest of a side's graph by the name of the choice that runs it."""
    graphs = {plan.choice.name: plan.device_graph if side == "device" else plan.server_graph for plan in plans}
    return {name: graph for name, graph in graphs.items() if graph is not None}


def _tell_marks(device: SideTimes, server: SideTimes, level: int) -> None:
    """Say which cells are to be mistrusted; they are in the table all the same."""
    cells = {cell.question: cell for part in (device, server) for cell in part.cells}
    marked = [cell for cell in cells.values() if cell.marks]
    if marked:
        logger.log(level, "%s. They are in the table.", describe_marks(marked, len(cells)))


# ---- files -------------------------------------------------------------------------------------------------


def _tables(bundle: Bundle) -> list[LookupTable]:
    """Read the tables of a bundle that are of its pairs, ``table.json`` first; damaged ones are written anew."""
    names = [name for name in bundle.storage.names() if re.fullmatch(rf"{FOLDER}/[^/]+\.json", name)]
    tables = []
    for name in (*([TABLE] if bundle.has(TABLE) else []), *names):
        try:
            table = LookupTable.load(bundle.read_result(name))
        except DamagedError as e:
            logger.info("%s: %s", name, e)
            continue
        if table.pair_id == bundle.manifest.pair_id:
            tables.append(table)
    return tables


def _tell_budget(bundle: Bundle) -> None:
    """Say that a memory budget does not outlast new times: what loses least may be another set."""
    try:
        document = read_json(bundle.path / TABLE, "lookup table", TableError, max_bytes=_table_json.MAX_TABLE_BYTES)
    except TableError:
        return
    budget = (document.get("residency") or {}).get("budget_bytes", {})
    if budget:
        words = ",".join(f"{side}={size_bytes}B" for side, size_bytes in budget.items())
        logger.warning(
            "table.json has all choices again, within no memory budget. Choose anew: "
            f"dsc-split table {bundle.path} --memory-budget {words}"
        )


def _kept(table: LookupTable) -> tuple[Link, str]:
    """Give link and count of a table, so that making it anew does not lose them."""
    source = table.link.source.removesuffix(_PER_ELEMENT) if table.count == "elements" else table.link.source
    return dataclasses.replace(table.link, source=source), table.count


def _save(bundle: Bundle, name: str, table: LookupTable) -> Path:
    """Write a table into ``tables/``, in place of one of the same fingerprints that had another name."""
    folder = bundle.file(FOLDER)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise DscError(f"cannot make folder {str(folder)!r}: {e.strerror or e}.") from e
    _put(bundle, folder / name, table)
    same = f"*-{table.device.fingerprint[:12]}--*-{table.server.fingerprint[:12]}.json"
    for path in folder.glob(same):
        if path.name != name:
            path.unlink(missing_ok=True)
    return folder / name


def _put(bundle: Bundle, path: Path, table: LookupTable) -> None:
    """Write a table's file, unless it is there already."""
    document = table.to_json()
    try:
        if read_json(path, "lookup table", TableError, max_bytes=_table_json.MAX_TABLE_BYTES) == document:
            return
    except TableError:  # none, or a damaged one
        pass
    if bundle.manifest.sealed or path.name == TABLE:
        try:
            bundle.touch()  # another table makes a bundle newer
        except BundleBusyError:
            if bundle.manifest.sealed:
                raise
    write_json(path, document)
    logger.info("table: %s", path)


def _name(bundle: Bundle, table: LookupTable) -> str:
    return f"{_file_id(bundle, 'device', table.device)}--{_file_id(bundle, 'server', table.server)}.json"


def _file_id(bundle: Bundle, side: str, part: Side) -> str:
    """Name one side of a table's file: the target's id and 12 digits of the run fingerprint."""
    entry = entry_of(bundle, side, part)
    name = re.sub(r"[^a-z0-9]+", "-", part.target.lower()).strip("-") if entry is None else entry.id
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise BundleError(
            f"manifest of {str(bundle.path)!r} gives target {part.target!r} the id {name!r}, which is no file name."
        )
    return f"{name}-{part.fingerprint[:12]}"
