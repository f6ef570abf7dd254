"""Choose what to keep loaded within a memory budget: the choices that lose least over all states of the link."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc_split._support.numbers import finite_or_none
from dsc_split._support.sizes import size_text
from dsc_split._support.strict_json import write_json
from dsc_split.benchmarks.memory._reports import load_memory
from dsc_split.benchmarks.tables._rows import with_segments
from dsc_split.errors import UsageError
from dsc_split.table._types import FULL_OFFLOAD, NO_OFFLOAD

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.benchmarks.memory._reports import MemoryReport, SetMemory
    from dsc_split.bundle import Bundle
    from dsc_split.lookup_table import BatchTable, LookupTable, Row

__all__ = ["MAX_EXACT_CHOICES", "Loss", "keep_within", "write_table_within"]

MAX_EXACT_CHOICES = 15
"""With at most this many choices every set is tried; with more, sets are improved step by step."""
RATES_MB_S = (0.05, 1000.0)
"""Lowest and highest data rate at which the loss is computed."""
RATE_COUNT = 200
"""Number of data rates between these, evenly spaced on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The choices that are kept within a budget, and what that costs.

    A state is a batch size and a data rate, with the table's own link and load 1. In one state, the loss of a set is
    the time of its best choice divided by that of the table's best choice, minus 1.
    """

    budget_bytes: Mapping[str, int]
    """Memory limit by side."""
    kept: tuple[str, ...]
    """Names of the kept choices, in the table's order."""
    left_out: tuple[str, ...]
    """Names of the others that have times."""
    memory: Mapping[str, SetMemory]
    """Memory of the kept choices, by side with a budget."""
    mean_share: float
    """Mean loss over all states; infinite if the kept choices have no times at a batch size."""
    worst_share: float
    """Largest loss of all states."""
    worst_batch: int
    """Batch size of the worst state."""
    worst_rate_mb_s: float
    """Data rate of the worst state, in MB/s."""
    unanswered_batches: tuple[int, ...]
    """Batch sizes at which no kept choice has times; they are left out of the table."""
    exact: bool
    """Whether it is certain that no other set that fits loses less."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data; infinite numbers become ``None``."""
        worst = {
            "batch": self.worst_batch,
            "rate_mb_s": self.worst_rate_mb_s,
            "share": finite_or_none(self.worst_share),
        }
        return {
            "budget_bytes": dict(self.budget_bytes),
            "memory_bytes": {side: item.memory_bytes for side, item in self.memory.items()},
            "source": {side: item.source for side, item in self.memory.items()},
            "kept": list(self.kept),
            "left_out": list(self.left_out),
            "loss": {"mean_share": finite_or_none(self.mean_share), "worst": worst},
            "unanswered_batches": list(self.unanswered_batches),
            "exact": self.exact,
        }


def keep_within(
    table: LookupTable, memory: Mapping[str, MemoryReport | None], budget_bytes: Mapping[str, int]
) -> tuple[LookupTable, Loss]:
    """Keep the choices that lose least within a budget, and return their table.

    No offload is kept if it fits: nothing else runs on a dead link. Of sets with the same loss, the one with more
    choices is kept, then the smaller one. Ids and names do not change.

    Args:
        table: The table of all choices.
        memory: Memory of the engines, by side.
        budget_bytes: Memory limit of the kept engines by side, ``device`` or ``server``; a missing side has no limit.

    Raises:
        UsageError: Memory numbers are missing, for a choice or for the table's largest batch size, or no choice fits.
    """
    search = _Search(table, memory, budget_bytes)
    kept = search.best()
    return search.cut_table(kept), search.loss(kept)


def write_table_within(bundle: Bundle, table: LookupTable, budget_bytes: Mapping[str, int]) -> tuple[LookupTable, Loss]:
    """Keep what fits of a bundle's table, and write it to ``table.json``, with the loss under ``residency``.

    The table of all choices stays in ``tables/``.

    Args:
        bundle: The bundle, with the memory of its engines.
        table: Its table of all choices.
        budget_bytes: As for :func:`keep_within`.

    Raises:
        UsageError: As for :func:`keep_within`.
        DamagedError: A memory report is damaged.
        BundleBusyError: Another command is writing the bundle.
    """
    parts = {"device": table.device, "server": table.server}
    memory = {side: load_memory(bundle, side, parts[side]) for side in budget_bytes}
    kept, loss = keep_within(table, memory, budget_bytes)
    with bundle.lock():
        bundle.touch()  # another table makes a bundle newer
        write_json(bundle.file("table.json"), {**kept.to_json(), "residency": loss.to_json()})
    return kept, loss


class _Search:
    """Searches the choices of one table for the set that loses least."""

    def __init__(
        self, table: LookupTable, memory: Mapping[str, MemoryReport | None], budget_bytes: Mapping[str, int]
    ) -> None:
        import numpy as np

        self._table = table
        self._budget_bytes = budget_bytes
        largest = {row.choice: item.batch for item in table.batches for row in item.rows}
        self._choices = tuple(choice for choice in table.choices if choice.id in largest)
        self._all_names = frozenset(choice.name for choice in self._choices)
        self._index = {choice.name: i for i, choice in enumerate(self._choices)}
        self._memory = {
            side: _require_memory(table, side, memory.get(side), names, largest)
            for side in budget_bytes
            if (names := self._on_side(side, self._all_names))
        }
        self._rates_mb_s = np.geomspace(*RATES_MB_S, RATE_COUNT)
        self._excess_matrix = self._compute_excess()
        self._keys: dict[frozenset[str], tuple[int, float, int, int, tuple[int, ...]]] = {}

    def best(self) -> frozenset[str]:
        """Return the set that loses least of those that fit.

        Raises:
            UsageError: No choice fits.
        """
        if self._fits(self._all_names):
            return self._all_names
        forced = frozenset([NO_OFFLOAD]) & self._all_names
        forced = forced if self._fits(forced) else frozenset()
        if self._is_small:
            free = sorted(self._all_names - forced)
            sets = (
                forced.union(names) for size in range(len(free) + 1) for names in itertools.combinations(free, size)
            )
            found = min((names for names in sets if names and self._fits(names)), key=self._sort_key, default=None)
        else:
            found = self._step_by_step(forced)
        if found is None:
            raise UsageError(self._nothing_fits())
        return found

    @property
    def _is_small(self) -> bool:
        return len(self._choices) <= MAX_EXACT_CHOICES

    def _step_by_step(self, forced: frozenset[str]) -> frozenset[str] | None:
        """Remove choices, cheapest first, until the rest fits; then add or exchange choices while that loses less."""
        names = self._all_names
        while not self._fits(names) and len(names) > 1:
            names = min((names - {name} for name in sorted(names - forced)), key=lambda left: self._price(names, left))
        if not self._fits(names):
            singles = [frozenset([name]) for name in sorted(self._all_names)]
            fitting = [single for single in singles if self._fits(single)]
            if not fitting:
                return None
            names = min(fitting, key=self._sort_key)
        while True:
            outside = sorted(self._all_names - names)
            added = [names | {name} for name in outside]
            exchanged = [(names - {old}) | {new} for old in sorted(names - forced) for new in outside]
            better = min(filter(self._fits, (*added, *exchanged)), key=self._sort_key, default=names)
            if self._sort_key(better) >= self._sort_key(names):
                return names
            names = better

    def _price(self, names: frozenset[str], left: frozenset[str]) -> tuple[int, float]:
        """Return the price of a smaller set: newly unanswered states, and the loss per freed share of the excess."""
        before, after = self._sort_key(names), self._sort_key(left)
        freed = 0.0
        for side, budget in self._budget_bytes.items():
            surplus = self._bytes(side, names) - budget
            if surplus > 0:
                freed += min(1.0, (self._bytes(side, names) - self._bytes(side, left)) / surplus)
        lost = after[1] - before[1]
        return after[0] - before[0], lost / freed if freed > 0.0 else math.inf

    # ---- memory of a set -----------------------------------------------------------------------------------

    @staticmethod
    def _on_side(side: str, names: Iterable[str]) -> frozenset[str]:
        """Return the choices that need an engine on a side."""
        return frozenset(names) - {FULL_OFFLOAD if side == "device" else NO_OFFLOAD}

    def _bytes(self, side: str, names: Iterable[str]) -> int:
        on_side = self._on_side(side, names)
        return (self._memory[side].hold(on_side).memory_bytes or 0) if on_side else 0

    def _fits(self, names: frozenset[str]) -> bool:
        return bool(names) and all(self._bytes(side, names) <= budget for side, budget in self._budget_bytes.items())

    def _nothing_fits(self) -> str:
        parts = []
        for side, budget in self._budget_bytes.items():
            on_side = self._on_side(side, self._all_names)
            if on_side:
                smallest = min(on_side, key=lambda name: (self._bytes(side, [name]), name))
                size_bytes = self._bytes(side, [smallest])
                parts.append(f"{side}: {smallest!r} takes {size_text(size_bytes)} of {size_text(budget)}")
        return (
            f"not even one choice fits into the memory budget; the smallest is, {'; '.join(parts)}. "
            "Give more, or measure a smaller batch."
        )

    # ---- loss of a set -------------------------------------------------------------------------------------

    def _compute_excess(self) -> np.ndarray:
        """Return T over the best T, minus 1, with shape [choices, batches x rates]; infinite where there is no row."""
        import numpy as np

        excess = np.full((len(self._choices), len(self._table.batches), RATE_COUNT), math.inf)
        for b, item in enumerate(self._table.batches):
            for r, rate_mb_s in enumerate(self._rates_mb_s):
                pick = self._table.pick(item.batch, float(rate_mb_s))
                for choice, time_ms in zip(pick.lines.choices, pick.times_ms, strict=True):
                    excess[self._index[choice.name], b, r] = _relative_excess(time_ms, pick.latency_ms)
        return excess.reshape(len(self._choices), -1)

    def _state_losses(self, names: frozenset[str]) -> np.ndarray:
        losses: np.ndarray = self._excess_matrix[[self._index[name] for name in names]].min(axis=0)
        return losses

    def _sort_key(self, names: frozenset[str]) -> tuple[int, float, int, int, tuple[int, ...]]:
        """Sort key, best first: unanswered states, mean loss in the others, choices, bytes, and which choices."""
        import numpy as np

        if names not in self._keys:
            losses = self._state_losses(names)
            answered = np.isfinite(losses)
            mean = float(losses[answered].mean()) if answered.any() else math.inf
            size_bytes = sum(self._bytes(side, names) for side in self._budget_bytes)
            which = tuple(sorted(self._index[name] for name in names))
            self._keys[names] = (int((~answered).sum()), mean, -len(names), size_bytes, which)
        return self._keys[names]

    # ---- results -------------------------------------------------------------------------------------------

    def loss(self, kept: frozenset[str]) -> Loss:
        """Return what a set loses."""
        losses = self._state_losses(kept)
        worst = int(losses.argmax())
        names = [choice.name for choice in self._choices]
        held = {side: self._on_side(side, kept) for side in self._budget_bytes}
        return Loss(
            budget_bytes=dict(self._budget_bytes),
            kept=tuple(name for name in names if name in kept),
            left_out=tuple(name for name in names if name not in kept),
            memory={side: self._memory[side].hold(names) for side, names in held.items() if names},
            mean_share=float(losses.mean()),
            worst_share=float(losses[worst]),
            worst_batch=self._table.batches[worst // RATE_COUNT].batch,
            worst_rate_mb_s=float(self._rates_mb_s[worst % RATE_COUNT]),
            unanswered_batches=tuple(item.batch for item in self._table.batches if not self._rows(item, kept)),
            exact=self._is_small or kept == self._all_names,
        )

    def _rows(self, item: BatchTable, kept: frozenset[str]) -> tuple[Row, ...]:
        ids = {choice.id for choice in self._choices if choice.name in kept}
        return tuple(row for row in item.rows if row.choice in ids)

    def cut_table(self, kept: frozenset[str]) -> LookupTable:
        """Make the table of a set, with new segments; choices that never had a row stay listed."""
        table = dataclasses.replace(
            self._table,
            choices=tuple(
                choice for choice in self._table.choices if choice.name in kept or choice.name not in self._all_names
            ),
            batches=tuple(
                dataclasses.replace(item, rows=rows, segments=())
                for item in self._table.batches
                if (rows := self._rows(item, kept))
            ),
        )
        return with_segments(table)


def _relative_excess(time_ms: float, best_ms: float) -> float:
    if time_ms == best_ms:
        return 0.0
    return time_ms / best_ms - 1.0 if best_ms > 0.0 else math.inf


def _require_memory(
    table: LookupTable,
    side: str,
    memory: MemoryReport | None,
    names: frozenset[str],
    largest: Mapping[int, int],
) -> MemoryReport:
    """Return the report, if every choice has memory numbers at the largest batch size of its rows.

    Raises:
        UsageError: Numbers are missing; the message has the command that measures them.
    """
    missing = []
    for name in sorted(names):
        engine = None if memory is None else memory.engine(name)
        if engine is None or engine.batch < largest[table.choice(name).id]:
            missing.append(name)
    if memory is None or missing:
        part = table.device if side == "device" else table.server
        batch = max(largest[table.choice(name).id] for name in missing)
        raise UsageError(
            f"the memory of {', '.join(map(repr, missing))} on the {side} is not known for "
            f"{part.target!r} at batch {batch}. Measure it there: dsc-split memory BUNDLE --side {side} "
            f"--target {shlex.quote(part.target)} --batch {batch}"
        )
    return memory
