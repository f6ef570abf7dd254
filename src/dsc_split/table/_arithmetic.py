"""The arithmetic of the lookup table: compute T of every choice, and the rates at which the best choice changes.

For a fixed batch size, T is a straight line in the inverse of the data rate. A :class:`Lines` holds the numbers of
these lines. All comparisons of choices use :func:`evaluate`, so that all answers agree to the last bit.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dsc_split.table._types import BatchTable, Choice, Link, Row, Segment, Terms

__all__ = [
    "Lines",
    "best_index",
    "bytes_at",
    "evaluate",
    "in_order",
    "make_lines",
    "neighbour",
    "ranking",
    "slopes",
    "switch_rates",
]

_TINY_MB_S = 1e-290
"""Lower rates are not tried, because T overflows there."""


@dataclass(frozen=True, kw_only=True)
class Lines:
    """The choices at one batch size, with one link, load and queue."""

    measured_batch: int
    """The measured batch size of the times."""
    choices: tuple[Choice, ...]
    """The choices by ascending uplink bytes, then id; of choices with equal T, the first wins."""
    rows: tuple[Row, ...]
    """One row per choice, with the bytes at the batch size of the state."""
    numbers: tuple[tuple[float, float, float, float, bool], ...]
    """Per choice: head_ms; the time of server and network that does not depend on the rate, in ms; uplink MB; downlink
    MB (0 unless the link counts them); whether it uses the server."""
    one_way: tuple[tuple[float, float, float], ...]
    """The first three of ``numbers``, which are enough where the link does not count the downlink."""
    link: Link
    """Cost of the network; ``rtt_ms`` below replaces its round-trip time."""
    rtt_ms: float
    """Round-trip time in milliseconds."""
    server_load: float
    """Time of the tail now divided by its measured time."""
    queue_ms: float
    """Time in milliseconds that a request waits before the tail starts."""
    downlink_rate_mb_s: float | None
    """Fixed downlink rate in MB/s; ``None``: the rate of the uplink."""

    def variance_ms2(self, index: int) -> float:
        """Return the squared half-width of the confidence interval of one choice's head plus tail, in ms^2."""
        return self.rows[index].variance_ms2(self.server_load)


def in_order(rows: Iterable[tuple[Choice, Row]]) -> tuple[tuple[Choice, Row], ...]:
    """Sort choices and their rows by ascending uplink bytes, then id, as :class:`Lines` requires."""
    return tuple(sorted(rows, key=lambda item: (item[1].uplink_bytes, item[0].id)))


def make_lines(
    rows: Sequence[tuple[Choice, Row]],
    *,
    measured_batch: int,
    link: Link,
    rtt_ms: float,
    server_load: float,
    queue_ms: float,
    downlink_rate_mb_s: float | None,
) -> Lines:
    """Compute the lines of ``rows``, which :func:`in_order` has sorted; sums are in the order of the format."""
    numbers = []
    for choice, row in rows:
        if not choice.uses_server:
            numbers.append((row.head_ms, 0.0, 0.0, 0.0, False))
            continue
        up_mb = row.uplink_bytes / 1e6
        down_mb = row.downlink_bytes / 1e6 if link.count_downlink else 0.0
        fixed_ms = (
            row.tail_ms * server_load
            + queue_ms
            + rtt_ms * link.round_trips
            + link.c0_ms
            + link.c1_ms_per_mb * (up_mb + down_mb)
        )
        numbers.append((row.head_ms, fixed_ms, up_mb, down_mb, True))
    return Lines(
        measured_batch=measured_batch,
        choices=tuple([choice for choice, _ in rows]),
        rows=tuple([row for _, row in rows]),
        numbers=tuple(numbers),
        one_way=tuple([number[:3] for number in numbers]),
        link=link,
        rtt_ms=rtt_ms,
        server_load=server_load,
        queue_ms=queue_ms,
        downlink_rate_mb_s=downlink_rate_mb_s,
    )


def evaluate(lines: Lines, rate_mb_s: float) -> list[float]:
    """Return T in milliseconds of every choice at ``rate_mb_s``; infinite where the bytes cannot be sent."""
    if rate_mb_s > 0.0 and not lines.link.count_downlink:
        return [head + (fixed + 1000.0 * (up / rate_mb_s)) for head, fixed, up in lines.one_way]
    downlink = lines.downlink_rate_mb_s
    if downlink is None:
        downlink = rate_mb_s
    times_ms = []
    for head, fixed, up, down, uses_server in lines.numbers:
        if not uses_server:
            times_ms.append(head)
        elif rate_mb_s == 0.0 or (down > 0.0 and downlink == 0.0):
            times_ms.append(math.inf)
        else:
            back = down / downlink if down > 0.0 else 0.0
            times_ms.append(head + (fixed + 1000.0 * (up / rate_mb_s + back)))
    return times_ms


def best_index(times_ms: list[float]) -> int:
    """Return the index of the best choice; of equal ones the first, which has fewer uplink bytes or the lower id."""
    return times_ms.index(min(times_ms))


def ranking(lines: Lines, rate_mb_s: float) -> tuple[Terms, ...]:
    """List every choice with the terms of its T at ``rate_mb_s``, the fastest first."""
    link = lines.link
    downlink = rate_mb_s if lines.downlink_rate_mb_s is None else lines.downlink_rate_mb_s
    terms = []
    for choice, row, numbers, latency_ms in zip(
        lines.choices, lines.rows, lines.numbers, evaluate(lines, rate_mb_s), strict=True
    ):
        _, _, up, down, uses_server = numbers
        network_ms = lines.rtt_ms * link.round_trips + link.c0_ms + link.c1_ms_per_mb * (up + down)
        terms.append(
            Terms(
                choice=choice,
                head_ms=row.head_ms,
                uplink_ms=_transfer_ms(up, rate_mb_s, uses_server),
                network_ms=network_ms if uses_server else 0.0,
                queue_ms=lines.queue_ms if uses_server else 0.0,
                tail_ms=row.tail_ms * lines.server_load if uses_server else 0.0,
                downlink_ms=_transfer_ms(down, downlink, uses_server and down > 0.0),
                latency_ms=latency_ms,
                uplink_bytes=row.uplink_bytes,
                downlink_bytes=row.downlink_bytes,
            )
        )
    return tuple(sorted(terms, key=lambda item: item.latency_ms))


def _transfer_ms(size_mb: float, rate_mb_s: float, sends: bool) -> float:
    if not sends:
        return 0.0
    return 1000.0 * (size_mb / rate_mb_s) if rate_mb_s > 0.0 else math.inf


def slopes(lines: Lines) -> list[float]:
    """Return the MB of every choice that are divided by the data rate: the slopes of the lines."""
    follows = lines.downlink_rate_mb_s is None
    return [up + down if follows else up for _, _, up, down, _ in lines.numbers]


def switch_rates(lines: Lines) -> tuple[Segment, ...]:
    """List the ranges of data rates in which each choice is the best: the lower envelope of the lines.

    Every boundary is exact: at this binary64 number :func:`evaluate` makes the next choice the best, at the number
    just below it the choice before. The result is empty where no choice has a finite T at any rate.
    """
    at_infinity = evaluate(lines, math.inf)
    if min(at_infinity) == math.inf:
        return ()
    slopes_mb = slopes(lines)

    def best_at(rate_bits: int) -> int:
        return best_index(evaluate(lines, _from_bits(rate_bits)))

    # At low rates the line with the smallest slope is the best. If rounding hides that, start at a lower rate.
    start = _lowest_crossing(slopes_mb, at_infinity) / 2.0
    while start > _TINY_MB_S and slopes_mb[best_at(_to_bits(start))] > min(slopes_mb):
        start /= 1024.0
    low = _to_bits(start) or 1
    high = _to_bits(sys.float_info.max)
    last = best_at(high)
    ends: list[tuple[int, int]] = []
    _bisect(best_at, low, best_at(low), high, last, ends)

    # Where three lines meet within rounding, a choice may appear twice; the segments between are removed.
    segments: list[tuple[int, float | None]] = []
    for index, bits in [*((index, bits) for index, bits in ends), (last, None)]:
        for position, (earlier, _) in enumerate(segments):
            if earlier == index:
                del segments[position:]
                break
        segments.append((index, None if bits is None else _from_bits(bits)))
    return tuple(Segment(choice=lines.choices[index].id, below_rate_mb_s=below) for index, below in segments)


def _bisect(
    best_at: Callable[[int], int],
    low: int,
    low_best: int,
    high: int,
    high_best: int,
    ends: list[tuple[int, int]],
) -> None:
    """Append (index, bits) for each change: the choice, and the first rate at which it is no longer the best."""
    while low_best != high_best:
        if high - low == 1:
            ends.append((low_best, high))
            return
        middle = (low + high) // 2
        middle_best = best_at(middle)
        if middle_best == high_best:
            high = middle
        else:
            if middle_best != low_best:
                _bisect(best_at, low, low_best, middle, middle_best, ends)
            low, low_best = middle, middle_best


def _lowest_crossing(slopes_mb: list[float], intercepts_ms: list[float]) -> float:
    """Return the lowest rate at which two lines cross, at most 1 MB/s; below it the best choice does not change."""
    lowest = 1.0
    for i, (slope, intercept) in enumerate(zip(slopes_mb, intercepts_ms, strict=True)):
        for other_slope, other_intercept in zip(slopes_mb[:i], intercepts_ms[:i], strict=True):
            gain_ms = other_intercept - intercept
            if gain_ms == 0.0 or not math.isfinite(gain_ms):
                continue
            rate = 1000.0 * (slope - other_slope) / gain_ms
            if 0.0 < rate < lowest:
                lowest = rate
    return lowest


def neighbour(batches: Sequence[BatchTable], position: int, choice: int) -> tuple[int, Row] | None:
    """Find another row of a choice: at the nearest smaller measured batch size, or else at the nearest larger.

    Args:
        batches: The measured batch sizes, ascending.
        position: Index of the batch size of the known row.
        choice: Id of the choice.

    Returns:
        The batch size and the row; ``None`` where there is no other row.
    """
    for table in (*reversed(batches[:position]), *batches[position + 1 :]):
        for row in table.rows:
            if row.choice == choice:
                return table.batch, row
    return None


def bytes_at(batch: int, *, near: tuple[int, int], other: tuple[int, int] | None) -> int:
    """Return the bytes at a batch size that was not measured.

    Bytes are a straight line in the batch size: bytes per sample, plus the bytes of tensors without a batch axis. Two
    measured batch sizes determine the line. With only one, the bytes are proportional to the batch size.

    Args:
        batch: The batch size.
        near: Batch size and bytes of the row whose times are used.
        other: Batch size and bytes of another row of the choice; ``None`` where there is none.
    """
    near_batch, near_bytes = near
    other_batch, other_bytes = other or (0, 0)
    step = (near_bytes - other_bytes) * (near_batch - batch) // (near_batch - other_batch)
    return max(0, near_bytes - step)


def _to_bits(value: float) -> int:
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def _from_bits(bits: int) -> float:
    value: float = struct.unpack("<d", struct.pack("<q", bits))[0]
    return value
