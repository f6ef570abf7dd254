"""The parameters, decisions and observations of the switching policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsc_split._support.numbers import number, store_checked
from dsc_split.errors import UsageError
from dsc_split.lookup_table import Choice
from dsc_split.serving.policy._numbers import milliseconds, moment, whole

__all__ = ["Decision", "Observation", "PolicyParameters", "Reason"]

Reason = Literal["best", "hysteresis", "dwell", "unknown-rate", "server-down"]
"""Why a choice was taken; see :class:`Decision`."""


@dataclass(frozen=True, kw_only=True)
class PolicyParameters:
    """When to switch, and when to probe."""

    hysteresis: float = 0.05
    """Part of the present choice's T that the best one must save: less is noise, and would switch at every request."""
    switch_cost_ms: float = 0.0
    """Milliseconds that the best choice must save beyond that: the cost of a switch if engines have to be loaded."""
    dwell_requests: int = 2
    """Smallest number of requests for which a choice is kept while the batch size stays: no switch back at once."""
    probe_bytes: int = 131072
    """Bytes of a probe: enough for a sample at any rate. 0: no probes; the policy then cannot learn that the link came
    back."""
    max_probe_bytes: int = 1048576
    """After a probe that gave no rate, the size doubles up to this: on long links TCP opens its window slowly."""
    probe_interval_s: float = 2.0
    """Seconds without a sample after which a probe is due: a wrong choice for longer costs more than a few probes."""
    max_probe_interval_s: float = 10.0
    """The interval doubles with every probe that brings nothing new, up to these seconds."""
    probe_timeout_s: float = 5.0
    """Seconds after which a probe without a report has failed; until then no other probe is due."""
    deadline_factor: float = 3.0
    """A request misses its deadline if it takes longer than the device alone, and longer than this factor times the
    predicted time. The wait has then cost at least as much as another run on the device."""
    deadline_ms: float | None = None
    """The deadline in milliseconds, above 0. ``None``: the factor, which also holds if the prediction is longer than
    the deadline."""
    retry_s: float = 1.0
    """Seconds after a failure until the server is probed again."""
    max_retry_s: float = 30.0
    """``retry_s`` doubles with every further failure, up to this, until a request is answered in time."""
    server_weight: float = 0.3
    """Weight of the newest report in load and queue, also of the first: three reports together weigh two thirds."""
    server_half_life_s: float = 30.0
    """Seconds after which half of the load and queue is forgotten while the server is not used, to try it again."""
    percentile: float | None = None
    """Which times are compared: the medians (``None`` or 50), or the 95th percentiles (95)."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: A number is out of range.
        """
        store_checked(self, "hysteresis", number, most=1.0)
        store_checked(self, "switch_cost_ms", milliseconds)
        store_checked(self, "dwell_requests", whole, most=2**30, unit="requests")
        for name in ("probe_bytes", "max_probe_bytes"):
            store_checked(self, name, whole)
        for name in ("probe_interval_s", "max_probe_interval_s"):
            store_checked(self, name, number, unit="s")
        store_checked(self, "probe_timeout_s", number, least=1e-3, most=1e9, unit="s")
        store_checked(self, "deadline_factor", number, least=1.0, most=1e6)
        if self.deadline_ms is not None:
            store_checked(self, "deadline_ms", milliseconds, above_zero=True)
        for name in ("retry_s", "max_retry_s"):
            store_checked(self, name, number, most=1e9, unit="s")
        store_checked(self, "server_weight", number, most=1.0)
        store_checked(self, "server_half_life_s", number, least=1e-3, most=1e9, unit="s")
        if self.percentile is not None:
            store_checked(self, "percentile", _percentile)


def _percentile(what: str, value: float) -> int:
    taken = number(what, value)
    if taken not in (50.0, 95.0):
        raise UsageError(f"{what} {taken:g} is not in the table; None, 50 or 95 was expected.")
    return int(taken)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do with one request."""

    choice: Choice
    """The choice that runs it."""
    reason: Reason
    """``best``: it is the fastest that is allowed. ``hysteresis``: another is faster, but not by enough. ``dwell``:
    another is faster, but the last switch was too recent. ``unknown-rate``: nothing was measured yet. ``server-down``:
    it runs on the device alone, until a probe of the server succeeds."""
    predicted_ms: float
    """T in milliseconds; infinite if the choice sends something and the rate is not known."""
    timeout_ms: float
    """Milliseconds from the start of the request after which to stop waiting, call :meth:`SwitchPolicy.failed` and
    run the batch on the device; infinite if no choice without the server is allowed."""
    probe_bytes: int
    """If not 0: send that many bytes to the server beside the request, and report the result."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The times of one request."""

    time_s: float
    """When the answer arrived, in seconds of the same clock as for :meth:`SwitchPolicy.decide`."""
    choice: Choice | str | int
    """The choice that ran it, or its name or id."""
    batch: int
    """Its batch size."""
    latency_ms: float
    """Milliseconds from its start to its answer."""
    head_ms: float
    """Milliseconds of ``latency_ms`` on the device."""
    rpc_ms: float | None = None
    """Milliseconds of the call to the server; default: the rest of ``latency_ms``. 0 for no offload."""
    server_ms: float | None = None
    """Milliseconds of queue and tail, as the server reported; default: those that the policy expects."""
    queue_ms: float | None = None
    """Milliseconds of ``server_ms`` in the queue; default: not known separately."""
    rtt_ms: float | None = None
    """Round-trip time in milliseconds, for example from ``TCP_INFO``; default: the last one, or the table's."""
    window_limited: bool = False
    """Whether TCP was still opening its window, or the application sent its bytes late."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: A number is out of range.
        """
        store_checked(self, "time_s", moment)
        store_checked(self, "batch", whole, least=1, most=2**20, unit="batch sizes")
        for name in ("latency_ms", "head_ms"):
            store_checked(self, name, milliseconds)
        for name in ("rpc_ms", "server_ms", "queue_ms", "rtt_ms"):
            if getattr(self, name) is not None:
                store_checked(self, name, milliseconds)
        if self.queue_ms is not None and not (self.server_ms is not None and self.queue_ms <= self.server_ms):
            raise UsageError(
                f"queue_ms {self.queue_ms:g} is no part of server_ms {self.server_ms}; give both, or server_ms alone."
            )

    @property
    def call_ms(self) -> float:
        """Milliseconds of the call to the server, given or derived; 0 or less where there was none."""
        return self.latency_ms - self.head_ms if self.rpc_ms is None else self.rpc_ms
