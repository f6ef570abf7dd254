"""Memory: the free amount, the amount that a process uses, and messages of libraries that run out of it."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["available_memory_bytes", "default_memory_limit_bytes", "own_bytes", "own_share_bytes", "says_out_of_memory"]

SHARE_OF_FREE = 0.8
"""Share of the free memory that a child process may use without a given limit."""

_OUT_OF_MEMORY = re.compile(
    r"bad_?alloc|bad allocation|failed to allocate|bfcarena|out ?of ?memory|cannot allocate memory|available memory of"
    r"|memory allocation still failed|cudaerrormemoryallocation|status_alloc_failed",
    re.IGNORECASE,
)
"""Messages of native libraries when memory runs out."""


def says_out_of_memory(text: str) -> bool:
    """Return whether a library's message means that memory ran out: ``std::bad_alloc``, ``CUDA out of memory``."""
    return _OUT_OF_MEMORY.search(text) is not None


def available_memory_bytes() -> int:
    """Return the memory that is still available, within the limit of the control group if there is one."""
    import psutil

    available = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group, or its limit is "max", which means none
        return available
    return min(available, max(0, limit - used))


def default_memory_limit_bytes() -> int:
    """Return the memory limit of a child process without a given limit: 80 % of the memory available now."""
    return int(SHARE_OF_FREE * available_memory_bytes())


def own_bytes() -> int:
    """Return the memory of this process; a page that it shares with other processes counts in full."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def own_share_bytes() -> int:
    """Return this process's share of the memory: a page of four processes counts as a quarter.

    If the system does not report how many processes share a page, shared pages do not count.
    """
    import psutil

    memory = psutil.Process().memory_full_info()
    return int(getattr(memory, "pss", memory.uss))
