"""The table of executors, by name."""

from __future__ import annotations

from collections.abc import Callable

from dsc_split.benchmarks.sweep.executors._executor import Executor
from dsc_split.benchmarks.sweep.executors._local import LocalExecutor

__all__ = ["EXECUTORS"]

EXECUTORS: dict[str, Callable[[], Executor]] = {"local": LocalExecutor}
"""Class of each executor by its name; ``local`` is the default."""
