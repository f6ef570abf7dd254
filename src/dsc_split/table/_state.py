"""The question to a lookup table: what holds when a request starts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from dsc_split.table._arguments import named_choices

__all__ = ["State"]


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What holds when a request starts: batch size, link, server, and what may be chosen.

    ::

        state = State(batch=8, rate_mb_s=12.0, rtt_ms=20.0)
        print(table.pick(state).choice.name, table.ranking(state)[0].latency_ms)

    Its numbers are checked by what is asked, so that a state may be made that no table can answer.

    Raises:
        UsageError: ``allow`` is one text, or no collection.
    """

    batch: int
    """Batch size, from 1. One that was not measured takes the times of the next larger measured one, and its own
    bytes."""
    rate_mb_s: float = 0.0
    """Uplink data rate in MB/s (10^6 bytes); 0 where nothing can be sent, infinite where bytes cost nothing."""
    downlink_rate_mb_s: float | None = None
    """Downlink rate in MB/s; ``None``: the link's of the table, or else the uplink's."""
    rtt_ms: float | None = None
    """Round-trip time in milliseconds; ``None``: the link's of the table."""
    server_load: float | None = None
    """Ratio of the tail's time now to its time when measured; ``None``: 1."""
    queue_ms: float | None = None
    """Wait in milliseconds before the tail starts; ``None``: 0."""
    allow: Collection[str | int] | None = None
    """Mask: names or ids of the choices that may be taken; ``None``: all."""
    percentile: float | None = None
    """50, or ``None``: the medians of head and tail. 95: the 95th percentiles. Their sum is not the 95th percentile of
    T but a bound: at least 90 % of the requests keep it, however head and tail depend on each other. A choice whose
    95th percentiles are not known is left out."""

    def __post_init__(self) -> None:
        """Keep the mask as it is now."""
        if self.allow is not None:
            object.__setattr__(self, "allow", named_choices(self.allow))

    @property
    def is_plain(self) -> bool:
        """Whether nothing but batch size and data rate is given."""
        return (
            self.downlink_rate_mb_s is None
            and self.rtt_ms is None
            and self.server_load is None
            and self.queue_ms is None
            and self.allow is None
            and self.percentile is None
        )
