"""The simulated device of a replay: it asks a policy before every request, and reports what a device would see.

An answer, a missed timeout and a probe reach the policy when they are over, never before. All times are those of the
table in the state at the request's start. A request is judged by the percentile that was asked for. The policy
measures medians, with noise if that was asked for.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol  # Any: each policy has its own record of an answer

from dsc_split.benchmarks.replay._statistics import Method
from dsc_split.errors import DscError
from dsc_split.lookup_table import Choice, Link, State, Terms

__all__ = ["PROBE_LIMIT_MS", "Device", "Policy", "PolicyDecision", "PolicyUnderTest"]

PROBE_LIMIT_MS = 5000.0
"""A probe that takes longer has failed."""
_TIMER_MS = 1e-6
"""No clock sees a shorter transfer or call."""
_LONGEST_MS = 1e9
"""A slower answer (eleven days) is never seen."""


class PolicyDecision(Protocol):
    """What a policy decides before a request."""

    @property
    def choice(self) -> Choice:
        """How to run the batch."""

    @property
    def reason(self) -> str:
        """Why, in a few words."""

    @property
    def timeout_ms(self) -> float:
        """When to stop waiting and run the batch on the device; infinite: never."""

    @property
    def probe_bytes(self) -> int:
        """Bytes to send to the server beside the request; 0: none."""


class Policy(Protocol):
    """Chooses for every request, and learns from answers, timeouts and probes."""

    def decide(self, time_s: float, batch: int) -> PolicyDecision:
        """Choose for a request that starts now."""

    def observe(self, observation: Any) -> None:
        """Learn from an answer."""

    def failed(self, time_s: float, choice: Choice, *, started_s: float | None = None) -> None:
        """Learn that an answer did not come in time."""

    def probed(self, time_s: float, size_bytes: int, transfer_ms: float, *, rtt_ms: float | None = None) -> object:
        """Learn from a probe that arrived."""

    def probe_failed(self, time_s: float) -> None:
        """Learn that a probe did not arrive."""


@dataclass(frozen=True, kw_only=True)
class PolicyUnderTest:
    """A policy, and the type of its observations."""

    policy: Policy
    """A new policy that has seen nothing yet."""
    observation: Callable[..., object]
    """Makes the record of an answer from ``time_s``, ``choice``, ``batch``, ``latency_ms``, ``head_ms``, ``rpc_ms``,
    ``server_ms``, ``queue_ms`` and ``rtt_ms``."""


class Device:
    """A device that runs one request after the other as a policy says."""

    def __init__(
        self, name: str, under_test: PolicyUnderTest, link: Link, *, noise: float = 0.0, seed: int = 0
    ) -> None:
        self._name = name
        self._policy = under_test.policy
        self._observation = under_test.observation
        self._link = link
        self._noise = noise
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._event_count = 0
        self._choices: list[Choice] = []
        self._latencies_ms: list[float] = []
        self._reasons: list[str] = []
        self._fallbacks: list[bool] = []
        self._probes = 0
        self._probe_bytes = 0

    def run(
        self, time_s: float, state: State, terms_by_id: Mapping[int, Terms], median_by_id: Mapping[int, Terms]
    ) -> None:
        """Run one request in a state that only the simulation knows.

        Args:
            time_s: When it starts, in seconds.
            state: The state at that time.
            terms_by_id: The terms that it is judged by, by the choice's id.
            median_by_id: The terms that the policy can measure, by the choice's id.
        """
        while self._events and self._events[0][0] <= time_s:
            heapq.heappop(self._events)[2]()
        decision = self._policy.decide(time_s, state.batch)
        terms = terms_by_id.get(decision.choice.id)
        if terms is None:
            raise DscError(
                f"at {time_s:g} s the {self._name} chose {decision.choice.name!r}, which is not allowed or has no row "
                f"at batch {state.batch}."
            )
        if decision.probe_bytes > 0:
            self._send_probe(time_s, state, decision.probe_bytes)
        in_time = terms.latency_ms <= decision.timeout_ms
        if in_time:
            latency_ms = terms.latency_ms
            self._report_answer(time_s, state, median_by_id[terms.choice.id])
        else:
            local_ms = [item.latency_ms for item in terms_by_id.values() if not item.choice.uses_server]
            latency_ms = decision.timeout_ms + (local_ms[0] if local_ms else math.inf)
            late_s = time_s + decision.timeout_ms / 1000
            self._schedule(late_s, lambda: self._policy.failed(late_s, terms.choice, started_s=time_s))
        self._choices.append(terms.choice)
        self._latencies_ms.append(latency_ms)
        self._reasons.append(decision.reason)
        self._fallbacks.append(not in_time)

    def method(self) -> Method:
        """Return the record of all requests."""
        return Method(
            name=self._name,
            choices=tuple(self._choices),
            latencies_ms=tuple(self._latencies_ms),
            reasons=tuple(self._reasons),
            fallbacks=tuple(self._fallbacks),
            probes=self._probes,
            probe_bytes=self._probe_bytes,
        )

    def _report_answer(self, time_s: float, state: State, terms: Terms) -> None:
        """Report an answer to the policy when it arrives, if it ever does."""
        if terms.latency_ms > _LONGEST_MS:
            return
        end_s = time_s + terms.latency_ms / 1000
        head_ms = terms.head_ms * self._noise_factor()
        link_ms = (terms.uplink_ms + terms.network_ms + terms.downlink_ms) * self._noise_factor()
        queue_ms = terms.queue_ms * self._noise_factor()
        server_ms = queue_ms + terms.tail_ms * self._noise_factor()
        remote = terms.choice.uses_server
        rpc_ms = max(_TIMER_MS, link_ms + server_ms) if remote else 0.0
        if head_ms + rpc_ms > _LONGEST_MS:
            return
        observation = self._observation(
            time_s=end_s,
            choice=terms.choice,
            batch=state.batch,
            latency_ms=head_ms + rpc_ms,
            head_ms=head_ms,
            rpc_ms=rpc_ms,
            server_ms=server_ms if remote else None,
            queue_ms=queue_ms if remote else None,
            rtt_ms=min(self._rtt_ms(state), _LONGEST_MS) if remote else None,
        )
        self._schedule(end_s, lambda: self._policy.observe(observation))

    def _send_probe(self, time_s: float, state: State, size_bytes: int) -> None:
        """Send a probe beside the request; it does not slow the request down."""
        self._probes += 1
        self._probe_bytes += size_bytes
        rate_mb_s, rtt_ms = state.rate_mb_s, self._rtt_ms(state)
        transfer_ms = 1000.0 * (size_bytes / 1e6 / rate_mb_s) if rate_mb_s > 0.0 else math.inf
        wait_ms = rtt_ms + transfer_ms
        if wait_ms > PROBE_LIMIT_MS:
            late_s = time_s + PROBE_LIMIT_MS / 1000
            self._schedule(late_s, lambda: self._policy.probe_failed(late_s))
            return
        end_s = time_s + wait_ms / 1000
        measured_ms = min(max(_TIMER_MS, transfer_ms * self._noise_factor()), _LONGEST_MS)
        self._schedule(end_s, lambda: self._policy.probed(end_s, size_bytes, measured_ms, rtt_ms=rtt_ms))

    def _rtt_ms(self, state: State) -> float:
        return self._link.rtt_ms if state.rtt_ms is None else state.rtt_ms

    def _schedule(self, time_s: float, event: Callable[[], object]) -> None:
        self._event_count += 1
        heapq.heappush(self._events, (time_s, self._event_count, event))

    def _noise_factor(self) -> float:
        """Draw a factor of mean 1."""
        if self._noise == 0.0:
            return 1.0
        return math.exp(self._random.gauss(0.0, self._noise) - self._noise * self._noise / 2)
