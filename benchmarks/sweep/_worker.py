"""The child process that times engines: it loads them, calls them in rounds, and frees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from msgspec import UNSET

from dsc_split._support.memory import own_bytes
from dsc_split._support.records import to_document
from dsc_split.benchmarks.cells._cells import Round
from dsc_split.benchmarks.sweep._environment import now
from dsc_split.benchmarks.sweep._timer import time_calls, time_paced_calls, warm_up

if TYPE_CHECKING:
    from dsc_split.engines import EngineLike, SideEngines

__all__ = ["Bench", "Loaded", "WarmUpFacts"]


class WarmUpFacts(TypedDict):
    """How a warm-up went, and the memory of the child process after it."""

    calls: int
    """Calls that were made; none of them is a sample."""
    busy_ms: float
    """Total milliseconds of these calls."""
    call_ms: float
    """Mean of the last window."""
    stable: bool
    """Whether the last windows agreed before the time limit."""
    resident_bytes: int
    """Memory of the child process, including shared pages."""


class Loaded(TypedDict):
    """Facts about an engine that is loaded and warm."""

    warm_up: WarmUpFacts
    """How the warm-up went."""
    engine: dict[str, object]
    """Facts that the engine reports."""
    device_state: dict[str, object]
    """State of the device; empty if the back-end does not report it."""


class Bench:
    """Loads, times and frees the engines of one target.

    Args:
        bundle: Folder of the bundle.
        target: Canonical text of the target.
    """

    def __init__(self, bundle: str, target: str) -> None:
        from dsc_split.bundle import Bundle

        self._bundle = Bundle.open(Path(bundle))
        self._target = target
        self._loaded: dict[str, tuple[EngineLike, Callable[[], object]]] = {}
        self._sides: dict[str, SideEngines] = {}

    def load(self, graph: str, side: str, batch: int, warm_up_ms: float) -> Loaded:
        """Load an engine, make its inputs, and call it until it is warm."""
        from dsc_split.engines.side._inputs import engine_inputs

        engines = self._engines(side)
        found = next(item for item in engines.graphs if item.path == graph)
        engine = engines.load(found, batch)
        with engine.errors():
            inputs = engine_inputs(self._bundle, found, [spec.name for spec in engine.inputs], batch)
            call = engine.bind(inputs)
            facts = getattr(engine, "facts", {})
            warm = warm_up(call, warm_up_ms, jit=bool(facts.get("jit")))
        self._loaded[graph] = (engine, call)
        return {
            "warm_up": {
                "calls": warm.calls,
                "busy_ms": warm.busy_ms,
                "call_ms": warm.call_ms,
                "stable": warm.stable,
                "resident_bytes": own_bytes(),
            },
            "engine": dict(facts),
            "device_state": engines.backend.live_state(),
        }

    def round(self, graph: str, side: str, count: int, period_ms: float | None) -> dict[str, Any]:
        """Time some calls in a row and return the document of a ``Round``.

        The first call is not counted: it runs in caches that another engine has filled.
        """
        engine, call = self._loaded[graph]
        started = now()
        compute_ms: list[float] = []
        measure = getattr(call, "compute_ms", None)
        after = None if measure is None else (lambda: compute_ms.append(measure()))
        with engine.errors():
            if period_ms is None:
                first, *rest = time_calls(call, count + 1, after=after)
            else:
                first, *rest = time_paced_calls(call, count + 1, period_ms, after=after)
        state = self._engines(side).backend.live_state()
        measured = Round(
            started=started,
            samples_ms=tuple(sample / 1e6 for sample in rest),
            first_after_pause_ms=() if period_ms is None else (first / 1e6,),
            compute_ms=UNSET if measure is None else tuple(compute_ms[1:]),
            device_state=state or UNSET,
        )
        return to_document(measured)

    def unload(self, graph: str) -> None:
        """Free an engine."""
        engine, _ = self._loaded.pop(graph)
        engine.close()

    def _engines(self, side: str) -> SideEngines:
        from dsc_split.engines import SideEngines

        if side not in self._sides:
            self._sides[side] = SideEngines(self._bundle, side, self._target)
        return self._sides[side]
