"""The child process that loads engines and measures their memory.

Only the memory that the engines add is counted: the library is loaded before the first reading.
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

__all__ = ["HeldMemory", "Residency"]

RELOADS = 3
"""How often an engine is loaded again, to time the loading."""


class HeldMemory(TypedDict):
    """Memory of engines after one run."""

    resident_bytes: int | None
    """Added memory of the child process; ``None`` if they could not run."""
    gpu_bytes: int | None
    """Added memory of the GPU; ``None`` if they do not run on one."""
    load_ms: float | None
    """Milliseconds to load the engine when its library is in use already; ``None`` for several engines."""
    first_run_ms: float | None
    """Milliseconds of the first run after that; ``None`` for several engines."""


class Residency:
    """Loads engines of one side, and keeps them loaded.

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

    def hold(self, engines: Sequence[tuple[str, int]]) -> HeldMemory:
        """Load engines, run each once, and return their memory; a single one is timed, too.

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
        load_ms, first_run_ms = self._time_loading(*wanted[0]) if len(wanted) == 1 else (None, None)
        return {
            "resident_bytes": taken_bytes,
            "gpu_bytes": gpu_bytes,
            "load_ms": load_ms,
            "first_run_ms": first_run_ms,
        }

    def _time_loading(self, graph: SideGraph, batch: int) -> tuple[float, float]:
        """Time loading and the first run when the library is in use already; both are multiplied by the slowdown."""
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
        """Run an engine once; return the milliseconds. Its inputs and outputs are freed afterwards."""
        from dsc_split.engines.side._inputs import engine_inputs

        inputs = engine_inputs(self._bundle, graph, [spec.name for spec in engine.inputs], batch)
        with engine.errors():
            start = time.perf_counter()
            engine.bind(inputs)()
            return 1e3 * (time.perf_counter() - start)


def _free_gpu_bytes() -> int:
    runtime = require("cuda.bindings.runtime", extra="gpu", purpose="tell the memory of the GPU")
    error, free_bytes, _ = runtime.cudaMemGetInfo()
    if int(error):
        raise BackendError(f"CUDA cannot tell the free memory of the GPU ({error.name}).")
    return int(free_bytes)
