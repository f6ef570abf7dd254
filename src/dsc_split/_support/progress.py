"""How long work tells what it is doing: the library calls a listener, and never prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "ProgressListener", "silent"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One step of a long task."""

    stage: str
    """What kind of work: ``export``, ``prove``, ``bench device``, ..."""
    label: str
    """What is running now, in words."""
    done: int
    """Steps that are finished."""
    total: int
    """Steps in all; 0 where it is not known."""
    unit: str = "steps"
    """What is counted."""


ProgressListener = Callable[[Progress], None]
"""Called from the thread that does the work; it must not raise."""


def silent(progress: Progress) -> None:
    """Ignore the progress."""
