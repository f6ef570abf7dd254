"""The answer of a lookup table in one state."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from dsc_split._support.numbers import finite_or_none
from dsc_split.table._arithmetic import Lines, ranking, switch_rates
from dsc_split.table._state import State
from dsc_split.table._types import Choice, Segment, TableContent, Terms

__all__ = ["Pick"]


@dataclass(frozen=True, init=False)
class Pick:
    """The answer of a table in one state, and how certain it is."""

    choice: Choice
    """The fastest choice."""
    latency_ms: float
    """T of the choice in milliseconds."""
    batch: int
    """Batch size of the state."""
    rate_mb_s: float
    """Uplink data rate of the state, in MB/s."""
    table: TableContent = field(repr=False, compare=False)
    """The table that answered."""
    lines: Lines = field(repr=False, compare=False)
    """The choices that were compared."""
    times_ms: list[float] = field(repr=False, compare=False)
    """T in milliseconds of each compared choice, in the order of ``lines``."""
    _state: State | None = field(repr=False, compare=False)
    """The state; ``None`` where only batch size and rate were given."""

    def __init__(self, **fields: object) -> None:
        # Three times as fast as the __init__ of a frozen dataclass, which sets field by field; picks must be fast.
        self.__dict__.update(fields)

    @property
    def state(self) -> State:
        """The state of the question."""
        return self._state or State(batch=self.batch, rate_mb_s=self.rate_mb_s)

    @property
    def measured_batch(self) -> int:
        """The batch size whose times were used."""
        return self.lines.measured_batch

    @property
    def timing_valid(self) -> bool:
        """Whether the choice was timed on the machines that the table names; if not, measure it again."""
        return self.lines.rows[self.lines.choices.index(self.choice)].timing_valid

    @property
    def runner_up(self) -> Choice | None:
        """The second fastest choice; ``None`` where no other choice has a finite T."""
        second = self._second()
        return None if second is None else self.lines.choices[second]

    @property
    def margin_ms(self) -> float:
        """T of the runner-up minus ``latency_ms``, in milliseconds; infinite without a runner-up."""
        second = self._second()
        return math.inf if second is None else self.times_ms[second] - self.latency_ms

    @property
    def uncertainty_ms(self) -> float:
        """Half-width of the 95 % confidence interval of ``margin_ms``, in milliseconds.

        It is the root of the sum of the squared half-widths of both choices' head and tail; 0 without a runner-up.
        The half-widths are always those of the medians, because those of 95th percentiles are not measured.
        """
        second = self._second()
        if second is None:
            return 0.0
        best = self.lines.choices.index(self.choice)
        return math.sqrt(self.lines.variance_ms2(best) + self.lines.variance_ms2(second))

    @property
    def margin_ratio(self) -> float:
        """``margin_ms`` divided by ``latency_ms``; infinite without a runner-up."""
        if self.margin_ms == 0.0:
            return 0.0
        return self.margin_ms / self.latency_ms if self.latency_ms > 0.0 else math.inf

    @property
    def tie(self) -> bool:
        """Whether the margin is smaller than its uncertainty, so that either choice may be the faster one."""
        return self.margin_ms == 0.0 or self.margin_ms < self.uncertainty_ms

    @property
    def terms(self) -> Terms:
        """The terms of T of the choice that was picked."""
        return next(terms for terms in self.ranking if terms.choice == self.choice)

    def _second(self) -> int | None:
        best = self.lines.choices.index(self.choice)
        others = [index for index in range(len(self.times_ms)) if index != best]
        second = min(others, key=self.times_ms.__getitem__, default=None)
        return None if second is None or self.times_ms[second] == math.inf else second

    @property
    def ranking(self) -> tuple[Terms, ...]:
        """The terms of every allowed choice, the fastest first."""
        return ranking(self.lines, self.rate_mb_s)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The best choice at every data rate, with all other fields of the state unchanged."""
        return switch_rates(self.lines)

    @property
    def best_from_mb_s(self) -> float:
        """The lowest data rate in MB/s at which the choice is the best; 0 where it is the best from the start."""
        segments = self.segments
        for before, segment in itertools.pairwise(segments):
            if segment.choice == self.choice.id and before.below_rate_mb_s is not None:
                return before.below_rate_mb_s
        return 0.0

    @property
    def best_below_mb_s(self) -> float:
        """The data rate in MB/s at which the choice stops being the best; infinite where it never does."""
        for segment in self.segments:
            if segment.choice == self.choice.id and segment.below_rate_mb_s is not None:
                return segment.below_rate_mb_s
        return math.inf

    def to_json(self) -> dict[str, object]:
        """Return the answer, its ranking and its segments as plain data; infinite numbers become ``None``."""
        names = {choice.id: choice.name for choice in self.table.choices}
        return {
            "choice": self.choice.name,
            "id": self.choice.id,
            "kind": self.choice.kind,
            "latency_ms": self.latency_ms,
            "runner_up": None if self.runner_up is None else self.runner_up.name,
            "margin_ms": finite_or_none(self.margin_ms),
            "margin_ratio": finite_or_none(self.margin_ratio),
            "uncertainty_ms": finite_or_none(self.uncertainty_ms),
            "tie": self.tie,
            "timing_valid": self.timing_valid,
            "percentile": int(self.state.percentile or 50),
            "batch": self.batch,
            "measured_batch": self.measured_batch,
            "rate_mb_s": finite_or_none(self.rate_mb_s),
            "emulated": self.table.emulated,
            "count": self.table.count,
            "choices": [terms.to_json() for terms in self.ranking],
            "segments": [
                {"choice": names[segment.choice], "below_rate_mb_s": segment.below_rate_mb_s}
                for segment in self.segments
            ],
        }
