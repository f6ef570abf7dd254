"""The choices of a bundle, and the rows of a table made from the times of both sides."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.benchmarks.tables._side_times import SideTimes, Time
from dsc_split.errors import UsageError
from dsc_split.lookup_table import BatchTable, Choice, Row, State
from dsc_split.table._types import FULL_OFFLOAD, NO_OFFLOAD, SPLIT

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.lookup_table import LookupTable

__all__ = ["ChoiceGraphs", "IncompleteError", "list_choices", "make_batches", "with_segments"]

logger = logging.getLogger(__name__)


class IncompleteError(UsageError):
    """No batch size has the times of every choice on both sides."""


# ---- choices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChoiceGraphs:
    """A choice, the digests of the graphs that it runs, and the bytes that it sends at a batch size."""

    choice: Choice
    device_graph: str | None
    server_graph: str | None
    uplink_bytes: Callable[[int], int]
    downlink_bytes: Callable[[int], int]


def list_choices(bundle: Bundle, count: str) -> tuple[ChoiceGraphs, ...]:
    """List the choices that the bundle offers: full offload, the splits in graph order, no offload."""
    whole = bundle.graph_digest(bundle.manifest.model.path)
    elements = count == "elements"
    splits = bundle.splits
    choices = []
    if bundle.full_offload:
        choices.append(
            ChoiceGraphs(
                choice=Choice(id=0, kind=FULL_OFFLOAD, name=FULL_OFFLOAD),
                device_graph=None,
                server_graph=whole,
                uplink_bytes=bundle.input_elements if elements else bundle.input_bytes,
                downlink_bytes=functools.partial(_count_outputs, bundle, elements, ()),
            )
        )
    for i, split in enumerate(splits, start=1):
        if split.passthrough and not bundle.full_offload:
            logger.info("split %s sends inputs, which this bundle excludes", split.name)
            continue
        choices.append(
            ChoiceGraphs(
                choice=Choice(id=i, kind=SPLIT, name=split.name, passthrough=bool(split.passthrough)),
                device_graph=bundle.graph_digest(split.head),
                server_graph=bundle.graph_digest(split.tail),
                uplink_bytes=split.elements if elements else split.size_bytes,
                downlink_bytes=functools.partial(_count_outputs, bundle, elements, split.early_outputs),
            )
        )
    choices.append(
        ChoiceGraphs(
            choice=Choice(id=len(splits) + 1, kind=NO_OFFLOAD, name=NO_OFFLOAD),
            device_graph=whole,
            server_graph=None,
            uplink_bytes=_send_nothing,
            downlink_bytes=_send_nothing,
        )
    )
    return tuple(choices)


def _count_outputs(bundle: Bundle, elements: bool, early: tuple[str, ...], batch: int) -> int:
    """Count what the server sends back: the outputs that the head has not computed."""
    if not elements:
        return bundle.output_bytes(batch, without=early)
    return sum(tensor.elements(batch) for tensor in bundle.outputs if tensor.name not in early)


def _send_nothing(batch: int) -> int:
    return 0


# ---- rows --------------------------------------------------------------------------------------------------


def make_batches(
    bundle: Bundle,
    choices: Sequence[ChoiceGraphs],
    device: SideTimes,
    server: SideTimes,
    *,
    level: int = logging.WARNING,
) -> tuple[BatchTable, ...]:
    """Make the rows of each batch size from the times of two sides; segments are left empty.

    Args:
        bundle: The bundle.
        choices: The choices.
        device: Times of the device.
        server: Times of the server.
        level: Logging level of the messages about gaps and failures.

    Raises:
        IncompleteError: No batch size is complete, or no row has usable times on both sides.
    """
    batches, unmeasured = [], {}
    for batch in sorted({batch for part in (device, server) for _, batch in part.times}):
        needed = {item.choice.name: _needed_times(item, batch, device, server) for item in choices}
        if missing := [name for name, times in needed.items() if None in times]:
            unmeasured[batch] = missing
            continue
        _log_failures(batch, needed, level)
        rows = tuple(row for item in choices if (row := _make_row(item, batch, device, server)) is not None)
        if rows:
            batches.append(BatchTable(batch=batch, rows=rows, segments=()))
    _log_gaps(bundle, unmeasured, level, complete=bool(batches))
    if not batches:
        raise IncompleteError(
            f"no choice has usable times on both sides ({_count_statuses(device, server)}). "
            f"Measure smaller batches: dsc-split bench {bundle.path} --batches 1"
        )
    return tuple(batches)


def with_segments(table: LookupTable) -> LookupTable:
    """Return the table with its segments: the best choice by data rate, at every batch size."""
    segments = (table.switch_rates(State(batch=item.batch)) for item in table.batches)
    batches = (dataclasses.replace(item, segments=each) for item, each in zip(table.batches, segments, strict=True))
    return dataclasses.replace(table, batches=tuple(batches))


def _needed_times(item: ChoiceGraphs, batch: int, device: SideTimes, server: SideTimes) -> list[Time | None]:
    """List the times that a choice needs, failed ones included; ``None`` for one that was not measured."""
    needed = ((item.device_graph, device), (item.server_graph, server))
    return [part.get(graph, batch) for graph, part in needed if graph is not None]


def _log_gaps(bundle: Bundle, unmeasured: Mapping[int, Sequence[str]], level: int, *, complete: bool) -> None:
    """Log which batch sizes are left out: a choice without times must not look like one that is never the best.

    Raises:
        IncompleteError: No batch size is complete.
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
        raise IncompleteError(f"no batch size is complete. {message[0].upper()}{message[1:]}. Time the rest: {hint}")
    logger.log(level, "%s. Time the rest: %s", message, hint)


def _log_failures(batch: int, needed: Mapping[str, Sequence[Time | None]], level: int) -> None:
    """Log the choices that have no row at a batch size; at ``level`` if one failed."""
    for name, times in needed.items():
        without = [time.status for time in times if time is not None and time.median_ms is None]
        if "failed" in without:
            logger.log(level, "batch %d: %s failed, and is not in the table", batch, name)
        elif without:
            logger.info("batch %d: %s ran out of memory, and is not in the table", batch, name)


def _make_row(item: ChoiceGraphs, batch: int, device: SideTimes, server: SideTimes) -> Row | None:
    """Make the row of a choice at a batch size; ``None`` if one of its graphs has no times."""
    head, tail = (
        _NO_TIME if graph is None else part.get(graph, batch)
        for graph, part in ((item.device_graph, device), (item.server_graph, server))
    )
    if head is None or tail is None or head.median_ms is None or tail.median_ms is None:
        return None
    return Row(
        choice=item.choice.id,
        head_ms=head.median_ms,
        head_ci_ms=head.interval_ms,
        head_p95_ms=head.p95_ms,
        tail_ms=tail.median_ms,
        tail_ci_ms=tail.interval_ms,
        tail_p95_ms=tail.p95_ms,
        uplink_bytes=item.uplink_bytes(batch),
        downlink_bytes=item.downlink_bytes(batch),
        timing_valid=head.valid and tail.valid,
    )


_NO_TIME = Time(status="ok", median_ms=0.0, interval_ms=(0.0, 0.0), p95_ms=0.0)
"""The time of a side that has nothing to do."""


def _count_statuses(device: SideTimes, server: SideTimes) -> str:
    counts: dict[str, int] = {}
    for time in (*device.times.values(), *server.times.values()):
        counts[time.status] = counts.get(time.status, 0) + 1
    return ", ".join(f"{number} cells {status}" for status, number in sorted(counts.items()))
