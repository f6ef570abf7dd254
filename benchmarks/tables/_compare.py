"""Compare two lookup tables: latencies, best choices and switch rates."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split._support.numbers import finite_or_none
from dsc_split.errors import UsageError
from dsc_split.lookup_table import LookupTable
from dsc_split.table._arithmetic import evaluate, slopes
from dsc_split.table._types import NO_OFFLOAD, SPLIT

if TYPE_CHECKING:
    from dsc_split.lookup_table import Choice

__all__ = ["CHANGES", "ChoiceChange", "Comparison", "LatencyChange", "SwitchChange", "compare_tables"]

CHANGES = ("slower", "faster", "gone", "new", "same")
"""How a latency can change, the worst first."""


@dataclass(frozen=True, kw_only=True)
class LatencyChange:
    """How the time of one graph changed at one batch size."""

    side: str
    """``device`` or ``server``."""
    graph: str
    """``whole model``, ``head CUT`` or ``tail CUT``."""
    batch: int
    """Batch size."""
    before_ms: float | None
    """Median in milliseconds; ``None`` if only the second table has it."""
    before_ci_ms: tuple[float, float] | None
    """95 % confidence interval of ``before_ms``; ``None`` if it is not known."""
    after_ms: float | None
    """Median in milliseconds; ``None`` if only the first table has it."""
    after_ci_ms: tuple[float, float] | None
    """95 % confidence interval of ``after_ms``; ``None`` if it is not known."""
    change: str
    """One of :data:`CHANGES`."""
    stale: bool
    """Whether one of the two times is from another machine than its table names."""

    @property
    def ratio(self) -> float | None:
        """Return ``after_ms / before_ms``; ``None`` if one of them is missing."""
        return self.after_ms / self.before_ms if self.before_ms and self.after_ms is not None else None


@dataclass(frozen=True, kw_only=True)
class ChoiceChange:
    """A range of data rates where the best choice is another one, by more than the uncertainty of both tables."""

    batch: int
    """Batch size."""
    from_rate_mb_s: float
    """Start of the range, in MB/s."""
    below_rate_mb_s: float | None
    """End of the range, in MB/s; ``None``: it has no end."""
    before: str
    """Name of the best choice in the first table."""
    after: str
    """Name of the best choice in the second table."""


@dataclass(frozen=True, kw_only=True)
class SwitchChange:
    """A data rate where both tables switch from one choice to another, and that moved beyond its uncertainty."""

    batch: int
    """Batch size."""
    below: str
    """Name of the choice that is the best below the rate."""
    above: str
    """Name of the choice that is the best from the rate on."""
    before_mb_s: float
    """The rate before, in MB/s."""
    before_range_mb_s: tuple[float, float]
    """Where it can have been, by the 95 % confidence intervals of the terms; the end may be infinite."""
    after_mb_s: float
    """The rate now, in MB/s."""
    after_range_mb_s: tuple[float, float]
    """Where it can be now."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of :func:`compare_tables`."""

    remarks: tuple[str, ...]
    """Reasons why the two are hard to compare: other pairs, targets, machines, links; stale times."""
    latencies: tuple[LatencyChange, ...]
    """Every graph of either table at the batch sizes that both have, changed or not."""
    batches_gone: tuple[int, ...]
    """Batch sizes that only the first table has."""
    batches_new: tuple[int, ...]
    """Batch sizes that only the second table has."""
    choices: tuple[ChoiceChange, ...]
    """Ranges of data rates with another best choice."""
    switches: tuple[SwitchChange, ...]
    """Switch rates that moved."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of latencies by change, one of :data:`CHANGES`."""
        return {change: sum(item.change == change for item in self.latencies) for change in CHANGES}

    @property
    def is_slower(self) -> bool:
        """Whether a latency is slower, or gone."""
        return any(item.change in ("slower", "gone") for item in self.latencies)

    @property
    def is_changed(self) -> bool:
        """Whether anything changed."""
        others = (self.choices, self.switches, self.batches_gone, self.batches_new)
        return any(item.change != "same" for item in self.latencies) or any(others)

    def to_json(self) -> dict[str, object]:
        """Return plain data; an infinite rate becomes ``None``."""
        return {
            "slower": self.is_slower,
            "changed": self.is_changed,
            "counts": self.counts,
            "remarks": list(self.remarks),
            "latencies": [{**dataclasses.asdict(item), "ratio": item.ratio} for item in self.latencies],
            "batches_gone": list(self.batches_gone),
            "batches_new": list(self.batches_new),
            "choices": [dataclasses.asdict(item) for item in self.choices],
            "switches": [
                {
                    **dataclasses.asdict(item),
                    "before_range_mb_s": [finite_or_none(end) for end in item.before_range_mb_s],
                    "after_range_mb_s": [finite_or_none(end) for end in item.after_range_mb_s],
                }
                for item in self.switches
            ],
        }


def compare_tables(before: LookupTable, after: LookupTable, *, tolerance: float = 0.02) -> Comparison:
    """List what changed from one table to another.

    A latency changed if the 95 % confidence intervals of the medians do not overlap and the medians differ by more
    than the tolerance. The best choice changed at the data rates where both tables are certain of their own. A switch
    rate moved if the ranges where it can be do not overlap and the rates differ by more than the tolerance.

    Args:
        before: The first table.
        after: The second table.
        tolerance: Smaller relative differences do not count.

    Raises:
        UsageError: ``tolerance`` is not finite, or negative; the tables have no batch size in common.
    """
    if not 0.0 <= tolerance < math.inf:
        raise UsageError(f"tolerance is {tolerance!r}; a finite number from 0 was expected.")
    sizes = {item.batch for item in before.batches}, {item.batch for item in after.batches}
    common = sorted(sizes[0] & sizes[1])
    if not common:
        first, second = (",".join(map(str, sorted(batches))) for batches in sizes)
        raise UsageError(
            f"the first table has batches {first}, the second {second}: with none in common nothing can be compared. "
            f"Measure the second as the first was: dsc-split bench BUNDLE --batches {first}"
        )
    latencies = tuple(
        change
        for batch in common
        for change in _latency_changes(batch, _times_by_graph(before, batch), _times_by_graph(after, batch), tolerance)
    )
    return Comparison(
        remarks=tuple(_remarks(before, after, latencies)),
        latencies=latencies,
        batches_gone=tuple(sorted(sizes[0] - sizes[1])),
        batches_new=tuple(sorted(sizes[1] - sizes[0])),
        choices=tuple(change for batch in common for change in _choice_changes(batch, before, after)),
        switches=tuple(change for batch in common for change in _switch_changes(batch, before, after, tolerance)),
    )


# ---- remarks -------------------------------------------------------------------------------------------------------


def _remarks(before: LookupTable, after: LookupTable, latencies: tuple[LatencyChange, ...]) -> Iterator[str]:
    if before.pair_id != after.pair_id:
        yield f"other pairs: {before.pair_id[:19]}..., then {after.pair_id[:19]}...: graphs are compared by their names"
    for what in ("precision", "count"):
        if (then := getattr(before, what)) != (now := getattr(after, what)):
            yield f"another {what}: {then}, then {now}"
    for side in ("device", "server"):
        then, now = getattr(before, side), getattr(after, side)
        if then.target != now.target:
            yield f"another target of the {side}: {then.target}, then {now.target}"
        if then.fingerprint != now.fingerprint:
            yield f"another machine or state of the {side}: {_changed_facts(then.run_fingerprint, now.run_fingerprint)}"
    then, now = dataclasses.asdict(before.link), dataclasses.asdict(after.link)
    if keys := [key for key in then if then[key] != now[key]]:
        yield f"another link: {', '.join(f'{key} {then[key]!r}, then {now[key]!r}' for key in keys)}"
    if stale := sum(item.stale for item in latencies):
        yield f"{stale} of {len(latencies)} latencies were taken on another machine than their table names"


def _changed_facts(then: Mapping[str, object] | None, now: Mapping[str, object] | None) -> str:
    if then is None or now is None:
        return "the table does not say which"
    keys = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    return ", ".join(f"{key} {then.get(key)!r}, then {now.get(key)!r}" for key in keys)


# ---- latencies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Time:
    median_ms: float
    interval_ms: tuple[float, float] | None
    valid: bool


def _times_by_graph(table: LookupTable, batch: int) -> dict[tuple[str, str], _Time]:
    choices = {choice.id: choice for choice in table.choices}
    (rows,) = (item.rows for item in table.batches if item.batch == batch)
    times = {}
    for row in rows:
        choice = choices[row.choice]
        if choice.uses_server:
            time = _Time(median_ms=row.tail_ms, interval_ms=row.tail_ci_ms, valid=row.timing_valid)
            times["server", _graph_name(choice, "tail")] = time
        if choice.kind in (SPLIT, NO_OFFLOAD) or row.head_ms > 0.0:
            time = _Time(median_ms=row.head_ms, interval_ms=row.head_ci_ms, valid=row.timing_valid)
            times["device", _graph_name(choice, "head")] = time
    return times


def _graph_name(choice: Choice, part: str) -> str:
    if choice.kind == SPLIT:
        return f"{part} {choice.name}"
    return "whole model" if (part == "tail") is choice.uses_server else "encoding of the input"


def _latency_changes(
    batch: int, before: Mapping[tuple[str, str], _Time], after: Mapping[tuple[str, str], _Time], tolerance: float
) -> Iterator[LatencyChange]:
    for key in sorted({**before, **after}, key=lambda key: key[0]):
        then, now = before.get(key), after.get(key)
        yield LatencyChange(
            side=key[0],
            graph=key[1],
            batch=batch,
            before_ms=None if then is None else then.median_ms,
            before_ci_ms=None if then is None else then.interval_ms,
            after_ms=None if now is None else now.median_ms,
            after_ci_ms=None if now is None else now.interval_ms,
            change=_judge_change(then, now, tolerance),
            stale=any(time is not None and not time.valid for time in (then, now)),
        )


def _judge_change(then: _Time | None, now: _Time | None, tolerance: float) -> str:
    if then is None or now is None:
        return "new" if then is None else "gone"
    low, high = then.interval_ms or (then.median_ms, then.median_ms)
    low_now, high_now = now.interval_ms or (now.median_ms, now.median_ms)
    difference_ms = now.median_ms - then.median_ms
    if (low_now <= high and low <= high_now) or abs(difference_ms) <= tolerance * then.median_ms:
        return "same"
    return "slower" if difference_ms > 0.0 else "faster"


# ---- choices and switch rates ----------------------------------------------------------------------------------------


class _LatencyLines:
    """The latencies of one table at one batch size: ``a + b / rate`` by choice, with the uncertainty of ``a``."""

    def __init__(self, table: LookupTable, batch: int) -> None:
        names = {choice.id: choice.name for choice in table.choices}
        lines = table.pick(batch, math.inf).lines
        self._lines = lines
        self._index = {choice.name: i for i, choice in enumerate(lines.choices)}
        self._slopes_mb = slopes(lines)
        self._intercepts_ms = evaluate(lines, math.inf)
        (segments,) = (item.segments for item in table.batches if item.batch == batch)
        self.ends_mb_s = [math.inf if item.below_rate_mb_s is None else item.below_rate_mb_s for item in segments]
        self.best = [names[item.choice] for item in segments]

    def best_at(self, rate_mb_s: float) -> str:
        """Return the name of the best choice."""
        return next(name for name, end in zip(self.best, self.ends_mb_s, strict=True) if rate_mb_s < end)

    def sure_range_mb_s(self, name: str, other: str) -> tuple[float, float]:
        """Return the range of data rates where ``name`` is better than ``other`` by more than the uncertainty.

        The range is ``(0, inf)`` if the other choice has no row, and ``(inf, inf)`` if it is empty. The advantage
        changes linearly with ``1 / rate``. So the range starts at 0 if ``name`` sends less, and is open if not.
        """
        if other not in self._index:
            return 0.0, math.inf
        i, j = self._index[name], self._index[other]
        more_mb = self._slopes_mb[i] - self._slopes_mb[j]
        sure_ms = self._intercepts_ms[j] - self._intercepts_ms[i] - self._uncertainty_ms(name, other)
        if more_mb < 0.0:
            return 0.0, 1000.0 * more_mb / sure_ms if sure_ms < 0.0 else math.inf
        return 1000.0 * more_mb / sure_ms if sure_ms > 0.0 else math.inf, math.inf

    def switches(self) -> dict[tuple[str, str], tuple[float, tuple[float, float]]]:
        """Return, for each pair of neighbouring best choices, the rate of the switch and the range where it can be."""
        found = {}
        for (below, above), rate_mb_s in zip(itertools.pairwise(self.best), self.ends_mb_s, strict=False):
            _, low = self.sure_range_mb_s(below, above)
            high, _ = self.sure_range_mb_s(above, below)
            found[below, above] = rate_mb_s, (low, high)
        return found

    def _uncertainty_ms(self, name: str, other: str) -> float:
        lines, index = self._lines, self._index
        return math.sqrt(lines.variance_ms2(index[name]) + lines.variance_ms2(index[other]))


def _choice_changes(batch: int, before: LookupTable, after: LookupTable) -> Iterator[ChoiceChange]:
    """List where the best choice has certainly changed, except where a switch rate moved."""
    then, now = _LatencyLines(before, batch), _LatencyLines(after, batch)
    moved = {frozenset(pair) for pair in then.switches().keys() & now.switches().keys()}
    ends = sorted({*then.ends_mb_s, *now.ends_mb_s})
    for start, end in itertools.pairwise([0.0, *ends]):
        best, best_now = then.best_at(start), now.best_at(start)
        if best == best_now or frozenset((best, best_now)) in moved:
            continue
        sure, sure_now = then.sure_range_mb_s(best, best_now), now.sure_range_mb_s(best_now, best)
        low, high = max(start, sure[0], sure_now[0]), min(end, sure[1], sure_now[1])
        if low < high:
            below = None if high == math.inf else high
            yield ChoiceChange(batch=batch, from_rate_mb_s=low, below_rate_mb_s=below, before=best, after=best_now)


def _switch_changes(batch: int, before: LookupTable, after: LookupTable, tolerance: float) -> Iterator[SwitchChange]:
    then, now = _LatencyLines(before, batch).switches(), _LatencyLines(after, batch).switches()
    for (below, above), (rate_mb_s, (low, high)) in then.items():
        if (below, above) not in now:
            continue
        rate_now_mb_s, (low_now, high_now) = now[below, above]
        overlap = low_now <= high and low <= high_now
        if not overlap and abs(rate_now_mb_s - rate_mb_s) > tolerance * rate_mb_s:
            yield SwitchChange(
                batch=batch,
                below=below,
                above=above,
                before_mb_s=rate_mb_s,
                before_range_mb_s=(low, high),
                after_mb_s=rate_now_mb_s,
                after_range_mb_s=(low_now, high_now),
            )
