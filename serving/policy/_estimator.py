"""Estimate the rate of the uplink from the times that requests and probes took.

T is a straight line in the inverse of the data rate. So the mean of T depends only on the mean of ``u = 1/rate``, in
seconds per MB, and on nothing else of the rate's distribution. The estimator keeps this mean; samples are weighted
exponentially over time, and by their bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dsc_split._support.numbers import number, store_checked
from dsc_split.serving.policy._decay import decay
from dsc_split.serving.policy._numbers import milliseconds, moment, whole

__all__ = ["EstimatorParameters", "RateEstimate", "RateEstimator", "Sample"]

Sample = Literal["taken", "too-small", "window-limited", "surprise", "reset"]
"""What happened to a sample; see :meth:`RateEstimator.add`."""

_LEAST_S_PER_MB = 1e-9
_MOST_S_PER_MB = 1e9
"""Rates below 1e-9 or above 1e9 MB/s count as these limits."""


@dataclass(frozen=True, kw_only=True)
class EstimatorParameters:
    """How the rate is estimated."""

    half_life_s: float = 1.0
    """Seconds after which a sample counts half: long enough to smooth noise, short enough to follow a cell."""
    min_bytes: int = 131072
    """Samples with fewer bytes count only if they took ``min_transfer_ms``: in a short one, latency looks like rate."""
    min_transfer_ms: float = 5.0
    """Milliseconds that a small sample must take; shorter differences come from the timer and the scheduler."""
    idle_restart_s: float = 0.2
    """Seconds without a transfer after which TCP opens its window again from the start (Linux: one retransmission
    timeout, at least 0.2 s). Infinite if ``net.ipv4.tcp_slow_start_after_idle`` is 0 and the connection is kept."""
    initial_window_bytes: int = 14480
    """Bytes that TCP sends in the first round trip: 10 segments of 1448 (RFC 6928)."""
    surprise_sigmas: float = 3.0
    """Standard deviations beyond which a sample is a surprise: of normal noise, one sample in 370 is."""
    surprise_change: float = 0.3
    """Smallest relative change of 1/rate that is a surprise: the mean follows smaller ones soon enough."""
    stale_after_s: float = 30.0
    """Seconds without a sample after which the next one starts a new mean: a mobile link has changed by then."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UsageError: A number is out of range.
        """
        store_checked(self, "half_life_s", number, least=1e-3, most=1e9, unit="s")
        store_checked(self, "min_bytes", whole)
        store_checked(self, "min_transfer_ms", milliseconds)
        store_checked(self, "idle_restart_s", number, unit="s")
        store_checked(self, "initial_window_bytes", whole, least=1)
        store_checked(self, "surprise_sigmas", number)
        store_checked(self, "surprise_change", number)
        store_checked(self, "stale_after_s", number, unit="s")


@dataclass(frozen=True, kw_only=True)
class RateEstimate:
    """The estimate of the uplink's rate at one moment."""

    rate_mb_s: float
    """Data rate in MB/s (10^6 bytes): the inverse of ``seconds_per_mb``."""
    seconds_per_mb: float
    """Mean of 1/rate in seconds per MB."""
    deviation_s_per_mb: float
    """Standard deviation of the samples around the mean, in seconds per MB; 0 after one sample."""
    age_s: float
    """Seconds since the last sample; infinite if there is only the rate that was given at the start."""
    stale: bool
    """Whether the next sample starts a new mean, because of age or :meth:`RateEstimator.restart`."""


@dataclass(frozen=True, kw_only=True)
class _Surprise:
    """A sample that did not fit, and the mean and variance that it did not fit."""

    seconds_per_mb: float
    size_mb: float
    mean_s_per_mb: float
    variance: float


class RateEstimator:
    """Estimates the mean of 1/rate of one link; not safe to share between threads.

    Times are seconds of any clock that does not go back; a time before the last one counts as the last one.
    """

    def __init__(
        self, parameters: EstimatorParameters | None = None, *, initial_rate_mb_s: float | None = None
    ) -> None:
        """Start without samples.

        Args:
            parameters: How to estimate; default: ``EstimatorParameters()``.
            initial_rate_mb_s: Rate in MB/s to use until the first sample; default: not known.

        Raises:
            UsageError: The rate is not above 0, or infinite.
        """
        self._parameters = parameters or EstimatorParameters()
        self._now_s = 0.0
        self._heard_s = -math.inf  # end of the last transfer, also of an ignored one
        self._taken_s = -math.inf  # when the estimate last changed
        self._size_mb = 0.0  # weight of the mean, at _taken_s
        self._mean: float | None = None
        self._variance = 0.0
        self._surprise: _Surprise | None = None
        self._afresh = True  # whether the next sample starts a new mean
        if initial_rate_mb_s is not None:
            rate = number("initial_rate_mb_s", initial_rate_mb_s, least=1e-9, most=1e9, unit="MB/s")
            self._mean = 1.0 / rate

    @property
    def parameters(self) -> EstimatorParameters:
        """How the rate is estimated."""
        return self._parameters

    def add(
        self,
        time_s: float,
        size_bytes: int,
        transfer_ms: float,
        *,
        rtt_ms: float | None = None,
        window_limited: bool = False,
    ) -> Sample:
        """Add the time of one transfer as a sample.

        Args:
            time_s: When it ended.
            size_bytes: Bytes sent.
            transfer_ms: Milliseconds that the bytes took, without round trip, server and fixed costs.
            rtt_ms: Round-trip time in milliseconds, from which to find out whether TCP was still opening its window;
                default: not known, and not checked.
            window_limited: Whether the caller knows from ``TCP_INFO`` that TCP was still opening its window.

        Returns:
            ``taken``: it is part of the mean. ``surprise``: it is part of the mean and far off; if the next one is as
            far off on the same side, the link has changed. ``reset``: a new mean was started, from two surprises, or
            from this sample after a long time. ``too-small``: it is ignored. ``window-limited``: it is ignored,
            because the link may be as fast as the estimate.

        Raises:
            UsageError: A number is out of range; nothing was changed.
        """
        asked_s = moment("time_s", time_s)
        size = whole("size_bytes", size_bytes)
        transfer = milliseconds("transfer_ms", transfer_ms, above_zero=True)
        rtt = 0.0 if rtt_ms is None else milliseconds("rtt_ms", rtt_ms)

        own = self._parameters
        now_s = self._now_s = max(self._now_s, asked_s)
        idle_s = now_s - self._heard_s - transfer / 1000.0
        self._heard_s = now_s
        if size == 0 or (size < own.min_bytes and transfer < own.min_transfer_ms):
            return "too-small"
        size_mb = size / 1e6
        sample = _seconds_per_mb(transfer, size_mb)
        if self._mean is None or self._is_stale(now_s):
            first = self._taken_s == -math.inf
            self._start_mean(now_s, sample, size_mb)
            return "taken" if first else "reset"
        if sample >= self._mean:
            if window_limited:
                return "window-limited"
            if idle_s > own.idle_restart_s and self._opening_ms(size, sample, rtt) >= 0.5 * transfer:
                sample = _seconds_per_mb(transfer - self._opening_ms(size, self._mean, rtt), size_mb)
                if sample <= self._mean:
                    return "window-limited"

        before, self._surprise = self._surprise, None
        if before is not None:
            far = self._surprise_side(sample, size_mb, before.mean_s_per_mb, before.variance)
            if far != 0 and (far > 0) == (before.seconds_per_mb > before.mean_s_per_mb):
                self._start_mean(now_s, before.seconds_per_mb, before.size_mb)
                self._add_to_mean(now_s, sample, size_mb)
                return "reset"
        elif self._surprise_side(sample, size_mb, self._mean, self._variance) != 0:
            self._surprise = _Surprise(
                seconds_per_mb=sample, size_mb=size_mb, mean_s_per_mb=self._mean, variance=self._variance
            )
        self._add_to_mean(now_s, sample, size_mb)
        return "taken" if self._surprise is None else "surprise"

    def restart(self) -> None:
        """Let the next sample start a new mean: the link is another one now, or was lost."""
        self._afresh = True

    def estimate(self, time_s: float) -> RateEstimate | None:
        """Return the estimate at ``time_s``; ``None`` before the first sample, unless an initial rate was given.

        Raises:
            UsageError: The time is out of range.
        """
        now_s = max(self._now_s, moment("time_s", time_s))
        if self._mean is None:
            return None
        return RateEstimate(
            rate_mb_s=1.0 / self._mean,
            seconds_per_mb=self._mean,
            deviation_s_per_mb=math.sqrt(self._variance),
            age_s=now_s - self._taken_s,
            stale=self._is_stale(now_s),
        )

    # ---- inside --------------------------------------------------------------------------------------------

    def _is_stale(self, now_s: float) -> bool:
        return self._afresh or now_s - self._taken_s > self._parameters.stale_after_s

    def _start_mean(self, now_s: float, sample: float, size_mb: float) -> None:
        self._mean, self._variance, self._size_mb = sample, 0.0, size_mb
        self._taken_s = now_s
        self._surprise = None
        self._afresh = False

    def _add_to_mean(self, now_s: float, sample: float, size_mb: float) -> None:
        assert self._mean is not None
        left_mb = self._size_mb * decay((now_s - self._taken_s) / self._parameters.half_life_s)
        self._size_mb = left_mb + size_mb
        share = size_mb / self._size_mb
        change = sample - self._mean
        step = share * change
        # If the two are far apart, rounding could give a number outside their range, even 0.
        self._mean = min(max(self._mean + step, min(self._mean, sample)), max(self._mean, sample))
        self._variance = (1.0 - share) * (self._variance + step * change)
        self._taken_s = now_s

    def _surprise_side(self, sample: float, size_mb: float, mean: float, variance: float) -> int:
        """Return -1 if a sample is a surprise of a faster link, 1 of a slower one, and 0 if it is none."""
        own = self._parameters
        limit = max(
            own.surprise_sigmas * math.sqrt(variance),
            own.surprise_change * mean,
            own.min_transfer_ms / 1000.0 / size_mb,
        )
        change = sample - mean
        return (change > limit) - (change < -limit)

    def _opening_ms(self, size: int, seconds_per_mb: float, rtt_ms: float) -> float:
        """Return the milliseconds of a transfer during which TCP opens its window, at a rate.

        The window doubles every round trip. TCP waits for acknowledgements while the window is smaller than what the
        link carries in a round trip.
        """
        window = self._parameters.initial_window_bytes
        sent = rounds = 0
        while sent + window < size and window * seconds_per_mb < 1000.0 * rtt_ms:
            sent += window
            window *= 2
            rounds += 1
        return rounds * rtt_ms


def _seconds_per_mb(transfer_ms: float, size_mb: float) -> float:
    return min(max(transfer_ms / 1000.0 / size_mb, _LEAST_S_PER_MB), _MOST_S_PER_MB)
