"""Child processes: work that may crash, hang or run out of memory, away from the process that asks for it.

A program is a class; its public methods are what can be asked. The child makes one object of it and answers one request
after the other::

    class Adder:
        def __init__(self, start: int) -> None:
            self._sum = start

        def add(self, number: int) -> int:
            self._sum += number
            return self._sum

    with Child(ChildOptions(time_limit_s=10.0), Adder, start=1) as child:
        child.ask(Adder.add, 2)  # 3

Arguments and results are JSON. The child is started anew, not forked, and imports the module of the class by its name.

Both ends are here. A request is one JSON line on the child's standard input, ``{"do", "arguments", "named"}``; its
answer is one JSON line on a pipe of its own, ``{"result"}`` or ``{"error", "reason"}``. What libraries print to
standard output goes to standard error, which a file takes: its last line explains a death.
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
"""Exit status of a child whose requests ended."""
LOG_BYTES = 4000
"""So many bytes at the end of what a child printed are searched for its last line."""
KILL_S = 10.0
"""Seconds that a child may take to be gone once it was killed."""
PR_SET_PDEATHSIG = 1
"""Of Linux: ask for a signal when the parent dies."""

ERROR_KINDS: dict[str, type[DscError]] = {name: getattr(errors, name) for name in errors.__all__}
"""What errors are called in answers."""


class ChildDied(BackendError):  # noqa: N818 - what happened, not what is wrong with the caller
    """A child process ended before it answered."""


class ChildOutOfMemoryError(ChildDied, OutOfMemoryError):
    """A child process ended for want of memory."""


class ChildTimeoutError(ChildDied):
    """A child process did not answer in time, and was killed."""


@dataclass(frozen=True, kw_only=True)
class ChildOptions:
    """What a child process may do, and how it ends."""

    label: str = "worker process"
    """What it is, for messages."""
    memory_limit_bytes: int | None = None
    """Memory that it may hold of its own, set before it imports anything large; ``None``: as much as there is."""
    time_limit_s: float | None = None
    """Seconds that an answer may take, also where a native call never returns; ``None``: any time."""
    grace_s: float = 5.0
    """Seconds that it has to end in before it is killed."""
    cleans_up: bool = False
    """Whether its program has a ``close()`` that must run however this process ends.

    Such a child is not killed with its parent, signals for the whole terminal do not reach it, and it prints to the
    standard error of its parent. Any other child ends at once when its parent does.
    """


class Child(Generic[Program]):
    """A child process that answers requests; a context manager that ends it.

    Use it from the thread that made it: on Linux it is killed when that thread ends, as it is with the process.

    Args:
        options: What it may do.
        program: A class at the top of a module that the child can import.
        arguments: What the class is made with, as JSON.
        named: The same, by name.

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
        # Ctrl-C is for this process alone. Blocked signals stay blocked in the child until it ignores this one.
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
        """Call a method of the child's program and return what it returns.

        Args:
            request: The method, as the class has it: ``Adder.add``.
            arguments: Its arguments, as JSON.
            named: The same, by name.

        Raises:
            DscError: What the method raised, of the same class.
            OutOfMemoryError: Memory ended; ChildDied, too, if the child did not survive it.
            ChildTimeoutError: There was no answer in time.
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
        """Do what :meth:`ask` does, with a time limit of its own in seconds; ``None``: any time."""
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
        """End the child: it goes when its requests end, and is killed where it does not, or where there is an error."""
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
        """Wait until a pipe is ready; kill the child where the time is over.

        Raises:
            ChildTimeoutError: It is over.
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
        """Kill the child; a driver that hangs may hold it even so, and is not waited for."""
        self._process.kill()
        try:
            self._process.wait(timeout=KILL_S)
        except subprocess.TimeoutExpired:
            logger.warning("%s %d cannot be killed: the system holds it", self._options.label, self.pid)

    def _explain_death(self) -> ChildDied:
        """Return how the child ended: killed, and words of want of memory, count as want of memory."""
        status = self._process.wait()
        how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        last = self._last_line()
        text = f"{self._options.label} {how} ({last[:300] or 'it said nothing'})"
        logger.info("%s", text)
        starved = status == -signal.SIGKILL or says_out_of_memory(last)
        self._death = ChildOutOfMemoryError(f"{text}: out of memory.") if starved else ChildDied(f"{text}.")
        return self._death

    def _last_line(self) -> str:
        """Return the last line that the child printed and that is not empty."""
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
    """Be the child: answer requests until they end.

    Args:
        start_text: What to do, as JSON; see :class:`Child`.
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
            item.close()  # type: ignore[attr-defined]  # programs that clean up have it


def _kind_of(error: DscError) -> str:
    """Return the name of the first class of an error that the other end knows."""
    return next(base.__name__ for base in type(error).__mro__ if ERROR_KINDS.get(base.__name__) is base)


def _die_with(parent: int) -> None:
    """Let this process be killed when its parent dies, whatever it is doing; at once where that has happened.

    Elsewhere than on Linux the end of the requests does it, which a native call may hold up.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(PARENT_GONE)


def _limit_memory(size_bytes: int | None) -> None:
    """Let this process hold so much memory of its own, and write no core files."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        soft = size_bytes if hard == resource.RLIM_INFINITY else min(size_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _from_thread(requests: IO[str]) -> Iterable[str]:
    """Yield requests; a thread reads them, so that their end ends this process also in the middle of one."""
    waiting: queue.Queue[str] = queue.Queue()

    def read() -> NoReturn:
        for line in requests:
            waiting.put(line)
        os._exit(PARENT_GONE)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield waiting.get()
