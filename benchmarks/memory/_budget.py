"""Which choices to keep loaded within a memory budget: those that lose least over all states of the link."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc_split._support.files import write_json
from dsc_split._support.numbers import finite_or_none
from dsc_split._support.sizes import size_text
from dsc_split.benchmarks.memory._reports import load_memory
from dsc_split.errors import UsageError
from dsc_split.lookup_table import State
from dsc_split.table._types import FULL_OFFLOAD, NO_OFFLOAD

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.benchmarks.memory._reports import MemoryReport, SetMemory
    from dsc_split.bundle import Bundle
    from dsc_split.lookup_table import BatchTable, LookupTable

__all__ = ["MAX_EXACT_CHOICES", "Loss", "keep_within", "write_table_within"]

MAX_EXACT_CHOICES = 15
"""Up to so many choices every set is tried; beyond, sets are improved step by step."""
RATES_MB_S = (0.05, 1000.0)
"""Lowest and highest data rate over which the loss is taken."""
RATE_COUNT = 200
"""Data rates between these, evenly on a logarithmic scale."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What is kept within a budget, and what that costs.

    In one state (a batch size and a data rate, the table's own link, load 1) a set loses the time of its best choice
    over that of the table's best choice, minus 1.
    """

    budget_bytes: Mapping[str, int]
    """By side: what may be taken."""
    kept: tuple[str, ...]
    """Names of the choices that are kept, in the table's order."""
    left_out: tuple[str, ...]
    """Names of the others that have times."""
    memory: Mapping[str, SetMemory]
    """By side with a budget: what the kept choices take there."""
    mean_share: float
    """Mean over all states; infinite where the kept choices cannot answer at a batch size."""
    worst_share: float
    """The largest of all states."""
    worst_batch: int
    """Batch size of the worst state."""
    worst_rate_mb_s: float
    """Data rate of the worst state, in MB/s."""
    unanswered_batches: tuple[int, ...]
    """Batch sizes of the table at which no kept choice has times; they are no longer in it."""
    exact: bool
    """Whether no other set that fits loses less; else it was found step by step."""

    def to_json(self) -> dict[str, Any]:
        """Give plain data; infinite numbers become ``None``."""
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
    """Keep the choices that lose least within a budget, and give the table of these.

    No offload is kept wherever it fits: on a dead link nothing else runs. Of sets that lose the same, the one with
    more choices is kept, then the smaller one. Ids and names stay as they are.

    Args:
        table: The table of all choices.
        memory: By side: what its engines take.
        budget_bytes: By side, ``device`` and ``server``: what the engines that are kept loaded may take; a side that is
            not in it has no limit.

    Raises:
        UsageError: Memory numbers are missing, for a choice or for the table's largest batch size, or not even one
            choice fits.
    """
    search = _Search(table, memory, budget_bytes)
    kept = search.best()
    return search.cut_table(kept), search.loss(kept)


def write_table_within(bundle: Bundle, table: LookupTable, budget_bytes: Mapping[str, int]) -> tuple[LookupTable, Loss]:
    """Keep what fits of a bundle's table, and write that to ``table.json``, with what it loses under ``residency``.

    The table of all choices stays in ``tables/``.

    Args:
        bundle: The bundle, with the memory of its engines.
        table: Its table of all choices.
        budget_bytes: As for :func:`keep_within`, whose errors are raised, too.

    Raises:
        DamagedError: What was measured is damaged.
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
    """All that is known of the choices of one table."""

    def __init__(
        self, table: LookupTable, memory: Mapping[str, MemoryReport | None], budget_bytes: Mapping[str, int]
    ) -> None:
        import numpy as np

        self._table = table
        self._budget_bytes = budget_bytes
        largest = {row.choice: item.batch for item in table.batches for row in item.rows}
        self._choices = tuple(choice for choice in table.choices if choice.id in largest)
        self._all = frozenset(choice.name for choice in self._choices)
        self._index = {choice.name: i for i, choice in enumerate(self._choices)}
        self._memory = {
            side: _required(table, side, memory.get(side), names, largest)
            for side in budget_bytes
            if (names := self._on(side, self._all))
        }
        self._rates_mb_s = np.geomspace(*RATES_MB_S, RATE_COUNT)
        self._excess = self._excesses()
        self._keys: dict[frozenset[str], tuple[int, float, int, int, tuple[int, ...]]] = {}

    def best(self) -> frozenset[str]:
        """Find the set that loses least of those that fit.

        Raises:
            UsageError: Nothing fits.
        """
        if self._fits(self._all):
            return self._all
        forced = frozenset([NO_OFFLOAD]) & self._all
        forced = forced if self._fits(forced) else frozenset()
        if self._is_small:
            free = sorted(self._all - forced)
            sets = (
                forced.union(names) for size in range(len(free) + 1) for names in itertools.combinations(free, size)
            )
            found = min((names for names in sets if names and self._fits(names)), key=self._key, default=None)
        else:
            found = self._step_by_step(forced)
        if found is None:
            raise UsageError(self._nothing_fits())
        return found

    @property
    def _is_small(self) -> bool:
        return len(self._choices) <= MAX_EXACT_CHOICES

    def _step_by_step(self, forced: frozenset[str]) -> frozenset[str] | None:
        """Take away what loses least for the memory that it frees, then exchange as long as that loses less."""
        names = self._all
        while not self._fits(names) and len(names) > 1:
            names = min((names - {name} for name in sorted(names - forced)), key=lambda left: self._price(names, left))
        if not self._fits(names):
            singles = [frozenset([name]) for name in sorted(self._all)]
            fitting = [single for single in singles if self._fits(single)]
            if not fitting:
                return None
            names = min(fitting, key=self._key)
        while True:
            outside = sorted(self._all - names)
            added = [names | {name} for name in outside]
            exchanged = [(names - {old}) | {new} for old in sorted(names - forced) for new in outside]
            better = min(filter(self._fits, (*added, *exchanged)), key=self._key, default=names)
            if self._key(better) >= self._key(names):
                return names
            names = better

    def _price(self, names: frozenset[str], left: frozenset[str]) -> tuple[int, float]:
        """Price a smaller set: states that nobody answers any more, and loss per share of the excess that is freed."""
        before, after = self._key(names), self._key(left)
        freed = 0.0
        for side, budget in self._budget_bytes.items():
            surplus = self._bytes(side, names) - budget
            if surplus > 0:
                freed += min(1.0, (self._bytes(side, names) - self._bytes(side, left)) / surplus)
        lost = after[1] - before[1]
        return after[0] - before[0], lost / freed if freed > 0.0 else math.inf

    # ---- what a set takes ----------------------------------------------------------------------------------

    @staticmethod
    def _on(side: str, names: Iterable[str]) -> frozenset[str]:
        """Give the choices that need an engine on a side."""
        return frozenset(names) - {FULL_OFFLOAD if side == "device" else NO_OFFLOAD}

    def _bytes(self, side: str, names: Iterable[str]) -> int:
        on_side = self._on(side, names)
        return (self._memory[side].hold(on_side).memory_bytes or 0) if on_side else 0

    def _fits(self, names: frozenset[str]) -> bool:
        return bool(names) and all(self._bytes(side, names) <= budget for side, budget in self._budget_bytes.items())

    def _nothing_fits(self) -> str:
        parts = []
        for side, budget in self._budget_bytes.items():
            on_side = self._on(side, self._all)
            if on_side:
                smallest = min(on_side, key=lambda name: (self._bytes(side, [name]), name))
                size_bytes = self._bytes(side, [smallest])
                parts.append(f"{side}: {smallest!r} takes {size_text(size_bytes)} of {size_text(budget)}")
        return (
            f"not even one choice fits into the memory budget; the smallest is, {'; '.join(parts)}. "
            "Give more, or measure a smaller batch."
        )

    # ---- what a set loses ----------------------------------------------------------------------------------

    def _excesses(self) -> np.ndarray:
        """Compute T over the best T, minus 1: of shape [choices, batches x rates]; infinite where there is no row."""
        import numpy as np

        excess = np.full((len(self._choices), len(self._table.batches), RATE_COUNT), math.inf)
        for b, item in enumerate(self._table.batches):
            for r, rate_mb_s in enumerate(self._rates_mb_s):
                pick = self._table.pick(item.batch, float(rate_mb_s))
                for choice, time_ms in zip(pick.lines.choices, pick.times_ms, strict=True):
                    excess[self._index[choice.name], b, r] = _excess(time_ms, pick.latency_ms)
        return excess.reshape(len(self._choices), -1)

    def _losses(self, names: frozenset[str]) -> np.ndarray:
        """Give the loss of a set in every state."""
        losses: np.ndarray = self._excess[[self._index[name] for name in names]].min(axis=0)
        return losses

    def _key(self, names: frozenset[str]) -> tuple[int, float, int, int, tuple[int, ...]]:
        """Order sets: states that nobody answers, mean loss in the others, choices, bytes, and which choices."""
        import numpy as np

        if names not in self._keys:
            losses = self._losses(names)
            answered = np.isfinite(losses)
            mean = float(losses[answered].mean()) if answered.any() else math.inf
            size_bytes = sum(self._bytes(side, names) for side in self._budget_bytes)
            which = tuple(sorted(self._index[name] for name in names))
            self._keys[names] = (int((~answered).sum()), mean, -len(names), size_bytes, which)
        return self._keys[names]

    # ---- the answer ----------------------------------------------------------------------------------------

    def loss(self, kept: frozenset[str]) -> Loss:
        """Describe a set."""
        losses = self._losses(kept)
        worst = int(losses.argmax())
        names = [choice.name for choice in self._choices]
        held = {side: self._on(side, kept) for side in self._budget_bytes}
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
            exact=self._is_small or kept == self._all,
        )

    def _rows(self, item: BatchTable, kept: frozenset[str]) -> tuple[Any, ...]:
        ids = {choice.id for choice in self._choices if choice.name in kept}
        return tuple(row for row in item.rows if row.choice in ids)

    def cut_table(self, kept: frozenset[str]) -> LookupTable:
        """Make the table of a set, with its own segments; choices that never had a row stay listed."""
        table = dataclasses.replace(
            self._table,
            choices=tuple(
                choice for choice in self._table.choices if choice.name in kept or choice.name not in self._all
            ),
            batches=tuple(
                dataclasses.replace(item, rows=rows, segments=())
                for item in self._table.batches
                if (rows := self._rows(item, kept))
            ),
        )
        return dataclasses.replace(
            table,
            batches=tuple(
                dataclasses.replace(item, segments=table.switch_rates(State(batch=item.batch)))
                for item in table.batches
            ),
        )


def _excess(time_ms: float, best_ms: float) -> float:
    if time_ms == best_ms:
        return 0.0
    return time_ms / best_ms - 1.0 if best_ms > 0.0 else math.inf


def _required(
    table: LookupTable,
    side: str,
    memory: MemoryReport | None,
    names: frozenset[str],
    largest: Mapping[int, int],
) -> MemoryReport:
    """See that every choice has memory numbers at the largest batch size of its rows.

    Raises:
        UsageError: Numbers are missing; the message has the command.
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
