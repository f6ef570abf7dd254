"""The process that loads engines and says what they take: one request on standard input, one answer as JSON.

Only what the engines add is counted: the library is loaded before the first look. What native libraries print goes to
standard error.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.optional import require
from dsc_split.benchmarks.sweep._worker import Bench, serve
from dsc_split.errors import BackendError

if TYPE_CHECKING:
    from dsc_split.engines import EngineLike, SideEngines
    from dsc_split.engines.side._sides import SideGraph

__all__ = ["Residency", "limit_memory", "main"]

RELOADS = 3
"""How often an engine is loaded again, alone, for the time it takes."""


class Residency(Bench):
    """Engines that are loaded and kept."""

    def hold(self, side: str, engines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Load engines, run each once, and say what they take together; a single one is timed, too.

        Args:
            side: ``device`` or ``server``.
            engines: ``{"graph", "batch"}`` of each.
        """
        loader = self._engines(side)
        on_gpu = "gpu" in loader.backend.run_fingerprint()
        graphs = {graph.path: graph for graph in loader.graphs}
        wanted = [(graphs[item["graph"]], int(item["batch"])) for item in engines]
        free_bytes = _free_gpu_bytes() if on_gpu else 0
        resident_bytes = _resident_bytes()
        held = []
        for graph, batch in wanted:
            engine = loader.load(graph, batch)
            self._run(engine, graph, batch)
            held.append(engine)
        gc.collect()
        answer: dict[str, Any] = {
            "resident_bytes": max(0, _resident_bytes() - resident_bytes),
            "gpu_bytes": max(0, free_bytes - _free_gpu_bytes()) if on_gpu else None,
        }
        for engine in held:
            engine.close()
        if len(wanted) == 1:
            answer |= self._time(loader, *wanted[0])
        return answer

    def _time(self, loader: SideEngines, graph: SideGraph, batch: int) -> dict[str, float]:
        """Time loading and the first run where the library is in use already; emulation multiplies both."""
        loads_ms, runs_ms = [], []
        for _ in range(RELOADS):
            start = time.perf_counter()
            engine = loader.load(graph, batch)
            loads_ms.append(1e3 * (time.perf_counter() - start))
            runs_ms.append(self._run(engine, graph, batch))
            engine.close()
        slowdown = loader.backend.target.slowdown
        times_ms = {"load_ms": statistics.median(loads_ms), "first_run_ms": statistics.median(runs_ms)}
        return {name: slowdown * time_ms for name, time_ms in times_ms.items()}

    def _run(self, engine: EngineLike, graph: SideGraph, batch: int) -> float:
        """Run an engine once; returns the milliseconds. Its inputs and outputs are gone afterwards."""
        from dsc_split.engines.side._inputs import engine_inputs

        inputs = engine_inputs(self._bundle, graph, [spec.name for spec in engine.inputs], batch)
        with engine.errors():
            start = time.perf_counter()
            engine.bind(inputs)()
            return 1e3 * (time.perf_counter() - start)


def _resident_bytes() -> int:
    """Count this process's memory; pages that several processes map count in shares, where the system tells."""
    import psutil

    memory = psutil.Process().memory_full_info()
    return int(getattr(memory, "pss", memory.uss))


def _free_gpu_bytes() -> int:
    """Ask CUDA for the free memory of the GPU that engines run on."""
    runtime = require("cuda.bindings.runtime", extra="gpu", purpose="tell the memory of the GPU")
    error, free_bytes, _ = runtime.cudaMemGetInfo()
    if int(error):
        raise BackendError(f"CUDA cannot tell the free memory of the GPU ({error.name}).")
    return int(free_bytes)


def limit_memory(size_bytes: int) -> None:
    """Let this process hold so much memory of its own, and write no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = size_bytes if hard == resource.RLIM_INFINITY else min(size_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def main() -> None:
    """Answer one request. Arguments: bundle, target, and the memory limit in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    bundle, target, memory_limit_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    limit_memory(memory_limit_bytes)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        request = json.load(sys.stdin)
        print(json.dumps(serve(request, Residency(str(Path(bundle)), target))), file=answers)


if __name__ == "__main__":
    main()
