"""Numbers of a replay: the distribution of a method's latency, and the gain of one method over another."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsc_split._support.numbers import finite_or_none
from dsc_split.benchmarks.sweep._statistics import percentile
from dsc_split.lookup_table import Choice

__all__ = ["Excess", "Method", "Summary", "excess", "gain", "mean", "summarise_method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What one way of choosing took, request by request."""

    name: str
    """``ideal``, ``policy``, ``delayed``, or a choice's name."""
    static: bool = False
    """Whether it is one choice, always."""
    choices: tuple[Choice | None, ...]
    """What was chosen; ``None`` where nothing that is allowed could answer."""
    latencies_ms: tuple[float, ...]
    """T in milliseconds; infinite where the answer never comes, NaN where the choice has no row at the batch."""
    reasons: tuple[str, ...] = ()
    """Why the policy chose so, in its own word; empty for the other methods."""
    fallbacks: tuple[bool, ...] = ()
    """Whether the policy waited in vain and then ran the batch on the device; empty for the other methods."""
    probes: int = 0
    """Probes that were sent."""
    probe_bytes: int = 0
    """Their bytes in all."""

    @classmethod
    def of(
        cls, name: str, choices: Sequence[Choice | None], latencies_ms: Sequence[float], *, static: bool = False
    ) -> Method:
        """Make the record of a method that is no policy."""
        return cls(name=name, static=static, choices=tuple(choices), latencies_ms=tuple(latencies_ms))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers of one method; those of latency are infinite where an answer that never comes is among them."""

    answerable: int
    """Requests at whose batch size the method has times; all others are left out below."""
    mean_ms: float
    """Mean latency; NaN where no request is answerable, as the next three."""
    p50_ms: float
    """Median latency."""
    p95_ms: float
    """95th percentile."""
    p99_ms: float
    """99th percentile."""
    never: int
    """Requests whose answer never comes."""
    missed: int | None
    """Requests that took longer than the deadline; ``None`` without one."""
    switches: int
    """How often the choice was another one than for the request before."""
    shares: dict[str, float]
    """Share of time of each choice by name, largest first; ``none`` where nothing could answer."""
    fallbacks: int
    """Requests that waited in vain and were then run on the device."""
    probes: int
    """Probes that were sent."""
    probe_bytes: int
    """Their bytes in all."""


@dataclass(frozen=True, kw_only=True)
class Excess:
    """How much longer a method took than the ideal, over the requests that the ideal answers."""

    of_mean: float
    """Its mean latency over the ideal's, less 1."""
    mean: float
    """Mean over the requests of ``(T - T_ideal) / T_ideal``."""

    def to_json(self) -> dict[str, Any]:
        """Give plain data."""
        return {"of_mean": finite_or_none(self.of_mean), "mean": finite_or_none(self.mean)}


def mean(values: Sequence[float]) -> float:
    """Average numbers whose sum may be beyond binary64; NaN of none."""
    if not values:
        return math.nan
    try:
        return statistics.fmean(values)
    except OverflowError:
        return 2.0 * math.fsum(value / (2 * len(values)) for value in values)


def summarise_method(method: Method, lasting_s: Sequence[float], deadline_ms: float | None = None) -> Summary:
    """Summarise a method.

    Args:
        method: What it took.
        lasting_s: What each request weighs in shares of time, in seconds.
        deadline_ms: Requests that take longer count as missed.
    """
    known = sorted(latency_ms for latency_ms in method.latencies_ms if not math.isnan(latency_ms))
    weights: dict[str, float] = {}
    for choice, lasts_s in zip(method.choices, lasting_s, strict=True):
        name = "none" if choice is None else choice.name
        weights[name] = weights.get(name, 0.0) + lasts_s
    total_s = math.fsum(lasting_s)
    return Summary(
        answerable=len(known),
        mean_ms=mean(known),
        p50_ms=_percentile(known, 0.50),
        p95_ms=_percentile(known, 0.95),
        p99_ms=_percentile(known, 0.99),
        never=sum(latency_ms == math.inf for latency_ms in known),
        missed=None if deadline_ms is None else sum(latency_ms > deadline_ms for latency_ms in known),
        switches=sum(before != after for before, after in itertools.pairwise(method.choices)),
        shares={name: weights[name] / total_s for name in sorted(weights, key=lambda name: -weights[name])},
        fallbacks=sum(method.fallbacks),
        probes=method.probes,
        probe_bytes=method.probe_bytes,
    )


def gain(method: Method, static: Method) -> float:
    """Give the gain G of a method over a static one, Eq. 7, with its sign.

    It is the mean over the requests of ``(T_static - T) / T_static``. The paper takes the absolute value, which is
    the same for the ideal, never slower than a static choice; a policy may be slower, and then the term is negative.
    Where the static choice's answer never comes, the term is 1, its limit; where that of neither comes, 0.

    Returns:
        The gain; minus infinity where the method alone has an answer that never comes, NaN where the static
        choice has no row at any of the batch sizes.
    """
    terms = [
        _saved(latency_ms, static_ms)
        for latency_ms, static_ms in zip(method.latencies_ms, static.latencies_ms, strict=True)
        if not math.isnan(static_ms)
    ]
    return mean(terms)


def excess(method: Method, ideal: Method) -> Excess:
    """Compare a method with the ideal, over the requests that the ideal answers and the method has times for."""
    pairs = [
        (latency_ms, ideal_ms)
        for latency_ms, ideal_ms in zip(method.latencies_ms, ideal.latencies_ms, strict=True)
        if ideal_ms < math.inf and not math.isnan(latency_ms)
    ]
    if not pairs:
        return Excess(of_mean=math.nan, mean=math.nan)
    method_ms, all_ideal_ms = (mean(times_ms) for times_ms in zip(*pairs, strict=True))
    return Excess(
        of_mean=0.0 - _saved(method_ms, all_ideal_ms),
        mean=0.0 - mean([_saved(latency_ms, ideal_ms) for latency_ms, ideal_ms in pairs]),
    )


def _saved(latency_ms: float, reference_ms: float) -> float:
    """Give the share of a reference that is saved."""
    if latency_ms == reference_ms:
        return 0.0
    if reference_ms == math.inf:
        return 1.0
    return (reference_ms - latency_ms) / reference_ms if reference_ms > 0.0 else -math.inf


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Interpolate between sorted values of which the last ones may be infinite; NaN of none."""
    if not ordered:
        return math.nan
    position = share * (len(ordered) - 1)
    reached = ordered[math.ceil(position)]
    return reached if position.is_integer() or reached == math.inf else percentile(ordered, share)
