"""The back-ends there are: one explicit table, and the one place that imports their modules."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.errors import UsageError

if TYPE_CHECKING:
    from dsc_split.engines._base import BackendLike
    from dsc_split.engines._target import Target

__all__ = ["BACKENDS", "BackendEntry", "Option", "get_backend"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One ``key=value`` that a target may carry."""

    name: str
    """The key."""
    parse: Callable[[str], int | float]
    """Turns the value's text into a number; raises ``ValueError`` where it is out of range."""
    expected: str
    """What the value must be, in words, for messages."""
    neutral: int | float | None
    """The value that means the same as leaving the option out; ``None`` where there is no such value."""


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """Where a back-end lives and what its targets may say."""

    module: str
    """Module that is imported when the back-end is first used."""
    cls: str
    """Name of the :class:`~dsc_split.engines.Backend` in that module."""
    architectures: Mapping[str, str]
    """Architecture to the extra that brings its library; the first one is the default."""
    options: tuple[Option, ...]
    """Options, in the order in which a target's text gives them."""


def _thread_count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= 4096:
        raise ValueError(text)
    return count


def _slowdown(text: str) -> float:
    factor = float(text)
    if not (math.isfinite(factor) and factor >= 1):
        raise ValueError(text)
    return factor


THREADS = Option(name="threads", parse=_thread_count, expected="a whole number from 1 to 4096", neutral=None)
SLOWDOWN = Option(name="slowdown", parse=_slowdown, expected="a number from 1", neutral=1.0)
"""Every back-end takes it: emulation belongs to the target, not to the library."""

BACKENDS: dict[str, BackendEntry] = {
    "onnxruntime": BackendEntry(
        module="dsc_split.engines._onnxruntime",
        cls="OnnxRuntimeBackend",
        architectures={"cpu": "cpu", "cuda": "gpu"},
        options=(THREADS, SLOWDOWN),
    ),
}


def get_backend(target: str | Target | BackendLike) -> BackendLike:
    """Give the back-end for a target; its library must be there.

    Args:
        target: A target, its text, or a back-end of one's own, which is given back as it is.

    Raises:
        UsageError: The text names no known back-end, architecture or option.
        BackendUnavailable: The library is not installed, or has no such device.
    """
    from dsc_split.engines._base import Backend
    from dsc_split.engines._target import Target

    if isinstance(target, str):
        target = Target.parse(target)
    if not isinstance(target, Target):
        return target
    entry = BACKENDS[target.backend]
    cls = getattr(importlib.import_module(entry.module), entry.cls)
    backend = cls(target, extra=entry.architectures[target.architecture])
    if not isinstance(backend, Backend):
        raise UsageError(f"back-end {target.backend!r} is registered as {entry.cls!r}, which is no Backend.")
    return backend
