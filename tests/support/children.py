"""Child processes as the system shows them."""

from __future__ import annotations

import psutil

__all__ = ["children_with"]


def children_with(program: str, text: str = "") -> list[psutil.Process]:
    """List the running children of any process that have a program, such as ``Bench``, and a text in their command."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "child_start.py" in command and f':{program}"' in command and text in command:
            found.append(process)
    return found
