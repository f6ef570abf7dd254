"""Memory: how much is free, what a process holds, and the words that say that it ended."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["available_memory_bytes", "default_memory_limit_bytes", "own_bytes", "own_share_bytes", "says_out_of_memory"]

SHARE_OF_FREE = 0.8
"""Share of the free memory that a child process may hold, where no limit is given."""

_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|bad allocation|failed to allocate|bfcarena|out ?of ?memory|cannot allocate memory|available memory of"
    r"|memory allocation still failed|cudaerrormemoryallocation|status_alloc_failed",
    re.IGNORECASE,
)
"""What native libraries say when memory ends."""


def says_out_of_memory(text: str) -> bool:
    """Return whether a library's message says that memory ended: ``std::bad_alloc``, ``CUDA out of memory``."""
    return _OUT_OF_MEMORY.search(text) is not None


def available_memory_bytes() -> int:
    """Count the memory that can still be had, within the limit of the control group where there is one."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group, or one without a limit, which reads "max"
        return available
    return min(available, max(0, limit - used))


def default_memory_limit_bytes() -> int:
    """Return what a child process may hold where nobody says how much: 80 % of what is free now."""
    return int(SHARE_OF_FREE * available_memory_bytes())


def own_bytes() -> int:
    """Count the memory that this process holds; a page that other processes map too counts in full."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def own_share_bytes() -> int:
    """Count this process's share of the memory: a page that four processes map counts as a quarter.

    Where the system does not tell how many map a page, pages that others map too do not count at all.
    """
    import psutil

    memory = psutil.Process().memory_full_info()
    return int(getattr(memory, "pss", memory.uss))
