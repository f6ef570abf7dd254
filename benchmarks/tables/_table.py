"""Make lookup tables from cells: each choice's terms at each batch size, and where the best choice changes."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split._support.files import make_folder
from dsc_split._support.strict_json import read_json, write_json
from dsc_split.benchmarks.cells._caveats import describe_marks
from dsc_split.benchmarks.cells._cells import Cell, CellStore
from dsc_split.benchmarks.tables._rows import ChoiceGraphs, IncompleteError, list_choices, make_batches, with_segments
from dsc_split.benchmarks.tables._side_times import (
    SideTimes,
    choose_times,
    default_times,
    entry_of,
    find_times,
    newest_times,
)
from dsc_split.engines.side._sides import SIDES, last_target
from dsc_split.errors import BundleBusyError, BundleError, DamagedError, TableError, UsageError
from dsc_split.lookup_table import Link, LookupTable, Side
from dsc_split.table import _json as _table_json

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["COUNTS", "adopt_tables", "make_table", "read_link", "save_table", "write_table", "write_tables"]

logger = logging.getLogger(__name__)

COUNTS = ("bytes", "elements")
"""What is counted on the link: bytes as sent, or elements of one byte each, as in the paper."""
FOLDER = "tables"
"""Folder of the tables in a bundle; ``table.json`` is a copy of the last one that was asked for."""
TABLE = "table.json"
_PER_ELEMENT = ", one byte per element"
"""Added to the source of a link where elements are counted."""


def write_table(
    bundle: Bundle,
    *,
    device: str | None = None,
    server: str | None = None,
    link: Link | str | os.PathLike[str] | None = None,
    count: str | None = None,
) -> LookupTable:
    """Make the lookup table of a bundle from its cells, and write it to ``tables/`` and ``table.json``.

    A side without cells, as in the part of one side, keeps the times of the bundle's table.

    Args:
        bundle: The bundle; its cells are read.
        device: The device's target, a target's id, or six or more digits of a run fingerprint; default: the target
            recorded last, or in a server's part that of the table.
        server: The same for the server.
        link: ``paper`` (no cost but the rate), a file for :func:`read_link`, or a link; default: the link of the
            bundle's table, else ``paper``.
        count: ``bytes`` or ``elements``; default: that of the bundle's table, else ``bytes``.

    Raises:
        UsageError: A side has no times for its target, an argument is unknown, or the bundle is packed.
    """
    table = _TableMaker(bundle, link=link, count=count).main({"device": device, "server": server})
    save_table(bundle, table)
    return table


def write_tables(bundle: Bundle, *, device: str | Side | None = None, server: str | Side | None = None) -> list[Path]:
    """Write one table for each complete pair of run fingerprints, and ``table.json``.

    Link and count are those of the bundle's table. Files that need no change are not written.

    Args:
        bundle: The bundle; its cells are read.
        device: Device of ``table.json``, as in :func:`write_table`, or a table's ``Side``; default: the kind of device
            that it has now, else the target recorded last.
        server: The same for the server.

    Returns:
        The files in ``tables/``; the one that ``table.json`` copies is the first.

    Raises:
        UsageError: No pair is complete, the one asked for is not, or the bundle is packed.
    """
    maker = _TableMaker(bundle)
    asked = {"device": device, "server": server}
    tables = {}
    for pair in itertools.product(*(maker.recorded(side) for side in SIDES)):
        try:
            table = maker.make(*pair, level=logging.INFO)
        except IncompleteError as e:
            logger.info("no table of %s and %s: %s", *(part.side.fingerprint[:12] for part in pair), e)
            continue
        tables[_file_name(bundle, table)] = table
    try:
        main = maker.main(asked, keep=True)
    except IncompleteError:
        if not tables or device is not None or server is not None:
            raise
        main = list(tables.values())[-1]
    _warn_of_budget(bundle)
    path = save_table(bundle, main)
    return [path, *(_save_in_folder(bundle, name, table) for name, table in tables.items() if name != path.name)]


def save_table(bundle: Bundle, table: LookupTable) -> Path:
    """Write a table to ``tables/`` and ``table.json``; return the file in ``tables/``.

    A sealed bundle is opened first. A file that needs no change is not written.

    Raises:
        UsageError: The bundle is packed.
        DscError: It cannot be written.
    """
    path = _save_in_folder(bundle, _file_name(bundle, table), table)
    _write_if_changed(bundle, bundle.file(TABLE), table)
    return path


def adopt_tables(bundle: Bundle, others: Sequence[Bundle]) -> None:
    """Copy the tables of other bundles for pairs of run fingerprints without a table; the last bundle wins."""
    known = {(table.device, table.server) for table in _read_tables(bundle)}
    for other in reversed(others):
        tables = _read_tables(other)
        for table in (*tables[1:], *tables[:1]):  # table.json, the first one, may be cut down to a memory budget
            pair = (table.device, table.server)
            if pair not in known and table.pair_id == bundle.manifest.pair_id:
                known.add(pair)
                _save_in_folder(bundle, _file_name(bundle, table), table)


def make_table(
    bundle: Bundle,
    cells: Iterable[Cell],
    *,
    device: str,
    server: str,
    link: Link | None = None,
    count: str = "bytes",
) -> LookupTable:
    """Make a lookup table from cells.

    A row needs both of its cells. It is left out if one ran out of memory, failed or is missing; so is a batch size
    without rows. Cells that did not reach their precision are used, with their wide intervals.

    Args:
        bundle: The bundle that the cells belong to.
        cells: The measurements; those of other graphs or targets are ignored.
        device: The device's target, a target's id, or six or more digits of a run fingerprint.
        server: The same for the server.
        link: Cost of the network; ``None``: nothing but the rate, as in the paper.
        count: ``bytes`` or ``elements``.

    Raises:
        UsageError: A side has no cells for its target, no row has both of its cells, or ``count`` is unknown.
    """
    maker = _TableMaker(bundle, link=link or Link(), count=count, cells=list(cells), tables=())
    return maker.main({"device": device, "server": server})


def read_link(source: str | os.PathLike[str]) -> Link:
    """Read the cost of the network: ``paper``, or a JSON file with keys of the table's ``link``.

    Missing keys keep the values of the paper's formula.

    Raises:
        UsageError: There is no such file, it holds no link, or it has an unknown key.
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


class _TableMaker:
    """Makes the tables of one bundle, from the times of both sides, the link, and what is counted."""

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
        tables = _read_tables(bundle) if tables is None else tables
        current = tables[0] if tables else None
        kept_link, kept_count = (Link(), "bytes") if current is None else _link_and_count(current)
        self._count = kept_count if count is None else count
        if self._count not in COUNTS:
            raise UsageError(f"count is {count!r}; {' or '.join(map(repr, COUNTS))} was expected.")
        link = kept_link if link is None else link if isinstance(link, Link) else read_link(link)
        suffix = _PER_ELEMENT if self._count == "elements" else ""
        self._link = dataclasses.replace(link, source=link.source + suffix)
        self._current = current
        self._choices = list_choices(bundle, self._count)
        cells = list(CellStore(bundle).all()) if cells is None else cells
        self._found = {
            side: find_times(bundle, side, _graph_digests(self._choices, side), cells, tables) for side in SIDES
        }

    def main(self, asked: Mapping[str, str | Side | None], *, keep: bool = False) -> LookupTable:
        """Make the table of the sides that are asked for.

        Args:
            asked: By side: a target, an id or digits of a fingerprint; ``None`` for the default.
            keep: Whether the default is the side of the present table.
        """
        device, server = (self._choose(side, asked[side], keep=keep) for side in SIDES)
        return self.make(device, server)

    def recorded(self, side: str) -> Sequence[SideTimes]:
        """List the times of a side's recorded targets, and those from tables."""
        if not self._uses(side):
            return [self._choose(side, None)]
        return [item for item in self._found[side] if not item.cells or entry_of(self._bundle, side, item.side)]

    def make(self, device: SideTimes, server: SideTimes, *, level: int = logging.WARNING) -> LookupTable:
        """Make the table of two sides; its flaws are logged at ``level``."""
        batches = make_batches(self._bundle, self._choices, device, server, level=level)
        _warn_of_marks(device, server, level)
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
            choices=tuple(item.choice for item in self._choices),
            batches=batches,
            count=self._count,
        )
        return with_segments(table)

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
        """Return whether a side runs any graph; the server does not without splits and full offload."""
        return bool(_graph_digests(self._choices, side))


def _graph_digests(choices: Sequence[ChoiceGraphs], side: str) -> dict[str, str]:
    """Return the digest of a side's graph by the name of the choice that runs it."""
    graphs = {item.choice.name: item.device_graph if side == "device" else item.server_graph for item in choices}
    return {name: graph for name, graph in graphs.items() if graph is not None}


def _warn_of_marks(device: SideTimes, server: SideTimes, level: int) -> None:
    """Warn of cells that were timed while the GPU was not steady; they are in the table."""
    cells = {cell.question: cell for part in (device, server) for cell in part.cells}
    marked = [cell for cell in cells.values() if cell.marks]
    if marked:
        logger.log(level, "%s. They are in the table.", describe_marks(marked, len(cells)))


# ---- files -------------------------------------------------------------------------------------------------


def _read_tables(bundle: Bundle) -> list[LookupTable]:
    """Read the tables of a bundle's own pairs, ``table.json`` first; skip damaged ones."""
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


def _warn_of_budget(bundle: Bundle) -> None:
    """Warn that new times end a memory budget: another set of choices may lose least now."""
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


def _link_and_count(table: LookupTable) -> tuple[Link, str]:
    source = table.link.source.removesuffix(_PER_ELEMENT) if table.count == "elements" else table.link.source
    return dataclasses.replace(table.link, source=source), table.count


def _save_in_folder(bundle: Bundle, name: str, table: LookupTable) -> Path:
    """Write a table into ``tables/``; remove tables of the same fingerprints with another name."""
    folder = bundle.file(FOLDER)
    make_folder(folder)
    _write_if_changed(bundle, folder / name, table)
    same = f"*-{table.device.fingerprint[:12]}--*-{table.server.fingerprint[:12]}.json"
    for path in folder.glob(same):
        if path.name != name:
            path.unlink(missing_ok=True)
    return folder / name


def _write_if_changed(bundle: Bundle, path: Path, table: LookupTable) -> None:
    """Write a table's file if it changes."""
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


def _file_name(bundle: Bundle, table: LookupTable) -> str:
    return f"{_side_name(bundle, 'device', table.device)}--{_side_name(bundle, 'server', table.server)}.json"


def _side_name(bundle: Bundle, side: str, part: Side) -> str:
    """Return one half of a table's file name: the target's id and 12 digits of the run fingerprint."""
    entry = entry_of(bundle, side, part)
    name = re.sub(r"[^a-z0-9]+", "-", part.target.lower()).strip("-") if entry is None else entry.id
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name):
        raise BundleError(
            f"manifest of {str(bundle.path)!r} gives target {part.target!r} the id {name!r}, which is no file name."
        )
    return f"{name}-{part.fingerprint[:12]}"
