"""The state: the question to a lookup table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dsc_split.table._arguments import named_choices

__all__ = ["State"]


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Batch size, link, server and allowed choices when a request starts.

    ::

        state = State(batch=8, rate_mb_s=12.0, rtt_ms=20.0)
        print(table.pick(state).choice.name, table.ranking(state)[0].latency_ms)

    The methods of the table check its numbers, so a state may have values that no table can answer.

    Raises:
        UsageError: ``allow`` is a text, or no collection.
    """

    batch: int
    """Batch size, from 1. If it was not measured, the table uses the times of the next larger measured batch size, and
    the bytes of this one."""
    rate_mb_s: float = 0.0
    """Uplink data rate in MB/s (10^6 bytes per second); 0: nothing can be sent; infinite: sending takes no time."""
    downlink_rate_mb_s: float | None = None
    """Downlink rate in MB/s; ``None``: that of the table's link; if it has none, that of the uplink."""
    rtt_ms: float | None = None
    """Round-trip time in milliseconds; ``None``: that of the table's link."""
    server_load: float | None = None
    """Time of the tail now divided by its measured time; ``None``: 1."""
    queue_ms: float | None = None
    """Time in milliseconds that a request waits before the tail starts; ``None``: 0."""
    allow: Collection[str | int] | None = None
    """Names or ids of the allowed choices; ``None``: all."""
    percentile: float | None = None
    """50, or ``None``: the medians of head and tail. 95: the 95th percentiles. Their sum is not the 95th percentile of
    T but a bound: T is within it for at least 90 % of the requests, also if head and tail depend on each other. A
    choice without known 95th percentiles is left out."""

    def __post_init__(self) -> None:
        """Copy ``allow``, so that later changes of the collection have no effect."""
        if self.allow is not None:
            object.__setattr__(self, "allow", named_choices(self.allow))

    @property
    def is_plain(self) -> bool:
        """Whether only batch size and data rate are given."""
        return (
            self.downlink_rate_mb_s is None
            and self.rtt_ms is None
            and self.server_load is None
            and self.queue_ms is None
            and self.allow is None
            and self.percentile is None
        )
