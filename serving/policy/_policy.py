"""Decide which choice runs the next request, from the times of the last ones.

The table says which choice is the fastest at a data rate, a load and a queue. The policy learns these three from its
observations, and decides when a better choice is worth the switch::

    policy = SwitchPolicy(LookupTable.load("b4/table.json"))
    decision = policy.decide(time.monotonic(), batch=8)
    ...  # run decision.choice, and give up after decision.timeout_ms
    policy.observe(Observation(time_s=time.monotonic(), choice=decision.choice, batch=8, ...))
"""

from __future__ import annotations

import math
from collections.abc import Collection

from dsc_split._support.numbers import number
from dsc_split.errors import UsageError
from dsc_split.lookup_table import Choice, LookupTable, State, Terms
from dsc_split.serving.policy._decay import decay
from dsc_split.serving.policy._estimator import RateEstimator, Sample
from dsc_split.serving.policy._numbers import MAX_BYTES, MAX_MS, milliseconds, moment
from dsc_split.serving.policy._records import Decision, Observation, PolicyParameters, Reason
from dsc_split.table._arguments import named_choices

__all__ = ["SwitchPolicy"]

_UNKNOWN_RATE_MB_S = 1e-6
"""Used if the rate is not known and something has to be sent: the choice with the fewest bytes wins."""
_LEAST_TRANSFER = 0.01
"""Smallest part of a call that counts as transfer, if server and fixed costs seem to take all of it."""
_LEAST_TRANSFER_MS = 1e-6
"""Shortest time of a transfer in milliseconds: a nanosecond."""
_MOST_LOAD = 1e6
"""The highest server load that is accepted."""
_MOST_DOUBLINGS = 30


class SwitchPolicy:
    """Decides which choice runs each request over one link; not safe to share between threads.

    Times are seconds of any clock that does not go back; a time before the last one counts as the last one. A call
    that raises changes nothing.
    """

    def __init__(
        self,
        table: LookupTable,
        parameters: PolicyParameters | None = None,
        estimator: RateEstimator | None = None,
        allow: Collection[str | int] | None = None,
    ) -> None:
        """Start with the table only.

        Args:
            table: The times and sizes of every choice.
            parameters: When to switch; default: ``PolicyParameters()``.
            estimator: Estimates the rate of the uplink, for this policy only; default: a new one, without a rate.
            allow: Names or ids of the choices that may be taken; default: all.

        Raises:
            UsageError: The table has no such choice, or is no lookup table.
        """
        if not isinstance(table, LookupTable):
            raise UsageError(f"{table!r} is no lookup table. Load it: LookupTable.load(...)")
        self._table = table
        self._parameters = parameters or PolicyParameters()
        self._estimator = estimator or RateEstimator()
        self._allow = None if allow is None else sorted({table.choice(name).id for name in named_choices(allow)})

        self._now_s = 0.0
        self._present: int | None = None  # id of the choice that is kept, if one is
        self._held_requests = 0
        self._batch = 0  # of the last decision

        self._rtt_ms: float | None = None
        self._load = 1.0
        self._queue_ms = 0.0
        self._reported_s = -math.inf  # time of the server's last report

        self._news_s = -math.inf  # when something was last sent that shows the rate
        self._probe_doublings = 0
        self._probe_bytes = self._parameters.probe_bytes
        self._probe_sent_s: float | None = None  # when the open probe was sent

        self._down = False
        self._retry_s = self._parameters.retry_s  # how long the server is left alone after the next failure
        self._retry_at_s = 0.0
        self._back_s = -math.inf  # when the server last came back

    @property
    def table(self) -> LookupTable:
        """The times and sizes of every choice."""
        return self._table

    @property
    def parameters(self) -> PolicyParameters:
        """When to switch."""
        return self._parameters

    @property
    def estimator(self) -> RateEstimator:
        """The estimator of the uplink's rate."""
        return self._estimator

    def server_load(self, time_s: float) -> float:
        """Return the estimated time of the tails at ``time_s``, divided by their time in the table.

        Raises:
            UsageError: The time is out of range.
        """
        return self._server_state(max(self._now_s, moment("time_s", time_s)))[0]

    def queue_ms(self, time_s: float) -> float:
        """Return the estimated milliseconds that a request waits on the server at ``time_s``.

        Raises:
            UsageError: The time is out of range.
        """
        return self._server_state(max(self._now_s, moment("time_s", time_s)))[1]

    def decide(self, time_s: float, batch: int) -> Decision:
        """Decide what to do with a request that arrives now.

        Raises:
            UsageError: The time is out of range, the table has no times for a batch of this size, or no allowed
                choice can answer.
        """
        now_s = max(self._now_s, moment("time_s", time_s))
        own = self._parameters
        estimate = self._estimator.estimate(now_s)
        ranking = self._ranking(now_s, batch, _UNKNOWN_RATE_MB_S if estimate is None else estimate.rate_mb_s)
        if ranking[0].latency_ms == math.inf:
            raise UsageError(
                f"nothing that is allowed at batch {batch} can answer: no choice can get its outputs back over this "
                "link, and 'no-offload' is not among them. Allow it."
            )
        local = _local(ranking)

        self._now_s = now_s
        if self._probe_sent_s is not None and now_s - self._probe_sent_s >= own.probe_timeout_s:
            self._fail_probe(self._probe_sent_s + own.probe_timeout_s, self._probe_sent_s)
        if self._down and own.probe_bytes == 0 and now_s >= self._retry_at_s:
            self._come_back(now_s)
        chosen, reason = self._choose(ranking, local, batch, known=estimate is not None)
        keep = reason in ("best", "hysteresis", "dwell")
        self._held_requests = self._held_requests + 1 if keep and chosen.choice.id == self._present else 1
        self._present = chosen.choice.id if keep else None
        self._batch = batch

        sends = chosen.choice.uses_server
        predicted_ms = math.inf if sends and estimate is None else chosen.latency_ms
        timeout_ms = self._timeout_ms(predicted_ms, local.latency_ms) if sends and local is not None else math.inf
        probe_bytes = 0
        if own.probe_bytes > 0 and any(terms.choice.uses_server for terms in ranking):
            probe_bytes = self._probe(now_s, chosen)
        return Decision(
            choice=chosen.choice,
            reason=reason,
            predicted_ms=predicted_ms,
            timeout_ms=timeout_ms,
            probe_bytes=probe_bytes,
        )

    def observe(self, observation: Observation) -> None:
        """Learn from a request that was answered, in time or late.

        Raises:
            UsageError: A number is out of range, or the table has no such choice at this batch size.
        """
        now_s = max(self._now_s, observation.time_s)
        choice = self._find_choice(observation.choice)
        rtt_ms = self._rtt_ms if observation.rtt_ms is None else observation.rtt_ms
        state = State(batch=observation.batch, rate_mb_s=math.inf, rtt_ms=rtt_ms, allow=[choice.id])
        [terms] = self._table.ranking(state)
        if not choice.uses_server:
            self._now_s = now_s
            return
        call_ms = observation.call_ms
        if call_ms <= 0.0:
            raise UsageError(f"rpc_ms of {choice.name!r} is {call_ms:g}; a call to the server took more than 0 ms.")
        patience_ms = self._patience_ms(now_s, observation.batch, choice)

        self._now_s = now_s
        self._rtt_ms = rtt_ms
        load, queue_ms = self._server_state(now_s)
        server_ms = terms.tail_ms * load + queue_ms
        if observation.server_ms is not None:
            server_ms = observation.server_ms
            self._learn(now_s, terms.tail_ms, server_ms, observation.queue_ms, most_ms=patience_ms)
        if observation.latency_ms > patience_ms:
            self._fail(now_s, observation.time_s - observation.latency_ms / 1000.0)
            return
        if self._down:
            self._come_back(now_s)
        self._retry_s = self._parameters.retry_s
        self._add_sample(now_s, terms, call_ms, server_ms, observation.window_limited)

    def failed(self, time_s: float, choice: Choice | str | int, *, started_s: float | None = None) -> None:
        """Learn that a request was given up: a missed deadline, a refused connection, ``UNAVAILABLE``.

        Args:
            time_s: When it was given up.
            choice: The choice that ran it.
            started_s: When it was started. If that was before the server came back, it is ignored; default: after.

        Raises:
            UsageError: The time is out of range, the table has no such choice, or it does not use the server.
        """
        now_s = max(self._now_s, moment("time_s", time_s))
        began_s = now_s if started_s is None else moment("started_s", started_s)
        found = self._find_choice(choice)
        if not found.uses_server:
            raise UsageError(f"{found.name!r} does not use the server; only choices that do can fail for it.")
        self._now_s = now_s
        self._fail(now_s, began_s)

    def probed(
        self,
        time_s: float,
        size_bytes: int,
        transfer_ms: float,
        *,
        rtt_ms: float | None = None,
        window_limited: bool = False,
    ) -> Sample:
        """Learn from a probe that the server answered; arguments and result as of :meth:`RateEstimator.add`.

        If no probe is open, it is only a sample of the rate. ``transfer_ms`` is 0 or less if the round trip was longer
        than the probe; the transfer then counts as a nanosecond.

        Raises:
            UsageError: A number is out of range.
        """
        now_s = max(self._now_s, moment("time_s", time_s))
        transfer_ms = max(number("transfer_ms", transfer_ms, least=-MAX_MS, most=MAX_MS, unit="ms"), _LEAST_TRANSFER_MS)
        rtt = self._rtt_ms if rtt_ms is None else milliseconds("rtt_ms", rtt_ms)
        known_rtt = self._table.link.rtt_ms if rtt is None else rtt
        sample = self._estimator.add(
            now_s, size_bytes, transfer_ms, rtt_ms=min(known_rtt, MAX_MS), window_limited=window_limited
        )
        self._now_s = now_s
        if self._probe_sent_s is None:
            return sample
        self._probe_sent_s = None
        self._rtt_ms = rtt
        if sample in ("too-small", "window-limited"):
            self._probe_bytes = min(2 * self._probe_bytes, max(self._parameters.max_probe_bytes, self._probe_bytes))
        if self._down:
            self._come_back(now_s)
        elif sample in ("surprise", "reset"):
            self._probe_doublings = 0
        elif self._probe_interval_s() < self._parameters.max_probe_interval_s:
            self._probe_doublings = min(self._probe_doublings + 1, _MOST_DOUBLINGS)
        return sample

    def probe_failed(self, time_s: float) -> None:
        """Learn that a probe was not answered; if none is open, nothing changes.

        Raises:
            UsageError: The time is out of range.
        """
        self._now_s = max(self._now_s, moment("time_s", time_s))
        if self._probe_sent_s is not None:
            self._fail_probe(self._now_s, self._probe_sent_s)

    def restart(self) -> None:
        """Forget what is known about the network: the device has joined another one.

        The old rate is used until the first sample; a probe is due with the next decision.
        """
        self._estimator.restart()
        self._rtt_ms = None
        self._news_s = -math.inf
        self._probe_doublings = 0
        self._probe_sent_s = None
        self._retry_at_s = 0.0
        self._retry_s = self._parameters.retry_s

    # ---- deciding ------------------------------------------------------------------------------------------

    def _ranking(self, now_s: float, batch: int, rate_mb_s: float) -> tuple[Terms, ...]:
        load, queue_ms = self._server_state(now_s)
        return self._table.ranking(
            State(
                batch=batch,
                rate_mb_s=rate_mb_s,
                rtt_ms=self._rtt_ms,
                server_load=load,
                queue_ms=queue_ms,
                allow=self._allow,
                percentile=self._parameters.percentile,
            )
        )

    def _choose(
        self, ranking: tuple[Terms, ...], local: Terms | None, batch: int, *, known: bool
    ) -> tuple[Terms, Reason]:
        own = self._parameters
        if self._down and local is not None:
            return local, "server-down"
        best = ranking[0]
        if not known:
            return (best if local is None else local), "unknown-rate"
        present = next((terms for terms in ranking if terms.choice.id == self._present), best)
        if present is best:
            return best, "best"
        if not best.latency_ms < present.latency_ms * (1.0 - own.hysteresis) - own.switch_cost_ms:
            return present, "hysteresis"
        if batch == self._batch and self._held_requests < own.dwell_requests and present.latency_ms < math.inf:
            return present, "dwell"
        return best, "best"

    def _timeout_ms(self, predicted_ms: float, local_ms: float) -> float:
        own = self._parameters
        if own.deadline_ms is not None and predicted_ms <= own.deadline_ms:
            return own.deadline_ms
        return max(own.deadline_factor * predicted_ms, local_ms)

    # ---- probing -------------------------------------------------------------------------------------------

    def _probe(self, now_s: float, chosen: Terms) -> int:
        """Return the size of the probe that is due now; 0 if none is."""
        if self._down:
            due = now_s >= self._retry_at_s
        elif chosen.uplink_bytes >= self._estimator.parameters.min_bytes:
            self._probe_doublings = 0
            due = False
        else:
            due = now_s - self._news_s >= self._probe_interval_s()
        if not due or self._probe_sent_s is not None:
            return 0
        self._news_s = self._probe_sent_s = now_s
        return self._probe_bytes

    def _probe_interval_s(self) -> float:
        own = self._parameters
        most_s = max(own.probe_interval_s, own.max_probe_interval_s)
        return min(own.probe_interval_s * 2.0**self._probe_doublings, most_s)

    # ---- learning ------------------------------------------------------------------------------------------

    def _find_choice(self, choice: Choice | str | int) -> Choice:
        return self._table.choice(choice.id if isinstance(choice, Choice) else choice)

    def _server_state(self, now_s: float) -> tuple[float, float]:
        """Return load and queue in milliseconds; both decay until the next report."""
        left = decay((now_s - self._reported_s) / self._parameters.server_half_life_s)
        return 1.0 + (self._load - 1.0) * left, self._queue_ms * left

    def _learn(self, now_s: float, tail_ms: float, server_ms: float, queue_ms: float | None, *, most_ms: float) -> None:
        """Learn load and queue from what the server reported, at most ``most_ms`` of tail and of queue.

        Time in the queue is the same for every tail; the rest is proportional to the time of the tail.
        """
        weight = self._parameters.server_weight
        self._load, self._queue_ms = self._server_state(now_s)
        self._reported_s = now_s
        if queue_ms is None:
            queue_ms = max(0.0, server_ms - tail_ms * self._load)
        elif tail_ms > 0.0:
            seen = min(min(server_ms - queue_ms, most_ms) / tail_ms, _MOST_LOAD)
            self._load += weight * (seen - self._load)
        self._queue_ms += weight * (min(queue_ms, most_ms) - self._queue_ms)

    def _add_sample(self, now_s: float, terms: Terms, call_ms: float, server_ms: float, window_limited: bool) -> None:
        """Add the time that the transfer took of a call to the estimator."""
        link = self._table.link
        size_bytes = terms.uplink_bytes
        if link.count_downlink and link.downlink_rate_mb_s is None:
            size_bytes += terms.downlink_bytes
        transfer_ms = call_ms - server_ms - terms.network_ms - terms.downlink_ms
        transfer_ms = max(transfer_ms, _LEAST_TRANSFER * call_ms, _LEAST_TRANSFER_MS)
        rtt_ms = link.rtt_ms if self._rtt_ms is None else self._rtt_ms
        sample = self._estimator.add(
            now_s,
            min(size_bytes, MAX_BYTES),
            transfer_ms,
            rtt_ms=min(rtt_ms, MAX_MS),
            window_limited=window_limited,
        )
        if sample in ("taken", "surprise", "reset"):
            self._news_s = now_s

    def _patience_ms(self, now_s: float, batch: int, choice: Choice) -> float:
        """Return the timeout that a request would get now; infinite if no choice without the server is allowed."""
        estimate = self._estimator.estimate(now_s)
        if estimate is None:
            return math.inf
        ranking = self._ranking(now_s, batch, estimate.rate_mb_s)
        local = _local(ranking)
        terms = next((terms for terms in ranking if terms.choice.id == choice.id), None)
        if terms is None or local is None:
            return math.inf
        return self._timeout_ms(terms.latency_ms, local.latency_ms)

    # ---- failing and coming back ---------------------------------------------------------------------------

    def _fail(self, time_s: float, started_s: float) -> None:
        """Stop using the server; ignore a request that was started before the server came back."""
        if self._down or started_s < self._back_s:
            return
        self._down = True
        self._probe_bytes = self._parameters.probe_bytes
        self._estimator.restart()
        self._postpone_retry(time_s)

    def _fail_probe(self, time_s: float, sent_s: float) -> None:
        self._probe_sent_s = None
        if self._down:
            self._postpone_retry(time_s)
        else:
            self._fail(time_s, sent_s)

    def _postpone_retry(self, time_s: float) -> None:
        """Set the time of the next retry, and double the wait before the one after it."""
        self._retry_at_s = time_s + self._retry_s
        self._retry_s = min(2.0 * self._retry_s, self._parameters.max_retry_s)

    def _come_back(self, now_s: float) -> None:
        self._down = False
        self._back_s = now_s
        self._probe_doublings = 0


def _local(ranking: tuple[Terms, ...]) -> Terms | None:
    return next((terms for terms in ranking if not terms.choice.uses_server), None)
