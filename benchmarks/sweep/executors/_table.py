"""The executors that there are, by name."""

from __future__ import annotations

from collections.abc import Callable

from dsc_split.benchmarks.sweep.executors._executor import Executor
from dsc_split.benchmarks.sweep.executors._local import LocalExecutor

__all__ = ["EXECUTORS"]

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor}
"""Name to what makes the executor; ``local`` is the one that runs where none is given."""
