"""What a lookup table is made of: plain records, as they stand in ``table.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dsc_split._support.numbers import finite_or_none

__all__ = [
    "FULL_OFFLOAD",
    "NO_OFFLOAD",
    "SPLIT",
    "BatchTable",
    "Choice",
    "Link",
    "Row",
    "Segment",
    "Side",
    "TableContent",
    "Terms",
    "half_width",
]

FULL_OFFLOAD = "full-offload"
SPLIT = "split"
NO_OFFLOAD = "no-offload"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way to run the model that the table picks from."""

    id: int
    """Number of the choice, unique in the table; among equals the lower one wins."""
    kind: str
    """``full-offload``, ``split`` or ``no-offload``."""
    name: str
    """The cut's name; for the other two kinds, the kind itself."""
    passthrough: bool = False
    """Whether the split sends an input of the model as it is, because the tail reads it too."""

    @property
    def uses_server(self) -> bool:
        """Whether anything is sent: everything but no offload."""
        return self.kind != NO_OFFLOAD

    @property
    def sends_inputs(self) -> bool:
        """Whether an input of the model leaves the device as it is."""
        return self.kind == FULL_OFFLOAD or self.passthrough


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one side was measured on."""

    target: str
    """The target that its engines were built for."""
    fingerprint: str
    """Run fingerprint: 64 hexadecimal digits over machine, library and options."""
    run_fingerprint: Mapping[str, object] | None = field(default=None, compare=False)
    """What ``fingerprint`` is the digest of: all that the times depend on; ``None`` where the table does not say."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """The cost of the network, apart from the data rate; the defaults are the paper's Eq. 4."""

    c0_ms: float = 0.0
    """Milliseconds that every request costs (serialising, framing)."""
    c1_ms_per_mb: float = 0.0
    """Milliseconds per MB (10^6 bytes) sent or received, whatever the rate."""
    rtt_ms: float = 0.0
    """Round-trip time in milliseconds."""
    round_trips: float = 1.0
    """Round trips per request."""
    count_downlink: bool = False
    """Whether the outputs' way back is counted."""
    downlink_rate_mb_s: float | None = None
    """Downlink rate in MB/s; ``None``: the same as the uplink's."""
    source: str = "paper"
    """Where these numbers are from, in words."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measured terms of one choice at one batch size."""

    choice: int
    """Id of the choice."""
    head_ms: float
    """Median time on the device in milliseconds, for the whole batch."""
    head_ci_ms: tuple[float, float] | None
    """95 % confidence interval of ``head_ms``; ``None`` where it is not known."""
    head_p95_ms: float | None
    """95th percentile on the device in milliseconds."""
    tail_ms: float
    """Median time on the server in milliseconds, for the whole batch."""
    tail_ci_ms: tuple[float, float] | None
    """95 % confidence interval of ``tail_ms``; ``None`` where it is not known."""
    tail_p95_ms: float | None
    """95th percentile on the server in milliseconds."""
    uplink_bytes: int
    """Bytes that the device sends for the whole batch."""
    downlink_bytes: int
    """Bytes of the outputs that come back for the whole batch."""
    timing_valid: bool = True
    """Whether the times were taken on what the table names; false where they must be measured again."""

    def at_p95(self) -> Row | None:
        """Put the 95th percentiles in place of the medians; ``None`` where they are not known."""
        if self.head_p95_ms is None or self.tail_p95_ms is None:
            return None
        return replace(self, head_ms=self.head_p95_ms, tail_ms=self.tail_p95_ms)

    def variance_ms2(self, server_load: float) -> float:
        """Return the squared half-width of the confidence interval of head plus tail, in ms^2."""
        head = half_width(self.head_ci_ms)
        tail = half_width(self.tail_ci_ms) * server_load
        return head * head + tail * tail


def half_width(interval: tuple[float, float] | None) -> float:
    """Return half of an interval's width; 0 where it is not known."""
    return 0.0 if interval is None else (interval[1] - interval[0]) / 2.0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A range of data rates over which one choice is the best; it begins where the one before it ends."""

    choice: int
    """Id of the choice."""
    below_rate_mb_s: float | None
    """The choice is the best below this rate in MB/s, not at it; ``None`` at the last one: without end."""


@dataclass(frozen=True, kw_only=True)
class BatchTable:
    """All rows of one measured batch size."""

    batch: int
    """Batch size."""
    rows: tuple[Row, ...]
    """One row per choice that could be measured, by ascending id; never empty."""
    segments: tuple[Segment, ...]
    """Best choice by data rate, ascending, for the table's own link, load 1, no mask."""


@dataclass(frozen=True, kw_only=True)
class TableContent:
    """All that ``table.json`` says."""

    pair_id: str
    """Identity of the pairs that were measured: ``sha256:...``."""
    precision: str
    """``fp32`` or ``fp16``."""
    emulated: str | Mapping[str, object] | None
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


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of T of one choice in one state; ``latency_ms`` is their sum."""

    choice: Choice
    """The choice."""
    head_ms: float
    """Milliseconds on the device."""
    uplink_ms: float
    """Milliseconds that the bytes need on the way up."""
    network_ms: float
    """Milliseconds of the network that no rate shortens: round trips, cost per request and per byte."""
    queue_ms: float
    """Milliseconds of waiting on the server before the tail starts."""
    tail_ms: float
    """Milliseconds on the server, at the load asked."""
    downlink_ms: float
    """Milliseconds that the outputs need on the way back, where they are counted."""
    latency_ms: float
    """T in milliseconds, evaluated in the order of the format; infinite where nothing can be sent."""
    uplink_bytes: int
    """Bytes on the way up, at the batch asked."""
    downlink_bytes: int
    """Bytes on the way back, at the batch asked, whether they are counted or not."""

    def to_json(self) -> dict[str, object]:
        """Return plain data; infinite times become ``None``."""
        return {
            "choice": self.choice.name,
            "id": self.choice.id,
            "kind": self.choice.kind,
            "latency_ms": finite_or_none(self.latency_ms),
            "head_ms": finite_or_none(self.head_ms),
            "uplink_ms": finite_or_none(self.uplink_ms),
            "network_ms": finite_or_none(self.network_ms),
            "queue_ms": finite_or_none(self.queue_ms),
            "tail_ms": finite_or_none(self.tail_ms),
            "downlink_ms": finite_or_none(self.downlink_ms),
            "uplink_bytes": self.uplink_bytes,
            "downlink_bytes": self.downlink_bytes,
        }
