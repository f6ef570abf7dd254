"""Programs of child processes, for tests: see ``dsc_split._support.child``."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import sys
import time
from pathlib import Path

from dsc_split import errors
from dsc_split.errors import BundleError

DATA_LIMIT_BYTES_AT_IMPORT = resource.getrlimit(resource.RLIMIT_DATA)[0]


class OwnBundleError(BundleError):
    """A class that the other end does not know."""


class Sum:
    """Adds numbers, and does what it is told."""

    def __init__(self, start: int = 0) -> None:
        if start < 0:
            raise errors.UsageError("the start is below zero.")
        self._sum = start

    def add(self, number: int) -> int:
        self._sum += number
        return self._sum

    def repeat(self, text: str) -> str:
        return text

    def fail(self, kind: str, reason: str) -> None:
        raise {**vars(errors), "OwnBundleError": OwnBundleError}[kind](reason)

    def do(self, code: str) -> None:
        exec(code, {"os": os, "sys": sys})

    def print_everywhere(self) -> str:
        os.write(1, b'{"result": 1}\n')
        print('{"result": 2}', flush=True)
        return sys.stdin.read()

    def files(self, *modules: str) -> list[str | None]:
        """Import modules, and say where they come from."""
        return [importlib.import_module(name).__file__ for name in modules]

    def data_limit_bytes_at_import(self) -> int:
        return DATA_LIMIT_BYTES_AT_IMPORT

    def core_limit_bytes(self) -> int:
        return resource.getrlimit(resource.RLIMIT_CORE)[0]

    def take(self, size_bytes: int) -> int:
        return len(bytearray(size_bytes))

    def hang(self) -> None:
        """Stay in a native call that lets no other thread of Python run."""
        ctypes.PyDLL(None).sleep(600)


class Mark:
    """Writes a file when it is closed."""

    def __init__(self, path: str, close_s: float = 0.0) -> None:
        self._path = Path(path)
        self._close_s = close_s

    def ready(self) -> None:
        """Do nothing; it is running, then."""

    def close(self) -> None:
        time.sleep(self._close_s)
        self._path.write_text("closed")
