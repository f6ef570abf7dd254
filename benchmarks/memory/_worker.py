"""The program of the child process that loads engines and says what they take.

Only what the engines add is counted: the library is loaded before the first look.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from dsc_split._support.memory import own_share_bytes
from dsc_split._support.optional import require
from dsc_split.errors import BackendError

if TYPE_CHECKING:
    from dsc_split.engines import EngineLike
    from dsc_split.engines.side._sides import SideGraph

__all__ = ["Held", "Residency"]

RELOADS = 3
"""How often an engine is loaded again, alone, for the time it takes."""


class Held(TypedDict):
    """What engines take that are loaded and have run."""

    resident_bytes: int | None
    """Memory of the child process that they added; ``None`` where they could not be run."""
    gpu_bytes: int | None
    """Memory of the GPU that they added; ``None`` where they do not run on one."""
    load_ms: float | None
    """Milliseconds that loading takes once the library is in use; ``None`` for several engines."""
    first_run_ms: float | None
    """Milliseconds of the first run then; ``None`` for several engines."""


class Residency:
    """The engines of one side, loaded and kept.

    Args:
        bundle: Folder of the bundle.
        side: ``device`` or ``server``.
        target: Canonical text of the target.
    """

    def __init__(self, bundle: str, side: str, target: str) -> None:
        from dsc_split.bundle import Bundle
        from dsc_split.engines import SideEngines

        self._bundle = Bundle.open(Path(bundle))
        self._loader = SideEngines(self._bundle, side, target)

    def hold(self, engines: Sequence[tuple[str, int]]) -> Held:
        """Load engines, run each once, and say what they take together; a single one is timed, too.

        Args:
            engines: Path of the graph and batch size of each.
        """
        loader = self._loader
        on_gpu = "gpu" in loader.backend.run_fingerprint()
        graphs = {graph.path: graph for graph in loader.graphs}
        wanted = [(graphs[path], batch) for path, batch in engines]
        free_bytes = _free_gpu_bytes() if on_gpu else 0
        resident_bytes = own_share_bytes()
        held = []
        for graph, batch in wanted:
            engine = loader.load(graph, batch)
            self._run(engine, graph, batch)
            held.append(engine)
        gc.collect()
        taken_bytes = max(0, own_share_bytes() - resident_bytes)
        gpu_bytes = max(0, free_bytes - _free_gpu_bytes()) if on_gpu else None
        for engine in held:
            engine.close()
        load_ms, first_run_ms = self._time(*wanted[0]) if len(wanted) == 1 else (None, None)
        return {
            "resident_bytes": taken_bytes,
            "gpu_bytes": gpu_bytes,
            "load_ms": load_ms,
            "first_run_ms": first_run_ms,
        }

    def _time(self, graph: SideGraph, batch: int) -> tuple[float, float]:
        """Time loading and the first run where the library is in use already; emulation multiplies both."""
        loads_ms, runs_ms = [], []
        for _ in range(RELOADS):
            start = time.perf_counter()
            engine = self._loader.load(graph, batch)
            loads_ms.append(1e3 * (time.perf_counter() - start))
            runs_ms.append(self._run(engine, graph, batch))
            engine.close()
        slowdown = self._loader.backend.target.slowdown
        return slowdown * statistics.median(loads_ms), slowdown * statistics.median(runs_ms)

    def _run(self, engine: EngineLike, graph: SideGraph, batch: int) -> float:
        """Run an engine once; returns the milliseconds. Its inputs and outputs are gone afterwards."""
        from dsc_split.engines.side._inputs import engine_inputs

        inputs = engine_inputs(self._bundle, graph, [spec.name for spec in engine.inputs], batch)
        with engine.errors():
            start = time.perf_counter()
            engine.bind(inputs)()
            return 1e3 * (time.perf_counter() - start)


def _free_gpu_bytes() -> int:
    """Ask CUDA for the free memory of the GPU that engines run on."""
    runtime = require("cuda.bindings.runtime", extra="gpu", purpose="tell the memory of the GPU")
    error, free_bytes, _ = runtime.cudaMemGetInfo()
    if int(error):
        raise BackendError(f"CUDA cannot tell the free memory of the GPU ({error.name}).")
    return int(free_bytes)
