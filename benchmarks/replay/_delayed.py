"""The delayed ideal: it chooses best for the newest known state, and learns a request's state when the request ends.

It is the ideal with the delay that every device has. Latency that a policy adds to it is the policy's fault. Latency
that it adds to the ideal is unavoidable, unless a policy can foresee the link.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsc_split.benchmarks.replay._device import PolicyUnderTest
from dsc_split.lookup_table import Choice, LookupTable, State, Terms

__all__ = ["PATIENCE", "DelayedIdeal"]

PATIENCE = 3.0
"""It waits this many times the expected latency, and at least as long as the device alone takes."""
_UNKNOWN_RATE_MB_S = 1e-6
"""The rate before the first request is over: so low that as little as possible is sent."""

_Known = tuple[State, Sequence[Terms]]


@dataclass(frozen=True, kw_only=True)
class _Decision:
    choice: Choice
    reason: str
    timeout_ms: float
    probe_bytes: int = 0


class DelayedIdeal:
    """A policy that learns the true state, late."""

    def __init__(self, table: LookupTable, first: State) -> None:
        """Take only the allowed choices and the percentile from the first state."""
        self._table = table
        unknown = State(batch=0, rate_mb_s=_UNKNOWN_RATE_MB_S, allow=first.allow, percentile=first.percentile)
        self._now: _Known = (unknown, ())
        self._known: _Known = self._now
        self._given_up: dict[float, _Known] = {}  # by the time of the timeout, in seconds

    def under_test(self) -> PolicyUnderTest:
        """Return the policy, whose observation of an answer is the state of the request."""
        return PolicyUnderTest(policy=self, observation=lambda **_: self._now)

    def begin(self, state: State, ranking: Sequence[Terms]) -> None:
        """Store the state of the next request, and its choices; no decision uses them before the request is over."""
        self._now = (state, ranking)

    def decide(self, time_s: float, batch: int) -> _Decision:
        """Return the best choice for the newest known state."""
        known, ranking = self._known
        if known.batch != batch:
            known = replace(known, batch=batch)
            ranking = self._table.ranking(known)
            self._known = (known, ranking)
        best = ranking[0]
        local_ms = min((terms.latency_ms for terms in ranking if not terms.choice.uses_server), default=math.inf)
        timeout_ms = max(PATIENCE * best.latency_ms, local_ms) if best.choice.uses_server else math.inf
        while self._given_up and (first_s := next(iter(self._given_up))) < time_s:
            del self._given_up[first_s]
        if timeout_ms < math.inf:
            self._given_up[time_s + timeout_ms / 1000] = self._now
        return _Decision(choice=best.choice, reason="delayed", timeout_ms=timeout_ms)

    def observe(self, observation: _Known) -> None:
        """Learn the state of a request that is over."""
        self._known = observation

    def failed(self, time_s: float, choice: Choice, *, started_s: float | None = None) -> None:
        """Learn the state of a request that was given up."""
        self._known = self._given_up[time_s]

    def probed(self, time_s: float, size_bytes: int, transfer_ms: float, *, rtt_ms: float | None = None) -> None:
        """Do nothing: it sends no probes."""

    def probe_failed(self, time_s: float) -> None:
        """Do nothing: it sends no probes."""
