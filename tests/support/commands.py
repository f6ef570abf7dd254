"""Commands of ``dsc-split`` that tests run, and how they ended."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a command ended."""

    status: int
    """Exit code; minus the signal's number where it was killed."""
    output: str
    """What it said, on either stream."""
    duration_s: float
    steps: int
    """How often it was about to change the file system."""


class Commands:
    """Runs commands in a process that has imported everything already."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, *arguments: Any, folder: Path, **fate: Any) -> Run:
        """Run one command in ``folder``.

        Args:
            arguments: What follows the program's name.
            folder: The current folder meanwhile.
            fate: ``kill_after_s``, ``kill_at_step`` or ``largest_file_bytes``.
        """
        (run,) = self.together([arguments], folder=folder, **fate)
        return run

    def together(self, several: Sequence[Sequence[Any]], *, folder: Path, **fate: Any) -> list[Run]:
        """Run several commands at once."""
        no_fate = {"kill_after_s": None, "kill_at_step": None, "largest_file_bytes": None}
        requests = [
            {**no_fate, **fate, "folder": str(folder), "arguments": [str(item) for item in arguments]}
            for arguments in several
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(requests) + "\n")
        self._process.stdin.flush()
        return [Run(**answer) for answer in json.loads(self._process.stdout.readline())]
