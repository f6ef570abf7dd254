"""Statistics of a replay: the latencies of a method, and the gain of one method over another."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dsc_split._support.numbers import finite_or_none
from dsc_split.benchmarks.sweep._statistics import percentile
from dsc_split.lookup_table import Choice

__all__ = ["Excess", "Method", "Summary", "excess", "gain", "mean", "summarise_method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """The choices and latencies of one way of choosing, request by request."""

    name: str
    """``ideal``, ``policy``, ``delayed``, or a choice's name."""
    static: bool = False
    """Whether it always takes the same choice."""
    choices: tuple[Choice | None, ...]
    """What was chosen; ``None`` if no allowed choice could answer."""
    latencies_ms: tuple[float, ...]
    """T in milliseconds; infinite if the answer never comes, NaN if the choice has no row at the batch size."""
    reasons: tuple[str, ...] = ()
    """The policy's reason for each choice; empty for other methods."""
    fallbacks: tuple[bool, ...] = ()
    """Whether the answer missed its timeout and the batch then ran on the device; empty for other methods."""
    probes: int = 0
    """Number of probes sent."""
    probe_bytes: int = 0
    """Total bytes of the probes."""

    @classmethod
    def of(
        cls, name: str, choices: Sequence[Choice | None], latencies_ms: Sequence[float], *, static: bool = False
    ) -> Method:
        """Make the record of a method other than a policy."""
        return cls(name=name, static=static, choices=tuple(choices), latencies_ms=tuple(latencies_ms))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The statistics of one method; a latency is infinite if it includes an answer that never comes."""

    answerable: int
    """Requests at batch sizes for which the method has times; the latencies below are of these."""
    mean_ms: float
    """Mean latency; like the next three, NaN if no request is answerable."""
    p50_ms: float
    """Median latency."""
    p95_ms: float
    """95th percentile."""
    p99_ms: float
    """99th percentile."""
    never: int
    """Requests whose answer never comes."""
    missed: int | None
    """Requests that took longer than the deadline; ``None`` without a deadline."""
    switches: int
    """How often the choice differs from that of the request before."""
    shares: dict[str, float]
    """Share of time of each choice by name, largest first; ``none`` stands for no choice."""
    fallbacks: int
    """Requests that missed their timeout and then ran on the device."""
    probes: int
    """Number of probes sent."""
    probe_bytes: int
    """Total bytes of the probes."""


@dataclass(frozen=True, kw_only=True)
class Excess:
    """How much longer a method took than the ideal, over the requests that the ideal answers."""

    of_mean: float
    """Its mean latency divided by the ideal's, minus 1."""
    mean: float
    """Mean over the requests of ``(T - T_ideal) / T_ideal``."""

    def to_json(self) -> dict[str, object]:
        """Return plain data."""
        return {"of_mean": finite_or_none(self.of_mean), "mean": finite_or_none(self.mean)}


def mean(values: Sequence[float]) -> float:
    """Return the mean, even if the sum is too large for a float; NaN for no values."""
    if not values:
        return math.nan
    try:
        return statistics.fmean(values)
    except OverflowError:
        return 2.0 * math.fsum(value / (2 * len(values)) for value in values)


def summarise_method(method: Method, lasting_s: Sequence[float], deadline_ms: float | None = None) -> Summary:
    """Summarise a method.

    Args:
        method: The method.
        lasting_s: Seconds that each request lasts: its weight in shares of time.
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
    """Return the gain G of a method over a static one, Eq. 7, with its sign.

    It is the mean over the requests of ``(T_static - T) / T_static``. The paper takes the absolute value. For the
    ideal that is the same, since it is never slower than a static choice. A policy can be slower, and then the term is
    negative. If the static choice's answer never comes, the term is 1, its limit; if neither answer comes, 0.

    Returns:
        The gain; minus infinity if only the method has an answer that never comes, NaN if the static choice has no
        row at any of the batch sizes.
    """
    terms = [
        _saved_share(latency_ms, static_ms)
        for latency_ms, static_ms in zip(method.latencies_ms, static.latencies_ms, strict=True)
        if not math.isnan(static_ms)
    ]
    return mean(terms)


def excess(method: Method, ideal: Method) -> Excess:
    """Compare a method with the ideal, over the requests that the ideal answers and that the method has times for."""
    pairs = [
        (latency_ms, ideal_ms)
        for latency_ms, ideal_ms in zip(method.latencies_ms, ideal.latencies_ms, strict=True)
        if ideal_ms < math.inf and not math.isnan(latency_ms)
    ]
    if not pairs:
        return Excess(of_mean=math.nan, mean=math.nan)
    method_ms, all_ideal_ms = (mean(times_ms) for times_ms in zip(*pairs, strict=True))
    return Excess(
        of_mean=0.0 - _saved_share(method_ms, all_ideal_ms),
        mean=0.0 - mean([_saved_share(latency_ms, ideal_ms) for latency_ms, ideal_ms in pairs]),
    )


def _saved_share(latency_ms: float, reference_ms: float) -> float:
    """Return the share of a reference that is saved: ``(reference - latency) / reference``."""
    if latency_ms == reference_ms:
        return 0.0
    if reference_ms == math.inf:
        return 1.0
    return (reference_ms - latency_ms) / reference_ms if reference_ms > 0.0 else -math.inf


def _percentile(ordered: Sequence[float], share: float) -> float:
    """Return a percentile of sorted values, of which the last may be infinite; NaN for no values."""
    if not ordered:
        return math.nan
    position = share * (len(ordered) - 1)
    reached = ordered[math.ceil(position)]
    return reached if position.is_integer() or reached == math.inf else percentile(ordered, share)
