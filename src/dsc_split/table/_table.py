"""The split lookup table: returns the fastest choice for a batch size and a data rate.

The table contains terms, not answers: times of head and tail, bytes over the link, and the link's cost. So one
table can answer for any data rate, round-trip time, server load and set of allowed choices::

    table = LookupTable.load("b4/table.json")
    pick = table.pick(8, 12.0)
    print(pick.choice.name, pick.latency_ms)

The answer is the choice with the smallest T at a batch size. T is computed in binary64 and in this order::

    T = head_ms + [uses the server] * (tail_ms * server_load + queue_ms + rtt_ms * round_trips + c0_ms
        + c1_ms_per_mb * (U + V) + 1000 * (U / rate + V / downlink_rate))

U is the number of MB (10^6 bytes) to the server, V the number of MB back, 0 unless the link counts them. Of choices
with equal T the one with the smaller U wins, then the lower id. This module needs only the standard library.
"""

from __future__ import annotations

import bisect
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, overload

from dsc_split._support.checks import shown
from dsc_split._support.strict_json import read_json
from dsc_split.errors import TableError, UsageError
from dsc_split.table import _json as _table_json
from dsc_split.table._arguments import batch_size, data_rate, finite_number, is_p95, named_choices
from dsc_split.table._arithmetic import (
    Lines,
    bytes_at,
    evaluate,
    in_order,
    make_lines,
    neighbour,
    ranking,
    switch_rates,
)
from dsc_split.table._pick import Pick
from dsc_split.table._state import State
from dsc_split.table._types import Choice, Row, Segment, TableContent, Terms

__all__ = ["LookupTable"]

_Rows: TypeAlias = tuple[tuple[Choice, Row], ...]


@dataclass(frozen=True, kw_only=True)
class LookupTable(TableContent):
    """The terms of every choice at every measured batch size, for one device and one server.

    A table does not change, and many threads may use it at once.
    """

    _plain: dict[int, Lines] = field(init=False, repr=False, compare=False, default_factory=dict)
    _rows: dict[int, tuple[tuple[Choice, Row], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    # ---- reading and writing -------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> LookupTable:
        """Read a table from its path, or from the bytes of its file.

        To read the table of a bundle, use :meth:`dsc_split.bundle.Bundle.table`.

        Raises:
            UsageError: There is no such file, or it is a bundle.
            TableError: The file is damaged, contradicts itself, or is of a newer version.
        """
        what = bytes(source) if isinstance(source, (bytes, bytearray, memoryview)) else _path_of(source)
        document = read_json(what, "lookup table", TableError, max_bytes=_table_json.MAX_TABLE_BYTES)
        try:
            return cls.from_json(document)
        except TableError as e:
            name = "lookup table" if isinstance(what, bytes) else f"lookup table {str(what)!r}"
            hint = "" if str(e).endswith("Update dsc-split.") else " Make it again: dsc-split table BUNDLE"
            raise TableError(f"{name}: {e}{hint}") from e

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> LookupTable:
        """Read a table from a parsed ``table.json``, version 1. Unknown keys are ignored.

        Raises:
            TableError: A value is missing, of the wrong type, out of range or contradictory; the message says
                where. Or the version is newer, or the table requires an unknown feature.
        """
        table = _table_json.read_table(document, cls)
        for position in range(len(table.batches)):
            table._check_segments(position)
        return table

    def to_json(self) -> dict[str, object]:
        """Return the table as the document of ``table.json``, version 1."""
        return _table_json.table_document(self)

    # ---- asking --------------------------------------------------------------------------------------------

    @overload
    def pick(self, batch: State) -> Pick: ...

    @overload
    def pick(
        self,
        batch: int,
        rate_mb_s: float,
        *,
        downlink_rate_mb_s: float | None = None,
        rtt_ms: float | None = None,
        server_load: float | None = None,
        queue_ms: float | None = None,
        allow: Iterable[str | int] | None = None,
        percentile: float | None = None,
    ) -> Pick: ...

    def pick(
        self,
        batch: int | State,
        rate_mb_s: float | None = None,
        *,
        downlink_rate_mb_s: float | None = None,
        rtt_ms: float | None = None,
        server_load: float | None = None,
        queue_ms: float | None = None,
        allow: Iterable[str | int] | None = None,
        percentile: float | None = None,
    ) -> Pick:
        """Return the fastest choice in one state: ``pick(State(batch=8, rate_mb_s=12.0))``, or ``pick(8, 12.0)``.

        Args:
            batch: A :class:`State` without other arguments, or a batch size.
            rate_mb_s: Uplink data rate in MB/s; this and all other arguments are the fields of :class:`State`.
            downlink_rate_mb_s: Downlink rate in MB/s.
            rtt_ms: Round-trip time in milliseconds.
            server_load: Time of the tail now divided by its measured time.
            queue_ms: Time in milliseconds that a request waits before the tail starts.
            allow: Names or ids of the allowed choices; an iterator is consumed.
            percentile: 50 or 95.

        Raises:
            UsageError: A number is NaN, negative or out of range, the batch is larger than all measured ones,
                a choice is unknown, no allowed choice has a finite T, or a state has other arguments beside it.
        """
        plain = (
            downlink_rate_mb_s is None
            and rtt_ms is None
            and server_load is None
            and queue_ms is None
            and allow is None
            and percentile is None
        )
        state = None
        if isinstance(batch, State):
            if not plain or rate_mb_s is not None:
                raise UsageError("pick takes a State, or batch size, data rate and more; got both. Put all into one.")
            state, plain = batch, batch.is_plain
            batch, rate_mb_s = state.batch, state.rate_mb_s
        # As keys of a dictionary, True and 1.0 equal 1, so they must be refused here.
        batch = batch if type(batch) is int else batch_size(batch)
        rate = rate_mb_s if type(rate_mb_s) is float and rate_mb_s >= 0.0 else data_rate("data rate", rate_mb_s)
        lines = self._plain.get(batch) if plain else None
        if lines is None:
            state = state or State(
                batch=batch,
                rate_mb_s=rate,
                downlink_rate_mb_s=downlink_rate_mb_s,
                rtt_ms=rtt_ms,
                server_load=server_load,
                queue_ms=queue_ms,
                allow=None if allow is None else named_choices(allow),
                percentile=percentile,
            )
            lines = self._lines(state)
        times = evaluate(lines, rate)
        latency_ms = min(times)
        if latency_ms == math.inf:
            raise UsageError(
                f"at {rate:g} MB/s nothing can be sent, and no choice that is allowed at batch {batch} runs "
                f"on the device alone ({_names(lines.choices)}). Allow 'no-offload', or wait for the link."
            )
        return Pick(
            choice=lines.choices[times.index(latency_ms)],
            latency_ms=latency_ms,
            batch=batch,
            rate_mb_s=rate,
            table=self,
            lines=lines,
            times_ms=times,
            _state=state,
        )

    def ranking(self, state: State) -> tuple[Terms, ...]:
        """List every allowed choice with the terms of its T, the fastest first.

        Raises:
            UsageError: As in :meth:`pick`, but not where every T is infinite.
        """
        lines = self._lines(state)
        return ranking(lines, data_rate("data rate", state.rate_mb_s))

    def latency_ms(self, choice: str | int, state: State) -> float:
        """Return T in milliseconds of one choice, by name or id; infinite where its bytes cannot be sent.

        ``allow`` of the state is ignored.

        Raises:
            UsageError: As in :meth:`ranking`.
        """
        lines = self._lines(replace(_as_state(state), allow=[choice]))
        return evaluate(lines, data_rate("data rate", state.rate_mb_s))[0]

    def switch_rates(self, state: State) -> tuple[Segment, ...]:
        """List the ranges of data rates in which each choice is the best, with exact boundaries.

        At a boundary :meth:`pick` returns the choice of the next segment, at the number just below it that of this
        segment. The rate of the state is ignored: ``table.switch_rates(State(batch=8))``.

        Raises:
            UsageError: As in :meth:`pick`.
        """
        lines = self._lines(state)
        segments = switch_rates(lines)
        if not segments:
            raise UsageError(
                f"nothing that is allowed at batch {state.batch} ({_names(lines.choices)}) can answer at any data "
                "rate. Allow 'no-offload', or give a downlink rate above 0."
            )
        return segments

    def choice(self, name: str | int) -> Choice:
        """Find a choice by name or id.

        Raises:
            UsageError: The table has no such choice.
        """
        for choice in self.choices:
            if name == choice.name or (name == choice.id and not isinstance(name, bool)):
                return choice
        raise UsageError(f"unknown choice {name!r}; the table has {_names(self.choices)}.")

    def without_inputs_sent(self) -> tuple[int, ...]:
        """Return the ids of the choices that do not send the model's inputs, to use as ``allow``."""
        return tuple(choice.id for choice in self.choices if not choice.sends_inputs)

    # ---- inside --------------------------------------------------------------------------------------------

    def _lines(self, state: State) -> Lines:
        """Return the lines of a state without its rate; lines of plain states are cached."""
        batch = batch_size(_as_state(state).batch)
        if state.is_plain and batch in self._plain:
            return self._plain[batch]
        rows = self._rows_at(batch)
        measured_batch = self.batches[self._position(batch)].batch
        if state.allow is not None:
            allowed = {self.choice(name).id for name in state.allow}
            there = rows
            rows = tuple(item for item in rows if item[0].id in allowed)
            if not rows:
                raise UsageError(
                    f"none of the choices that are allowed has a row at batch {measured_batch}. "
                    f"Allow one of {_names(tuple(choice for choice, _ in there))}."
                )
        if is_p95(state.percentile):
            rows = tuple((choice, at_p95) for choice, row in rows if (at_p95 := row.at_p95()) is not None)
            if not rows:
                raise UsageError(
                    f"no choice that is allowed has 95th percentiles at batch {measured_batch}. "
                    "Ask for the medians, or measure again."
                )
        downlink, rtt, load, queue = state.downlink_rate_mb_s, state.rtt_ms, state.server_load, state.queue_ms
        lines = make_lines(
            rows,
            measured_batch=measured_batch,
            link=self.link,
            downlink_rate_mb_s=self.link.downlink_rate_mb_s
            if downlink is None
            else data_rate("downlink rate", downlink),
            rtt_ms=self.link.rtt_ms if rtt is None else finite_number("round-trip time", "ms", rtt),
            server_load=1.0 if load is None else finite_number("server load", "times", load),
            queue_ms=0.0 if queue is None else finite_number("queue", "ms", queue),
        )
        if state.is_plain and len(self._plain) < _MAX_CACHED:
            self._plain[batch] = lines
        return lines

    def _position(self, batch: int) -> int:
        """Return the index of the smallest measured batch size that is at least ``batch``."""
        position = bisect.bisect_left(self.batches, batch, key=lambda item: item.batch)
        if position == len(self.batches):
            measured = ", ".join(str(item.batch) for item in self.batches)
            raise UsageError(
                f"batch {shown(batch)} is larger than every measured one ({measured}). "
                f"Measure it: dsc-split bench BUNDLE --batches {measured.replace(' ', '')},{shown(batch)}"
            )
        return position

    def _rows_at(self, batch: int) -> _Rows:
        """Return each choice that has a row at ``batch``, with the row, sorted by :func:`in_order`; cached."""
        if batch in self._rows:
            return self._rows[batch]
        position = self._position(batch)
        choices = {choice.id: choice for choice in self.choices}
        rows = []
        for row in self.batches[position].rows:
            if self.batches[position].batch == batch:
                rows.append((choices[row.choice], row))
                continue
            near, other = self.batches[position].batch, neighbour(self.batches, position, row.choice)
            up = None if other is None else (other[0], other[1].uplink_bytes)
            down = None if other is None else (other[0], other[1].downlink_bytes)
            at_batch = replace(
                row,
                uplink_bytes=bytes_at(batch, near=(near, row.uplink_bytes), other=up),
                downlink_bytes=bytes_at(batch, near=(near, row.downlink_bytes), other=down),
            )
            rows.append((choices[row.choice], at_batch))
        ordered = in_order(rows)
        if len(self._rows) < _MAX_CACHED:
            self._rows[batch] = ordered
        return ordered

    def _check_segments(self, position: int) -> None:
        """Raise an error if segments contradict the rows by more than rounding."""
        table = self.batches[position]
        wrong = _table_json.segment_at_fault(table.segments, self._lines(State(batch=table.batch)))
        if wrong is not None:
            segment, why = wrong
            raise TableError(f"batches[{position}].segments[{segment}] contradicts the rows: {why}.")


PACKED_SUFFIX = ".dscb"
"""End of the file name of a packed bundle."""
_MAX_CACHED = 8192
"""Most batch sizes whose lines and rows are cached."""


def _path_of(source: str | os.PathLike[str]) -> Path:
    """Return the path of a table's file.

    Raises:
        UsageError: ``source`` is no path, there is no such file, or it is a bundle or a folder.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(f"{source!r} is no lookup table; a path or the bytes of a table were expected.")
    path = Path(source)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as e:
        raise UsageError(f"no lookup table {str(path)!r}: there is no such file.") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"no lookup table {shown(str(path))}: {getattr(e, 'strerror', e)}.") from e
    if is_folder or path.suffix == PACKED_SUFFIX:
        raise UsageError(
            f"{str(path)!r} is a bundle, or a folder; a table's file was expected. "
            "Read the table of a bundle with Bundle.open(PATH).table()."
        )
    return path


def _as_state(state: object) -> State:
    if not isinstance(state, State):
        raise UsageError(f"got {shown(state)}; a State was expected: State(batch=8, rate_mb_s=12.0).")
    return state


def _names(choices: tuple[Choice, ...]) -> str:
    return ", ".join(repr(choice.name) for choice in choices)
