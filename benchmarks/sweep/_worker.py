"""The worker process: loads engines and times them, as told by one JSON line per request.

It answers each request with one JSON line on what was its standard output when it started; what native
libraries print goes to standard error. It ends when its standard input ends, also in the middle of a call, so
it never outlives the process that started it.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split.benchmarks.sweep._environment import now
from dsc_split.benchmarks.sweep._process import ERROR_KINDS
from dsc_split.benchmarks.sweep._timer import time_calls, time_paced_calls, warm_up
from dsc_split.errors import DscError

if TYPE_CHECKING:
    from dsc_split.engines import BackendLike, EngineLike, SideEngines

__all__ = ["main", "serve"]

PARENT_GONE = 3
"""Exit status when standard input ends."""


class Bench:
    """The engines that are loaded, and what can be asked of them."""

    def __init__(self, bundle: str, target: str) -> None:
        from dsc_split.bundle import Bundle

        self._bundle = Bundle.open(Path(bundle))
        self._target = target
        self._loaded: dict[str, tuple[EngineLike, Callable[[], object]]] = {}
        self._sides: dict[str, SideEngines] = {}

    def load(self, graph: str, side: str, batch: int, warm_up_ms: float) -> dict[str, Any]:
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
            "calls": warm.calls,
            "busy_ms": warm.busy_ms,
            "call_ms": warm.call_ms,
            "stable": warm.stable,
            "resident_bytes": _resident_bytes(),
            "engine": dict(facts),
            **_device_state(engines.backend),
        }

    def round(self, graph: str, side: str, count: int, period_ms: float | None) -> dict[str, Any]:
        """Time some calls in a row; the first one, which finds another engine's traces, is not among them."""
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
        return {
            "started": started,
            "samples_ms": [sample / 1e6 for sample in rest],
            "first_after_pause_ms": [] if period_ms is None else [first / 1e6],
            **({} if measure is None else {"compute_ms": compute_ms[1:]}),
            **_device_state(self._engines(side).backend),
        }

    def _engines(self, side: str) -> SideEngines:
        from dsc_split.engines import SideEngines

        if side not in self._sides:
            self._sides[side] = SideEngines(self._bundle, side, self._target)
        return self._sides[side]

    def unload(self, graph: str) -> dict[str, Any]:
        """Free an engine."""
        engine, _ = self._loaded.pop(graph)
        engine.close()
        return {}


def serve(request: dict[str, Any], bench: Bench) -> dict[str, Any]:
    """Answer one request; an error that the library raises on purpose is an answer too."""
    arguments = {name: value for name, value in request.items() if name != "do"}
    try:
        return {"ok": True, **getattr(bench, request["do"])(**arguments)}
    except DscError as e:
        return _failure(e)
    except MemoryError:
        return {"ok": False, "kind": "out-of-memory", "reason": "out of memory"}


def _failure(error: DscError) -> dict[str, Any]:
    kinds = {error_type: kind for kind, error_type in ERROR_KINDS.items()}
    return {"ok": False, "kind": kinds.get(type(error), "failed"), "reason": str(error)}


def _device_state(backend: BackendLike) -> dict[str, Any]:
    """Read what the device does right now, where the back-end tells."""
    state = backend.live_state()
    return {"device_state": state} if state else {}


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _read_requests(requests: queue.Queue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(PARENT_GONE)


def main() -> None:
    """Serve until standard input ends. Arguments: bundle, target, and the memory limit in bytes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    bundle, target, memory_limit_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = memory_limit_bytes if hard == resource.RLIM_INFINITY else min(memory_limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        requests: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
        bench: Bench | None = None
        while True:
            request = json.loads(requests.get())
            try:
                bench = bench or Bench(bundle, target)
                answer = serve(request, bench)
            except DscError as e:
                answer = _failure(e)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
