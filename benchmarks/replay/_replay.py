"""Replay a scenario through a lookup table, with the ideal choice, every static choice, and a policy.

Every request is judged alone, as in the paper's Eq. 7: its latency is the table's T in the state at its start.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from dsc_split._support.numbers import number
from dsc_split._support.progress import Progress, ProgressListener, silent
from dsc_split.benchmarks.replay._delayed import DelayedIdeal
from dsc_split.benchmarks.replay._device import Device, PolicyUnderTest
from dsc_split.benchmarks.replay._scenario import Scenario
from dsc_split.benchmarks.replay._statistics import Method
from dsc_split.errors import UsageError
from dsc_split.lookup_table import Choice, LookupTable, State, Terms

__all__ = ["MAX_REQUESTS", "Replay", "Request", "list_requests", "replay"]

MAX_REQUESTS = 1_000_000
"""A replay of more requests is refused."""
_REQUESTS_PER_STEP = 2000
"""Requests between two reports of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of the device."""

    time_s: float
    """When it starts, in seconds."""
    lasts_s: float
    """Seconds until the next one starts, or the scenario ends: its weight in shares of time."""
    since_s: float
    """When its state began, in seconds."""
    state: State
    """The state when it starts."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The latencies of every method over the same requests."""

    scenario: Scenario
    """The scenario that was replayed."""
    table: LookupTable
    """The table that it was replayed through."""
    requests: tuple[Request, ...]
    """By time; never empty."""
    period_ms: float | None
    """Milliseconds between requests; ``None``: one request per state."""
    percentile: float | None
    """Percentile of the table's times; ``None``: medians."""
    noise: float
    """Standard deviation of the logarithm of the noise on the policy's measurements."""
    seed: int
    """Seed of the noise."""
    ideal: Method
    """The table's best choice in the true state."""
    policy: Method | None
    """The policy's choices; ``None`` if no policy was replayed."""
    delayed: Method | None
    """The best choice in the state of the last finished request; ``None`` if no policy was replayed."""
    statics: tuple[Method, ...]
    """One method for each allowed choice, which always takes it; by id."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """All methods: the ideal, the policy and the delayed ideal if they are there, the static ones."""
        learning = [method for method in (self.policy, self.delayed) if method is not None]
        return (self.ideal, *learning, *self.statics)


def list_requests(scenario: Scenario, period_ms: float | None = None) -> tuple[Request, ...]:
    """List the requests of a scenario.

    Args:
        scenario: The states.
        period_ms: Milliseconds from one request to the next, the first one at the first state; ``None``: one
            request at the start of each state.

    Raises:
        UsageError: The period is not a number above 0, or there would be too many requests.
    """
    states = scenario.states
    if period_ms is None:
        ends_s = [*(timed.time_s for timed in states[1:]), scenario.end_s]
        return tuple(
            Request(time_s=timed.time_s, lasts_s=end_s - timed.time_s, since_s=timed.time_s, state=timed.state)
            for timed, end_s in zip(states, ends_s, strict=True)
        )
    number("period", period_ms, above=0.0, most=sys.float_info.max, unit="ms")
    start_s = states[0].time_s
    periods = (scenario.end_s - start_s) * 1000 / period_ms - 1e-9
    if periods > MAX_REQUESTS:
        raise UsageError(
            f"a request every {period_ms:g} ms makes too many in {scenario.end_s - start_s:g} s; at most "
            f"{MAX_REQUESTS} are replayed. Take a longer period, or a part of the scenario."
        )
    times_s = [start_s + i * period_ms / 1000 for i in range(max(1, math.ceil(periods)))]
    requests = []
    position = 0
    for time_s, next_s in itertools.pairwise([*times_s, scenario.end_s]):
        while position + 1 < len(states) and states[position + 1].time_s <= time_s:
            position += 1
        timed = states[position]
        requests.append(Request(time_s=time_s, lasts_s=next_s - time_s, since_s=timed.time_s, state=timed.state))
    return tuple(requests)


def replay(
    table: LookupTable,
    scenario: Scenario,
    *,
    period_ms: float | None = None,
    allow: Collection[str | int] | None = None,
    percentile: float | None = None,
    policy: PolicyUnderTest | None = None,
    noise: float = 0.0,
    seed: int = 0,
    progress: ProgressListener = silent,
) -> Replay:
    """Replay a scenario.

    Args:
        table: The terms of T.
        scenario: The states over time.
        period_ms: As in :func:`list_requests`.
        allow: Names or ids of the allowed choices, put into every state; default: all.
        percentile: 50 or 95, put into every state; default: the medians.
        policy: A new policy to replay, or ``None``.
        noise: The policy's measurements are multiplied by factors of mean 1; this is the standard deviation of their
            logarithm.
        seed: Seed of the noise.
        progress: Listener.

    Raises:
        UsageError: A number is out of range, or the table has no answer for a batch size; the message names the time.
    """
    number("noise", noise, most=3.0)
    allowed = {table.choice(item).id for item in (allow if allow is not None else [c.id for c in table.choices])}
    choices = [choice for choice in table.choices if choice.id in allowed]
    mask = None if allow is None else sorted(allowed)
    scenario = replace(
        scenario,
        states=tuple(
            replace(timed, state=replace(timed.state, allow=mask, percentile=percentile)) for timed in scenario.states
        ),
    )
    requests = list_requests(scenario, period_ms)
    late = DelayedIdeal(table, requests[0].state)
    devices = []
    if policy is not None:
        devices = [
            Device("policy", policy, table.link, noise=noise, seed=seed),
            Device("delayed", late.under_test(), table.link),
        ]
    ideal_choices: list[Choice | None] = []
    ideal_ms: list[float] = []
    static_ms: dict[int, list[float]] = {choice.id: [] for choice in choices}
    judged = _rank_choices(table, requests)
    measured = (
        _rank_choices(table, requests, medians=True) if devices and percentile is not None else itertools.repeat(None)
    )
    for count, (request, ranking, medians) in enumerate(zip(requests, judged, measured, strict=False)):
        if count % _REQUESTS_PER_STEP == 0:
            progress(
                Progress(stage="replay", label=f"{request.time_s:g} s", done=count, total=len(requests)),
            )
        best = next(iter(ranking.values()))
        ideal_choices.append(best.choice if math.isfinite(best.latency_ms) else None)
        ideal_ms.append(best.latency_ms)
        for choice in choices:
            terms = ranking.get(choice.id)
            static_ms[choice.id].append(math.nan if terms is None else terms.latency_ms)
        late.begin(request.state, tuple(ranking.values()))
        for device in devices:
            device.run(request.time_s, request.state, ranking, medians or ranking)
    progress(Progress(stage="replay", label="done", done=len(requests), total=len(requests)))
    return Replay(
        scenario=scenario,
        table=table,
        requests=requests,
        period_ms=period_ms,
        percentile=percentile,
        noise=noise,
        seed=seed,
        ideal=Method.of("ideal", ideal_choices, ideal_ms),
        policy=devices[0].method() if devices else None,
        delayed=devices[1].method() if devices else None,
        statics=tuple(
            Method.of(choice.name, [choice] * len(requests), static_ms[choice.id], static=True) for choice in choices
        ),
    )


def _rank_choices(
    table: LookupTable, requests: Sequence[Request], *, medians: bool = False
) -> Iterator[dict[int, Terms]]:
    """Yield, for every request, the terms of every choice in its state by id, the best one first.

    Args:
        table: The terms of T.
        requests: By time.
        medians: Whether to take the medians, even if the states ask for another percentile.
    """
    state: State | None = None
    by_id: dict[int, Terms] = {}
    for request in requests:
        if request.state is not state:
            state = request.state
            try:
                ranking = table.ranking(replace(state, percentile=None) if medians else state)
            except UsageError as e:
                raise UsageError(f"the state at {request.since_s:g} s: {e}") from e
            by_id = {terms.choice.id: terms for terms in ranking}
        yield by_id
