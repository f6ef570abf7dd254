"""Runs ``dsc-split`` in children of one process that has imported everything, and kills them when told to.

It reads JSON lines from standard input, each a list of what is run at once: ``{"arguments", "folder", "kill_after_s",
"kill_at_step", "largest_file_bytes"}``, and answers with a list of ``{"status", "output", "duration_s", "steps"}``. A
step is one thing that Python is about to do to the file system: open a file for writing, rename, remove, make a folder.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import types
from typing import IO, Any

import dsc_split
import dsc_split._support.child
from dsc_split.cli import main as program

OTHERS = (
    "filelock",
    "onnx.checker",
    "onnx.version_converter",
    "onnx_ir.passes.common",
    "onnxruntime",
    "platformdirs",
    "psutil",
    "rich.progress",
    "rich.table",
    "tensorrt_rtx",
)
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


class ForkedChild:
    """What ``subprocess.Popen`` gives, of a child that need not start Python anew."""

    def __init__(
        self,
        command: list[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        pass_fds: list[int],
        start_new_session: bool,
    ) -> None:
        assert (stdin, start_new_session) == (subprocess.PIPE, False)
        here, there = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            for fd, standard in ((here, 0), (stdout.fileno(), 1), (stderr.fileno(), 2)):
                os.dup2(fd, standard)
            (answers,) = pass_fds
            os.closerange(3, answers)
            os.closerange(answers + 1, os.sysconf("SC_OPEN_MAX"))
            dsc_split._support.child.serve(command[-1])
        os.close(here)
        self.stdin = os.fdopen(there, "wb")

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        del timeout  # a child that does not end hangs the test, which has a limit of its own
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Steps:
    """Counts what is about to be done to the file system, and kills the process before a step that is asked for."""

    def __init__(self, kill_at: int | None, told: int) -> None:
        self._kill_at = kill_at
        self._told = told
        self._pid = os.getpid()
        self._count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (not writes and event not in CHANGES) or os.getpid() != self._pid:
            return
        self._count += 1
        os.pwrite(self._told, b"%8d" % self._count, 0)
        if self._count == self._kill_at:
            os.kill(self._pid, signal.SIGKILL)


class Running:
    """A command in a child of this process."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._output, self._told = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 - closed in finish
        self._kill_after_s = request["kill_after_s"]
        self._start = time.perf_counter()
        self._pid = os.fork()
        if self._pid == 0:
            _command(request, self._output.fileno(), self._told.fileno())

    def finish(self) -> dict[str, Any]:
        """Wait for its end, or kill it when its time has come; its workers go with it."""
        if self._kill_after_s is not None and not self._ends_in(self._kill_after_s):
            os.kill(self._pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        duration_s = time.perf_counter() - self._start
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        with self._output as output, self._told as told:
            output.seek(0)
            told.seek(0)
            words, steps = output.read().decode(errors="replace"), int(told.read() or 0)
        return {"status": status, "output": words, "duration_s": duration_s, "steps": steps}

    def _ends_in(self, seconds: float) -> bool:
        fd = os.pidfd_open(self._pid)
        ended, _, _ = select.select([fd], [], [], seconds)
        os.close(fd)
        return bool(ended)


def _command(request: dict[str, Any], output: int, told: int) -> None:
    """Be the command; never returns."""
    status = 1
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(request["folder"])
        if request["largest_file_bytes"] is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does; writes then fail with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file_bytes"], resource.RLIM_INFINITY))
        sys.argv = ["dsc-split", *request["arguments"]]
        sys.addaudithook(Steps(request["kill_at_step"], told))
        program.main()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def import_all() -> None:
    """Import what commands import when they run, so that no child has to."""
    for name in OTHERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for found in pkgutil.walk_packages(dsc_split.__path__, "dsc_split."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        program.main(["pick", "no such bundle", "--batch", "1"])  # what reads arguments is imported late
    gc.freeze()


def main() -> None:
    """Serve until standard input ends."""
    import_all()
    forking = types.SimpleNamespace(Popen=ForkedChild, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
    vars(dsc_split._support.child)["subprocess"] = forking
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        running = [Running(request) for request in json.loads(line)]
        answers.write(json.dumps([each.finish() for each in running]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
