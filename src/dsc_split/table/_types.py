"""The records of a lookup table, in the form of ``table.json``."""

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
    """One way to run the model."""

    id: int
    """Number of the choice, unique in the table; of choices with equal T and bytes, the lowest id wins."""
    kind: str
    """``full-offload``, ``split`` or ``no-offload``."""
    name: str
    """Name of the cut; for the other two kinds, the kind."""
    passthrough: bool = False
    """Whether the split sends an input of the model unchanged, because the tail reads it, too."""

    @property
    def uses_server(self) -> bool:
        """Whether the server takes part: for every kind but ``no-offload``."""
        return self.kind != NO_OFFLOAD

    @property
    def sends_inputs(self) -> bool:
        """Whether the device sends an input of the model unchanged."""
        return self.kind == FULL_OFFLOAD or self.passthrough


@dataclass(frozen=True, kw_only=True)
class Side:
    """The target and the machine that one side was measured on."""

    target: str
    """The target of its engines."""
    fingerprint: str
    """Digest of the run fingerprint, 64 hexadecimal digits: machine, library and options."""
    run_fingerprint: Mapping[str, object] | None = field(default=None, compare=False)
    """The facts that the times depend on; ``fingerprint`` is their digest. ``None`` where the table has none."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """The cost of the network, without the data rate; the defaults are the paper's Eq. 4."""

    c0_ms: float = 0.0
    """Milliseconds per request (serialising, framing)."""
    c1_ms_per_mb: float = 0.0
    """Milliseconds per MB (10^6 bytes) sent or received, whatever the rate."""
    rtt_ms: float = 0.0
    """Round-trip time in milliseconds."""
    round_trips: float = 1.0
    """Round trips per request."""
    count_downlink: bool = False
    """Whether T includes the time to send the outputs back."""
    downlink_rate_mb_s: float | None = None
    """Downlink rate in MB/s; ``None``: the rate of the uplink."""
    source: str = "paper"
    """Description of the source of these numbers."""


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
    """Whether the times were measured on the machines that the table names; if not, they must be measured again."""

    def at_p95(self) -> Row | None:
        """Return the row with 95th percentiles instead of medians; ``None`` where they are not known."""
        if self.head_p95_ms is None or self.tail_p95_ms is None:
            return None
        return replace(self, head_ms=self.head_p95_ms, tail_ms=self.tail_p95_ms)

    def variance_ms2(self, server_load: float) -> float:
        """Return the squared half-width of the confidence interval of head plus tail, in ms^2."""
        head = half_width(self.head_ci_ms)
        tail = half_width(self.tail_ci_ms) * server_load
        return head * head + tail * tail


def half_width(interval: tuple[float, float] | None) -> float:
    """Return half of the width of an interval; 0 where it is not known."""
    return 0.0 if interval is None else (interval[1] - interval[0]) / 2.0


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A range of data rates in which one choice is the best; it starts at the end of the segment before."""

    choice: int
    """Id of the choice."""
    below_rate_mb_s: float | None
    """The choice is the best below this rate in MB/s, but not at it; ``None`` in the last segment, which has no end."""


@dataclass(frozen=True, kw_only=True)
class BatchTable:
    """All rows of one measured batch size."""

    batch: int
    """Batch size."""
    rows: tuple[Row, ...]
    """One row per measured choice, by ascending id; never empty."""
    segments: tuple[Segment, ...]
    """Best choices by ascending data rate, for the table's own link, load 1 and all choices."""


@dataclass(frozen=True, kw_only=True)
class TableContent:
    """The content of ``table.json``."""

    pair_id: str
    """Id of the measured pairs: ``sha256:...``."""
    precision: str
    """``fp32`` or ``fp16``."""
    emulated: str | Mapping[str, object] | None
    """Description of emulated times, such as a slowdown; ``None`` where every time is as measured."""
    device: Side
    """Target and machine of the heads."""
    server: Side
    """Target and machine of the tails."""
    link: Link
    """Cost of the network, without the data rate."""
    choices: tuple[Choice, ...]
    """The choices, by ascending id."""
    batches: tuple[BatchTable, ...]
    """The measured batch sizes, ascending."""
    count: str = "bytes"
    """``bytes``, or ``elements``: every element counts as one byte, as in the paper."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of T of one choice in one state; ``latency_ms`` is their sum."""

    choice: Choice
    """The choice."""
    head_ms: float
    """Milliseconds on the device."""
    uplink_ms: float
    """Milliseconds to send the bytes to the server at the uplink rate."""
    network_ms: float
    """Milliseconds of the network that do not depend on the rate: round trips, cost per request and per byte."""
    queue_ms: float
    """Milliseconds of waiting on the server before the tail starts."""
    tail_ms: float
    """Milliseconds on the server, at the load of the state."""
    downlink_ms: float
    """Milliseconds to send the outputs back at the downlink rate; 0 where the link does not count them."""
    latency_ms: float
    """T in milliseconds, computed in the order of the format; infinite where nothing can be sent."""
    uplink_bytes: int
    """Bytes that the device sends, at the batch size of the state."""
    downlink_bytes: int
    """Bytes that the server sends back, at the batch size of the state, also where the link does not count them."""

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
