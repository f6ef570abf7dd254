"""Engines that are timed together: loaded in one worker process, one round of each in turn."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split.benchmarks.sweep._environment import live_state
from dsc_split.benchmarks.sweep._process import Worker, WorkerDied
from dsc_split.benchmarks.sweep._statistics import MIN_ROUNDS
from dsc_split.errors import BackendError, BackendUnavailable, OutOfMemoryError

if TYPE_CHECKING:
    from dsc_split.benchmarks.sweep._tasks import BenchSettings, Task

__all__ = ["Group"]

logger = logging.getLogger(__name__)

TRIES = 2
"""How often a cell is tried in one run before it counts as failed."""


class Group:
    """All tasks of one target at one batch size.

    They run together as far as memory goes, so that drift hits all alike. Where it ends, the rest follow in
    further worker processes, together with one engine of the first, which is timed again beside them. A task
    that fails is tried once more, alone.

    Args:
        bundle: The bundle's folder.
        settings: How to measure.
        memory_limit_bytes: What the engines of one worker process may hold together.
        finish: Called with task, status and reason as soon as a cell is done.
        announce: Called with a task when it is its turn.
    """

    def __init__(
        self,
        bundle: Path,
        settings: BenchSettings,
        memory_limit_bytes: int,
        finish: Callable[[Task, str, str], None],
        announce: Callable[[Task], None],
    ) -> None:
        self._bundle = bundle
        self._settings = settings
        self._memory_limit_bytes = memory_limit_bytes
        self._finish = finish
        self._announce = announce
        self._common: Task | None = None
        self._capacity = 0

    def run(self, tasks: Sequence[Task]) -> None:
        """Measure all tasks; each is finished when this returns.

        Raises:
            BackendUnavailable: The back-end or its device is not there.
        """
        self._common, self._capacity = None, len(tasks)
        while waiting := [task for task in tasks if not task.done]:
            fresh = [task for task in waiting if not task.failures]
            members = fresh[: self._capacity] if fresh else waiting[:1]
            common = self._common if fresh and self._capacity > 1 else None
            if common is not None and common.done:
                members = [common, *members[: self._capacity - 1]]
            self._run_together(members)

    def _run_together(self, members: list[Task]) -> None:
        """Load what fits, and time it; what does not fit or fails is left for another time."""
        bundle, target = self._bundle, members[0].target
        with Worker(bundle, target, self._memory_limit_bytes) as worker:
            loaded: list[Task] = []
            for task in members:
                try:
                    fits = self._load(worker, task, loaded)
                except BackendUnavailable:
                    raise
                except BackendError as e:
                    self._blame(task, e, among=len(loaded) + 1)
                    if isinstance(e, WorkerDied):
                        return
                    if isinstance(e, OutOfMemoryError):
                        break
                    continue
                if not fits:
                    break
                loaded.append(task)
            if self._common is None and loaded and len(loaded) < len(members):
                self._common = loaded[0]
            self._time(worker, loaded)

    def _load(self, worker: Worker, task: Task, loaded: list[Task]) -> bool:
        """Load and warm up one engine; tells whether all that is loaded now fits into the memory allowed."""
        self._announce(task)
        task.start = live_state()
        warm_up = worker.ask(
            "load",
            graph=task.graph.path,
            side=task.side,
            batch=task.question.batch,
            warm_up_ms=self._settings.warm_up_ms,
        )
        resident_bytes = warm_up["resident_bytes"]
        if loaded and resident_bytes > self._memory_limit_bytes:
            logger.info("%s does not fit beside %d others: %d bytes", task.label, len(loaded), resident_bytes)
            worker.ask("unload", graph=task.graph.path)
            self._capacity = len(loaded)
            return False
        task.device_state, task.engine = warm_up.pop("device_state", {}), warm_up.pop("engine", {})
        task.warm_up = {**warm_up, "engines_loaded": len(loaded) + 1}
        return True

    def _time(self, worker: Worker, loaded: list[Task]) -> None:
        """Run one round of each in turn until every one is done."""
        again = {id(task): len(task.rounds) + MIN_ROUNDS for task in loaded if task.done}
        active = list(loaded)
        while active:
            for task in list(active):
                self._announce(task)
                start = time.perf_counter()
                try:
                    self._round(worker, task, additional=id(task) in again)
                except BackendUnavailable:
                    raise
                except BackendError as e:
                    self._blame(task, e, among=len(active))
                    if isinstance(e, WorkerDied):
                        return
                    active.remove(task)
                    continue
                verdict = task.verdict(self._settings)
                task.busy_s += time.perf_counter() - start
                if id(task) in again:
                    enough = len(task.rounds) >= again[id(task)]
                    verdict = (verdict or ("unstable", "time limit")) if enough else None
                if verdict is not None:
                    self._finish(task, *verdict)
                    active.remove(task)
                    try:
                        worker.ask("unload", graph=task.graph.path)
                    except WorkerDied as e:
                        logger.warning("%s: its cell is written, but the worker failed after it: %s", task.label, e)
                        return

    def _round(self, worker: Worker, task: Task, *, additional: bool) -> None:
        period_ms = self._settings.period_ms
        answer: dict[str, Any] = worker.ask(
            "round", graph=task.graph.path, side=task.side, count=task.calls(self._settings), period_ms=period_ms
        )
        task.rounds.append({**answer, "additional": True} if additional else answer)

    def _blame(self, task: Task, error: BackendError, *, among: int) -> None:
        """Decide what an error of ``task`` means, ``among`` so many loaded engines.

        Memory that ends in a crowd is the crowd's fault: fewer are loaded next time. Else it is its own.
        """
        logger.info("%s: %s", task.label, error)
        if task is self._common:
            self._common = None
        if isinstance(error, OutOfMemoryError) and among > 1:
            self._capacity = among - 1
            return
        if task.done:  # it was timed again beside others; its cell stands
            return
        task.failures += 1
        if isinstance(error, OutOfMemoryError):
            self._finish(task, "out-of-memory", str(error))
        elif task.failures >= TRIES:
            self._finish(task, "failed", str(error))
