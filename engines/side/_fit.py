"""Check whether a side's engines can be loaded on this machine, and whether their times are valid here."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.engines._fingerprint import as_json, differences, machine_facts
from dsc_split.engines._target import Target
from dsc_split.engines.side._load import (
    UNUSABLE,
    SideEngines,
    choose_target,
    entry_backend,
    misfit,
    rebuild_command,
    target_entry,
)
from dsc_split.errors import BackendUnavailable, DamagedError, SignatureError, UsageError
from dsc_split.lookup_table import LookupTable
from dsc_split.table._types import FULL_OFFLOAD

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines._base import BackendLike
    from dsc_split.lookup_table import Choice, Row, Side

__all__ = ["Fit", "fit_here", "table_here"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether the engines and times of a side are valid on this machine."""

    side: str
    """``device`` or ``server``."""
    target: str
    """The target, in its canonical text."""
    loadable: bool
    """Whether the engines are for this version of the library, this GPU and this operating system."""
    timing_valid: bool
    """Whether this side was timed on a machine like this: same GPU, driver, power mode."""
    reasons: tuple[str, ...]
    """Why either is false, as sentences; empty where both are true."""
    changed: Mapping[str, tuple[object, object]]
    """Facts in which the machines differ, each with the recorded value and the value here."""
    rebuild: str | None
    """The command that builds the engines for this machine; ``None`` where that would not help."""
    retime: str | None
    """The command that measures the times again; ``None`` where they are valid."""

    def to_json(self) -> dict[str, object]:
        """Return the fit as plain data."""
        return {**dataclasses.asdict(self), "changed": {key: list(values) for key, values in self.changed.items()}}


def fit_here(bundle: Bundle, side: str, target: str | Target | BackendLike | None = None) -> Fit:
    """Compare the engines and times of a side with this machine. No engine is loaded.

    Args:
        bundle: The bundle, a folder or packed.
        side: ``device`` or ``server``.
        target: The target; by default the side's last recorded one, or else ``onnxruntime:cpu``.

    Raises:
        UsageError: The side or the target is unknown, or nothing was built for it.
        TableError: A table of the bundle is damaged.
    """
    chosen = choose_target(bundle, side, target)
    text = str(chosen if isinstance(chosen, Target) else chosen.target)
    changed: dict[str, tuple[object, object]] = {}
    reasons: list[str] = []
    rebuild = retime = None
    loadable = False
    try:
        entry = target_entry(bundle, side, chosen)
        backend = entry_backend(bundle, side, chosen, entry)
        if backend.compiles and entry is not None:
            changed = misfit(backend, entry)
            rebuild = rebuild_command(bundle, side, backend)
        SideEngines(bundle, side, chosen)
        here = as_json(backend.run_fingerprint())
        loadable, rebuild = True, None
    except UNUSABLE as e:
        reasons.append(str(e))
        if isinstance(e, (BackendUnavailable, SignatureError)):
            rebuild = None
    if rebuild or loadable:
        retime = f"dsc-split bench {shlex.quote(str(bundle.path))} --side {side} --stale"
    if loadable:
        table = next(_tables_of(bundle, side, text), None)  # the table in use, even if another one is valid here
        timed_on = None if table is None else _side_of(table, side).run_fingerprint
        if timed_on is not None:
            changed = _timing_differences(timed_on, here)
            reasons += [
                f"{key} is {now!r} here; it was {then!r} when it was timed." for key, (then, now) in changed.items()
            ]
        elif table is not None:
            reasons.append(f"The table does not say on what machine {text!r} was timed.")
        else:
            reasons.append(f"There is no table with times of {text!r} on side {side!r}.")
            retime = f"dsc-split bench {shlex.quote(str(bundle.path))}"
    return Fit(
        side=side,
        target=text,
        loadable=loadable,
        timing_valid=not reasons,
        reasons=tuple(reasons),
        changed=changed,
        rebuild=rebuild,
        retime=retime if reasons else None,
    )


def table_here(bundle: Bundle, side: str, target: str | Target | BackendLike | None = None) -> LookupTable:
    """Return the bundle's table for this machine. Rows with times of ``side`` from another machine are marked.

    Args:
        bundle: The bundle, a folder or packed.
        side: The side that this machine is.
        target: Its target; by default the side's last recorded one, or else ``onnxruntime:cpu``.

    Returns:
        The table whose times are valid here, or else one for the same target, with ``timing_valid`` false in rows with
        times of ``side``.

    Raises:
        UsageError: The side or the target is unknown, or no table has times of it.
    """
    chosen = choose_target(bundle, side, target)
    text = str(chosen if isinstance(chosen, Target) else chosen.target)
    try:
        here = as_json(entry_backend(bundle, side, chosen, target_entry(bundle, side, chosen)).run_fingerprint())
    except UNUSABLE as e:
        logger.warning("%s: whether its times hold here cannot be told: %s", text, e)
        here = {}
    found = list(_tables_of(bundle, side, text))
    if not found:
        raise UsageError(
            f"bundle {str(bundle.path)!r} has no table with times of {text!r} on side {side!r}. "
            f"Make it: dsc-split bench {shlex.quote(str(bundle.path))}"
        )
    table = next((table for table in found if _is_timed_here(table, side, here)), None)
    if table is not None:
        return table
    table = found[0]
    choices = {choice.id: choice for choice in table.choices}
    batches = [
        dataclasses.replace(
            batch,
            rows=tuple(
                dataclasses.replace(row, timing_valid=False) if _has_time(choices[row.choice], row, side) else row
                for row in batch.rows
            ),
        )
        for batch in table.batches
    ]
    return dataclasses.replace(table, batches=tuple(batches))


def _tables_of(bundle: Bundle, side: str, target: str) -> Iterator[LookupTable]:
    """Read the tables with times of a target, the table in use first."""
    return (table for table in _tables(bundle) if _side_of(table, side).target == target)


def _tables(bundle: Bundle) -> Iterator[LookupTable]:
    """Read the tables of a bundle's pairs, ``table.json`` first."""
    names = [name for name in bundle.storage.names() if name.startswith("tables/") and name.endswith(".json")]
    for name in ["table.json", *names]:
        listed = name in bundle.manifest.files
        if not bundle.has(name) or (bundle.manifest.sealed and not listed):
            continue
        try:
            table = LookupTable.load(bundle.read_result(name))
        except DamagedError as e:
            logger.warning("%s of %s is passed over: %s", name, bundle.path, e)
            continue
        if table.pair_id == bundle.manifest.pair_id:
            yield table


def _side_of(table: LookupTable, side: str) -> Side:
    return table.device if side == "device" else table.server


def _is_timed_here(table: LookupTable, side: str, here: Mapping[str, object]) -> bool:
    """Return whether a side was timed on a machine like this."""
    timed_on = _side_of(table, side).run_fingerprint
    return timed_on is not None and not _timing_differences(timed_on, here)


def _timing_differences(timed_on: Mapping[str, object], here: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """Return the differences that make times invalid."""
    return differences(machine_facts(timed_on), machine_facts(here))


def _has_time(choice: Choice, row: Row, side: str) -> bool:
    """Return whether a row has a time of a side."""
    if side == "server":
        return choice.uses_server
    return choice.kind != FULL_OFFLOAD or row.head_ms > 0
