"""The split lookup table: for a batch size and a data rate, which choice is the fastest.

The table keeps terms, not answers: what head and tail take, what goes over the link, and the link's cost. So
one table answers any rate, round-trip time, server load and mask::

    table = LookupTable.load("b4/table.json")
    pick = table.pick(8, 12.0)
    print(pick.choice.name, pick.latency_ms)

Every answer is the least T over the rows of a batch size, in binary64 and in this order::

    T = head_ms + [uses the server] * (tail_ms * server_load + queue_ms + rtt_ms * round_trips + c0_ms
        + c1_ms_per_mb * (U + V) + 1000 * (U / rate + V / downlink_rate))

with U the MB up (10^6 bytes) and V the MB back, 0 unless the link counts them. Of equal choices the one with
fewer bytes up wins, then the lower id. This module needs the standard library alone.
"""

from __future__ import annotations

import bisect
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from dsc_split._support.checks import shown
from dsc_split._support.files import read_json
from dsc_split.errors import TableError, UsageError
from dsc_split.table import _json as _table_json
from dsc_split.table._arguments import batch_size, finite_number, is_p95, number
from dsc_split.table._arithmetic import Lines, bytes_at, evaluate, make_lines, neighbour, switch_rates
from dsc_split.table._pick import Pick
from dsc_split.table._types import BatchTable, Choice, Link, Row, Segment, Side, Terms

__all__ = ["LookupTable"]

_Rows: TypeAlias = tuple[tuple[Choice, Row], ...]


@dataclass(frozen=True, kw_only=True)
class LookupTable:
    """The terms of every choice at every measured batch size, on one device and one server.

    It does not change, and any number of threads may ask it.
    """

    pair_id: str
    """Identity of the pairs that were measured: ``sha256:...``."""
    precision: str
    """``fp32`` or ``fp16``."""
    emulated: str | Mapping[str, Any] | None
    """What was emulated, and how; ``None`` where every time was measured as it stands."""
    device: Side
    """What the heads were measured on."""
    server: Side
    """What the tails were measured on."""
    link: Link
    """Cost of the network, apart from the rate."""
    choices: tuple[Choice, ...]
    """By ascending id."""
    batches: tuple[BatchTable, ...]
    """By ascending batch size."""
    count: str = "bytes"
    """``bytes``, or ``elements`` where every element counts as one byte, as in the paper."""
    _plain: dict[int, Lines] = field(init=False, repr=False, compare=False, default_factory=dict)
    _rows: dict[int, tuple[tuple[Choice, Row], ...]] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    # ---- reading and writing -------------------------------------------------------------------------------

    @classmethod
    def load(cls, source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> LookupTable:
        """Read a table from its file, or from the bytes of one.

        The table of a bundle is read with :meth:`dsc_split.bundle.Bundle.table`.

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
    def from_json(cls, document: Mapping[str, Any]) -> LookupTable:
        """Read the form of ``table.json``, version 1. Unknown keys are ignored.

        Raises:
            TableError: Something is missing, of the wrong type, out of range or contradictory; the message
                names the place. Or the version is newer, or something unknown is required.
        """
        table = cls(**_table_json.read_table(document))
        for position in range(len(table.batches)):
            table._check_segments(position)
        return table

    def to_json(self) -> dict[str, Any]:
        """Give the form of ``table.json``, version 1."""
        return _table_json.table_document(self)

    # ---- asking --------------------------------------------------------------------------------------------

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
    ) -> Pick:
        """Give the fastest choice in one state.

        Args:
            batch: Batch size. One that was not measured takes the times of the next larger measured one, and
                its own bytes.
            rate_mb_s: Uplink data rate in MB/s (10^6 bytes); 0 where nothing can be sent, infinite where
                bytes cost nothing.
            downlink_rate_mb_s: Downlink rate in MB/s; default: the link's, or else the uplink's.
            rtt_ms: Round-trip time in milliseconds; default: the link's.
            server_load: Ratio of the tail's time now to its time when measured; default 1.
            queue_ms: Wait in milliseconds before the tail starts; default 0.
            allow: Names or ids of the choices that may be taken; default: all.
            percentile: 50, the default: the medians of head and tail; 95: the 95th percentiles. Their sum is not
                the 95th percentile of T but a bound: at least 90 % of the requests keep it, however head and
                tail depend on each other. A choice whose 95th percentiles are not known is left out.

        Raises:
            UsageError: A number is NaN, negative or out of range, the batch is larger than all measured ones,
                a choice is unknown, or nothing that is allowed can answer.
        """
        given: dict[str, Any] = _NOTHING_GIVEN
        lines = None
        if (
            downlink_rate_mb_s is None
            and rtt_ms is None
            and server_load is None
            and queue_ms is None
            and allow is None
            and percentile is None
        ):
            if type(batch) is int:  # True and 1.0 would find the lines of 1
                lines = self._plain.get(batch)
        else:
            allow = None if allow is None else self._ids(allow)
            given = {
                "downlink_rate_mb_s": downlink_rate_mb_s,
                "rtt_ms": rtt_ms,
                "server_load": server_load,
                "queue_ms": queue_ms,
                "allow": allow,
                "percentile": percentile,
            }
        if lines is None:
            batch = batch_size(batch)
            lines = self._lines(batch, **given)
        rate = number("data rate", "MB/s", rate_mb_s)
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
            given=given,
            lines=lines,
            times_ms=times,
        )

    def ranking(
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
    ) -> tuple[Terms, ...]:
        """List every allowed choice with the terms of its T, the fastest first.

        Arguments and errors as in :meth:`pick`.
        """
        lines = self._lines(
            batch,
            downlink_rate_mb_s=downlink_rate_mb_s,
            rtt_ms=rtt_ms,
            server_load=server_load,
            queue_ms=queue_ms,
            allow=allow,
            percentile=percentile,
        )
        rate = number("data rate", "MB/s", rate_mb_s)
        downlink = rate if lines.downlink_rate_mb_s is None else lines.downlink_rate_mb_s
        load = 1.0 if server_load is None else float(server_load)
        queue = 0.0 if queue_ms is None else float(queue_ms)
        rtt = self.link.rtt_ms if rtt_ms is None else float(rtt_ms)
        terms = []
        for choice, row, numbers, latency_ms in zip(
            lines.choices, lines.rows, lines.numbers, evaluate(lines, rate), strict=True
        ):
            _, _, up, down, uses_server = numbers
            fixed_ms = rtt * self.link.round_trips + self.link.c0_ms + self.link.c1_ms_per_mb * (up + down)
            terms.append(
                Terms(
                    choice=choice,
                    head_ms=row.head_ms,
                    uplink_ms=_transfer_ms(up, rate, uses_server),
                    network_ms=fixed_ms if uses_server else 0.0,
                    queue_ms=queue if uses_server else 0.0,
                    tail_ms=row.tail_ms * load if uses_server else 0.0,
                    downlink_ms=_transfer_ms(down, downlink, uses_server and down > 0.0),
                    latency_ms=latency_ms,
                    uplink_bytes=row.uplink_bytes,
                    downlink_bytes=row.downlink_bytes,
                )
            )
        return tuple(sorted(terms, key=lambda item: item.latency_ms))

    def latency_ms(
        self,
        choice: str | int,
        batch: int,
        rate_mb_s: float,
        *,
        downlink_rate_mb_s: float | None = None,
        rtt_ms: float | None = None,
        server_load: float | None = None,
        queue_ms: float | None = None,
        percentile: float | None = None,
    ) -> float:
        """Give T in milliseconds of one choice, by name or id; infinite where it cannot be sent.

        Other arguments and errors as in :meth:`pick`.
        """
        lines = self._lines(
            batch,
            downlink_rate_mb_s=downlink_rate_mb_s,
            rtt_ms=rtt_ms,
            server_load=server_load,
            queue_ms=queue_ms,
            allow=[choice],
            percentile=percentile,
        )
        return evaluate(lines, number("data rate", "MB/s", rate_mb_s))[0]

    def switch_rates(
        self,
        batch: int,
        *,
        downlink_rate_mb_s: float | None = None,
        rtt_ms: float | None = None,
        server_load: float | None = None,
        queue_ms: float | None = None,
        allow: Iterable[str | int] | None = None,
        percentile: float | None = None,
    ) -> tuple[Segment, ...]:
        """Give the best choice over all data rates: where it changes, to the last bit.

        At a boundary :meth:`pick` gives the next segment's choice, at the number just below it this one's.
        Arguments and errors as in :meth:`pick`.
        """
        lines = self._lines(
            batch,
            downlink_rate_mb_s=downlink_rate_mb_s,
            rtt_ms=rtt_ms,
            server_load=server_load,
            queue_ms=queue_ms,
            allow=allow,
            percentile=percentile,
        )
        segments = switch_rates(lines)
        if not segments:
            raise UsageError(
                f"nothing that is allowed at batch {batch} ({_names(lines.choices)}) can answer at any data "
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
        """List the ids of the choices that keep the model's inputs on the device, for ``allow``."""
        return tuple(choice.id for choice in self.choices if not choice.sends_inputs)

    # ---- inside --------------------------------------------------------------------------------------------

    def _lines(
        self,
        batch: int,
        *,
        downlink_rate_mb_s: float | None = None,
        rtt_ms: float | None = None,
        server_load: float | None = None,
        queue_ms: float | None = None,
        allow: Iterable[str | int] | None = None,
        percentile: float | None = None,
    ) -> Lines:
        """Prepare the lines of one state, and keep those of the plain one."""
        batch = batch_size(batch)
        plain = (downlink_rate_mb_s, rtt_ms, server_load, queue_ms, allow, percentile) == (None,) * 6
        if plain and batch in self._plain:
            return self._plain[batch]
        rows = self._rows_at(batch)
        measured_batch = self.batches[self._position(batch)].batch
        if allow is not None:
            allowed = self._ids(allow)
            there = rows
            rows = tuple(item for item in rows if item[0].id in allowed)
            if not rows:
                raise UsageError(
                    f"none of the choices that are allowed has a row at batch {measured_batch}. "
                    f"Allow one of {_names(tuple(choice for choice, _ in there))}."
                )
        if is_p95(percentile):
            rows = tuple((choice, at_p95) for choice, row in rows if (at_p95 := row.at_p95()) is not None)
            if not rows:
                raise UsageError(
                    f"no choice that is allowed has 95th percentiles at batch {measured_batch}. "
                    "Ask for the medians, or measure again."
                )
        if downlink_rate_mb_s is None:
            downlink_rate_mb_s = self.link.downlink_rate_mb_s
        else:
            downlink_rate_mb_s = number("downlink rate", "MB/s", downlink_rate_mb_s)
        lines = make_lines(
            rows,
            measured_batch=measured_batch,
            link=self.link,
            rtt_ms=self.link.rtt_ms if rtt_ms is None else finite_number("round-trip time", "ms", rtt_ms),
            server_load=1.0 if server_load is None else finite_number("server load", "times", server_load),
            queue_ms=0.0 if queue_ms is None else finite_number("queue", "ms", queue_ms),
            downlink_rate_mb_s=downlink_rate_mb_s,
        )
        if plain and len(self._plain) < _MOST_KEPT:
            self._plain[batch] = lines
        return lines

    def _ids(self, allow: Iterable[str | int]) -> frozenset[int]:
        if isinstance(allow, str):
            raise UsageError(f"'allow' takes a collection of choices; got the text {allow!r}. Write [{allow!r}].")
        if not isinstance(allow, Iterable):
            raise UsageError(f"'allow' takes a collection of choices, by name or id; got {allow!r}.")
        return frozenset(self.choice(name).id for name in allow)

    def _position(self, batch: int) -> int:
        """Find the batch table whose times are those of ``batch``."""
        position = bisect.bisect_left(self.batches, batch, key=lambda item: item.batch)
        if position == len(self.batches):
            measured = ", ".join(str(item.batch) for item in self.batches)
            raise UsageError(
                f"batch {shown(batch)} is larger than every measured one ({measured}). "
                f"Measure it: dsc-split bench BUNDLE --batches {measured.replace(' ', '')},{shown(batch)}"
            )
        return position

    def _rows_at(self, batch: int) -> _Rows:
        """Give every choice that has a row there, with the times and the bytes of ``batch``."""
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
        if len(self._rows) < _MOST_KEPT:
            self._rows[batch] = tuple(rows)
        return tuple(rows)

    def _check_segments(self, position: int) -> None:
        """Refuse segments that the rows contradict by more than rounding."""
        table = self.batches[position]
        wrong = _table_json.segment_at_fault(table.segments, self._lines(table.batch))
        if wrong is not None:
            segment, why = wrong
            raise TableError(f"batches[{position}].segments[{segment}] contradicts the rows: {why}.")


PACKED_SUFFIX = ".dscb"
"""How the name of a packed bundle ends."""
_NOTHING_GIVEN: dict[str, Any] = {}
_MOST_KEPT = 8192
"""Batch sizes, measured or not, whose lines are kept."""


def _path_of(source: str | os.PathLike[str]) -> Path:
    """Return the path of a table's file.

    Raises:
        UsageError: It is no path, there is no such file, or it is a bundle.
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


def _names(choices: tuple[Choice, ...]) -> str:
    return ", ".join(repr(choice.name) for choice in choices)


def _transfer_ms(size_mb: float, rate_mb_s: float, sends: bool) -> float:
    if not sends:
        return 0.0
    return 1000.0 * (size_mb / rate_mb_s) if rate_mb_s > 0.0 else math.inf
