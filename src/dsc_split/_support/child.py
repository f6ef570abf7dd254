"""Child processes: run work that may crash, hang or run out of memory outside the process that needs the result.

A program is a class; its public methods are the possible requests. The child makes one object of the class and answers
one request after the other::

    class Adder:
        def __init__(self, start: int) -> None:
            self._sum = start

        def add(self, number: int) -> int:
            self._sum += number
            return self._sum

    with Child(ChildOptions(time_limit_s=10.0), Adder, start=1) as child:
        child.ask(Adder.add, 2)  # 3

Arguments and results are JSON. The child is a new Python process, not a fork, and imports the class by its name.

This module is both ends. A request is one JSON line on the child's standard input, ``{"do", "arguments", "named"}``;
the answer is one JSON line on a separate pipe, ``{"result"}`` or ``{"error", "reason"}``. Output of libraries goes to a
file; if the child dies, the last line of this file explains why.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Concatenate, Generic, NoReturn, ParamSpec, TypeVar, cast

from dsc_split import errors
from dsc_split._support.memory import says_out_of_memory
from dsc_split.errors import BackendError, DscError, OutOfMemoryError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Child", "ChildDied", "ChildOptions", "ChildOutOfMemoryError", "ChildTimeoutError", "serve"]

logger = logging.getLogger(__name__)

Program = TypeVar("Program")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

START = Path(__file__).absolute().with_name("child_start.py")
PARENT_GONE = 3
"""Exit status of a child whose requests ended, or whose parent died while it started."""
LOG_BYTES = 4000
"""Bytes at the end of a child's output in which its last line is searched."""
KILL_S = 10.0
"""Seconds to wait for a killed child to end."""
PR_SET_PDEATHSIG = 1
"""Option of Linux ``prctl``: send a signal to this process when its parent dies."""

ERROR_KINDS: dict[str, type[DscError]] = {name: getattr(errors, name) for name in errors.__all__}
"""Error classes by their names in answers."""


class ChildDied(BackendError):  # noqa: N818 - the name says what happened
    """A child process ended before it answered."""


class ChildOutOfMemoryError(ChildDied, OutOfMemoryError):
    """A child process ended because memory ran out."""


class ChildTimeoutError(ChildDied):
    """A child process did not answer in time, and was killed."""


@dataclass(frozen=True, kw_only=True)
class ChildOptions:
    """The limits of a child process, and how it ends."""

    label: str = "worker process"
    """Name of the child in messages."""
    memory_limit_bytes: int | None = None
    """Most private memory, set before the child imports large packages; ``None``: no limit."""
    time_limit_s: float | None = None
    """Most seconds for an answer, also if a native call hangs; ``None``: no limit."""
    grace_s: float = 5.0
    """Seconds that it has to end before it is killed."""
    cleans_up: bool = False
    """Whether its program has a method ``close()`` that must run, however this process ends.

    Such a child is not killed when its parent ends, ignores signals to the whole terminal, and prints to the standard
    error of its parent. Any other child ends at once when its parent ends.
    """


class Child(Generic[Program]):
    """A child process that answers requests; as a context manager it ends the process.

    Use it only in the thread that made it: on Linux the child is killed when this thread ends.

    Args:
        options: Limits of the child.
        program: A class at the top level of a module that the child can import.
        arguments: Arguments of the class, which must be JSON.
        named: Keyword arguments of the class.

    Attributes:
        pid: Process id.
        status: Exit status, minus the signal's number where one ended it; ``None`` while it runs.
    """

    def __init__(
        self,
        options: ChildOptions,
        program: Callable[Arguments, Program],
        /,
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> None:
        self._options = options
        self._death: ChildDied | None = None
        self._log: IO[bytes] | None = None
        if not options.cleans_up:
            self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._answers, theirs = os.pipe()
        start = {
            "program": f"{program.__module__}:{program.__qualname__}",
            "arguments": arguments,
            "named": named,
            "parent": os.getpid(),
            "answers": theirs,
            "memory_limit_bytes": options.memory_limit_bytes,
            "cleans_up": options.cleans_up,
        }
        # Ctrl-C must not reach the child: the signal is blocked in it, too, until it ignores the signal.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(START), json.dumps(start)],
                stdin=subprocess.PIPE,
                stdout=self._log or 2,
                stderr=self._log,
                pass_fds=[theirs],
                start_new_session=options.cleans_up,
            )
        except OSError as e:
            self._close_files()
            raise BackendError(f"the {options.label} cannot be started: {e.strerror or e}.") from e
        finally:
            os.close(theirs)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self._process.stdin is not None
        self._requests = self._process.stdin
        os.set_blocking(self._requests.fileno(), False)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, minus the signal's number where one ended it; ``None`` while it runs."""
        return self._process.poll()

    def ask(
        self,
        request: Callable[Concatenate[Program, Arguments], Result],
        /,
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Call a method of the child's program, and return its result.

        Args:
            request: The method of the class: ``Adder.add``.
            arguments: Its arguments, which must be JSON.
            named: Its keyword arguments.

        Raises:
            DscError: The method raised an error of this class.
            OutOfMemoryError: Memory ran out; if the child ended, the error is a ChildOutOfMemoryError.
            ChildTimeoutError: There was no answer in time; the child was killed.
            ChildDied: The child ended.
        """
        return self.ask_within(self._options.time_limit_s, request, *arguments, **named)

    def ask_within(
        self,
        time_limit_s: float | None,
        request: Callable[Concatenate[Program, Arguments], Result],
        /,
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Result:
        """Do the same as :meth:`ask` with another time limit in seconds; ``None``: no limit."""
        document = {"do": request.__name__, "arguments": arguments, "named": named}
        line = self._exchange(json.dumps(document).encode() + b"\n", time_limit_s)
        answer = json.loads(line)
        if "error" in answer:
            raise ERROR_KINDS[answer["error"]](answer["reason"])
        return cast("Result", answer["result"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child: close its requests, and kill it if it does not end in time or the block raised an error."""
        if error is not None and not self._options.cleans_up:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        try:
            self._process.wait(timeout=self._options.grace_s)
        except subprocess.TimeoutExpired:
            self._kill()
        self._close_files()

    def _exchange(self, request: bytes, time_limit_s: float | None) -> bytes:
        """Write a request and read its answer."""
        if self._death is not None:
            raise self._death
        deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        fd = self._requests.fileno()
        while request:
            self._wait(fd, select.POLLOUT, deadline, time_limit_s)
            try:
                request = request[os.write(fd, request) :]
            except BlockingIOError:
                continue
            except BrokenPipeError as e:
                raise self._explain_death() from e
        answer = b""
        while not answer.endswith(b"\n"):
            self._wait(self._answers, select.POLLIN, deadline, time_limit_s)
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise self._explain_death()
            answer += piece
        return answer

    def _wait(self, fd: int, event: int, deadline: float | None, time_limit_s: float | None) -> None:
        """Wait until a pipe is ready; kill the child at the deadline.

        Raises:
            ChildTimeoutError: The deadline has passed.
        """
        poll = select.poll()
        poll.register(fd, event)
        if poll.poll(None if deadline is None else max(0.0, 1e3 * (deadline - time.monotonic()))):
            return
        self._kill()
        text = f"{self._options.label} did not answer within {time_limit_s:g} s and was killed."
        logger.info("%s", text)
        self._death = ChildTimeoutError(text)
        raise self._death

    def _kill(self) -> None:
        """Kill the child, and wait for its end, but not forever: a driver that hangs can keep a killed process."""
        self._process.kill()
        try:
            self._process.wait(timeout=KILL_S)
        except subprocess.TimeoutExpired:
            logger.warning("%s %d cannot be killed: the system holds it", self._options.label, self.pid)

    def _explain_death(self) -> ChildDied:
        """Return the error for a child that ended; SIGKILL, or a message about memory, means that memory ran out."""
        status = self._process.wait()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        last = self._last_line()
        text = f"{self._options.label} {how} ({last[:300] or 'it said nothing'})"
        logger.info("%s", text)
        no_memory = status == -signal.SIGKILL or says_out_of_memory(last)
        self._death = ChildOutOfMemoryError(f"{text}: out of memory.") if no_memory else ChildDied(f"{text}.")
        return self._death

    def _last_line(self) -> str:
        """Return the last line of the child's output that is not empty."""
        if self._log is None:
            return ""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _close_files(self) -> None:
        os.close(self._answers)
        if self._log is not None:
            self._log.close()


# ---- in the child ------------------------------------------------------------------------------------------------


def serve(start_text: str) -> None:
    """Run the child: answer requests until they end.

    Args:
        start_text: Settings as JSON, which ``Child.__init__`` makes.
    """
    start = json.loads(start_text)
    cleans_up: bool = start["cleans_up"]
    for number in (signal.SIGINT, *((signal.SIGTERM, signal.SIGHUP) if cleans_up else ())):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if not cleans_up:
        _die_with(start["parent"])
    _limit_memory(start["memory_limit_bytes"])
    os.set_inheritable(start["answers"], False)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    module, _, name = start["program"].partition(":")
    program = getattr(importlib.import_module(module), name)
    with os.fdopen(start["answers"], "w", encoding="utf-8") as answers:
        made: list[object] = []
        for line in requests if cleans_up else _from_thread(requests):
            request = json.loads(line)
            try:
                if not made:
                    made.append(program(*start["arguments"], **start["named"]))
                answer = {"result": getattr(made[0], request["do"])(*request["arguments"], **request["named"])}
            except DscError as e:
                answer = {"error": _kind_of(e), "reason": str(e)}
            except MemoryError:
                answer = {"error": OutOfMemoryError.__name__, "reason": "out of memory"}
            print(json.dumps(answer), file=answers, flush=True)
        for item in made:
            item.close()  # type: ignore[attr-defined]  # these programs have it


def _kind_of(error: DscError) -> str:
    """Return the name of an error's class, or of its nearest base class that is in ``ERROR_KINDS``."""
    return next(base.__name__ for base in type(error).__mro__ if ERROR_KINDS.get(base.__name__) is base)


def _die_with(parent: int) -> None:
    """Let the system kill this process when its parent dies; exit at once if the parent has already died.

    On systems other than Linux, the process ends when its requests end, which a native call may delay.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(PARENT_GONE)


def _limit_memory(size_bytes: int | None) -> None:
    """Limit the private memory of this process, unless ``None``, and switch off core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = size_bytes if hard == resource.RLIM_INFINITY else min(size_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _from_thread(requests: IO[str]) -> Iterable[str]:
    """Yield requests that a thread reads, so that this process exits when they end, even while it works on one."""
    waiting: queue.Queue[str] = queue.Queue()

    def read() -> NoReturn:
        for line in requests:
            waiting.put(line)
        os._exit(PARENT_GONE)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()
