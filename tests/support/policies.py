"""A policy on the golden table, and a link and a server that answer it."""

from collections.abc import Sequence
from typing import Any

from tests.support.policy_events import GOLDEN_TABLE

from dsc_split.lookup_table import LookupTable, State
from dsc_split.serving import Decision, EstimatorParameters, Observation, PolicyParameters, RateEstimator, SwitchPolicy

# Batch 1 of the golden table: full offload 10 ms and 600 kB, a split 28 ms and 150 kB, the device alone 60 ms.
# The device alone is the best below 4.6875 MB/s, the split below 25 MB/s.
TABLE = LookupTable.load(GOLDEN_TABLE)
SPLIT = "features.4.0"
NO_PROBES = PolicyParameters(probe_bytes=0)
PROBE = PolicyParameters().probe_bytes
QUICK = EstimatorParameters(half_life_s=0.01)


def policy_at(rate_mb_s: float, parameters: PolicyParameters | None = None, **others: Any) -> SwitchPolicy:
    """Make a policy that has just measured a rate, with a transfer of 100 MB that outweighs a few requests."""
    estimator = RateEstimator(others.pop("estimator", None))
    estimator.add(0.0, 100_000_000, 1e5 / rate_mb_s)
    return SwitchPolicy(others.pop("table", TABLE), parameters, estimator, **others)


def answer(policy: SwitchPolicy, time_s: float, made: Decision, batch: int, rate_mb_s: float, **server: Any) -> float:
    """Let a request and its probe go well, at a rate, load and queue; gives the latency in ms."""
    load, queue_ms = server.pop("load", 1.0), server.pop("queue", 0.0)
    reports, noise = server.pop("reports", "nothing"), server.pop("noise", 1.0)
    [terms] = policy.table.ranking(
        State(batch=batch, rate_mb_s=rate_mb_s, server_load=load, queue_ms=queue_ms, allow=[made.choice.id])
    )
    uplink_ms = noise * terms.uplink_ms
    latency_ms: float = terms.latency_ms - terms.uplink_ms + uplink_ms
    if made.probe_bytes:
        policy.probed(time_s, made.probe_bytes, noise * made.probe_bytes / 1e3 / rate_mb_s)
    policy.observe(
        Observation(
            time_s=time_s + latency_ms / 1e3,
            choice=made.choice,
            batch=batch,
            latency_ms=latency_ms,
            head_ms=terms.head_ms,
            server_ms=None if reports == "nothing" else terms.tail_ms + terms.queue_ms,
            queue_ms=terms.queue_ms if reports == "queue" else None,
        )
    )
    return latency_ms


def drive(policy: SwitchPolicy, rates_mb_s: Sequence[float], *, start_s: float = 0.0, **server: Any) -> list[Decision]:
    """Answer a request a second, one for each rate."""
    decisions = []
    for i, rate_mb_s in enumerate(rates_mb_s):
        decisions.append(policy.decide(start_s + i, 1))
        answer(policy, start_s + i, decisions[-1], 1, rate_mb_s, **server)
    return decisions


def names(decisions: Sequence[Decision]) -> list[str]:
    return [decision.choice.name for decision in decisions]
