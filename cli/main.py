"""The program ``dsc-split``: runs a command, and turns every error into one line and an exit code.

Only the command that is asked for is imported, so that ``dsc-split --help`` is fast.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import inspect
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import typer

from dsc_split import __version__
from dsc_split.errors import DscError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "export": "Export a model into a bundle.",
    "cuts": "List the places where a model can be cut.",
    "cut": "Cut a bundle's model anew, into other pairs.",
    "build": "Build the engines of one side for a target.",
    "check": "Check the engines of one side against the golden samples.",
    "bench": "Time every head and tail at every batch; write the table.",
    "table": "Write and show the split lookup table.",
    "pick": "Name the best choice for a batch size and a data rate.",
    "memory": "Measure what engines take that are kept loaded.",
    "compare": "Compare the times and choices of two bundles or tables.",
    "merge": "Unite what was built and timed on other machines.",
    "pack": "Pack a bundle, or one side of it, into one file.",
    "verify": "Verify every file of a bundle, and who signed it.",
    "unpack": "Verify a packed bundle, and unpack it.",
    "keygen": "Make a pair of keys to sign bundles with.",
    "export-triton": "Write a model repository for Triton.",
    "replay": "Replay a varying link through a lookup table.",
    "cmake-dir": "Print where the CMake files of the C++ headers lie.",
    "cache": "Show the built engines kept for later, or remove them.",
    "doctor": "Say what is installed here, and what is missing for what.",
}
"""Each command's line in ``--help``: the beginning of the docstring of function NAME in ``dsc_split.cli._NAME``, with
underscores for hyphens."""

EPILOG = (
    "Rates are in MB/s (1 MB = 10^6 bytes). Exit codes: 0 done, 1 any other error, 2 wrong usage, 3 no such "
    "cut or no proof, 4 a back-end failed, 5 a back-end is missing, 6 a file is damaged."
)

Verbose = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, show_default=False, help="Say what is done; twice: say everything."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_INTERRUPTED = 130
"""Exit code of Typer when it is interrupted while it reads the arguments."""

_debug = False


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program, and exit.

    Args:
        arguments: The arguments after the program's name; ``None``: those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _buffer_stdout()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    with _exit_on_error():
        try:
            _make_app(arguments)(args=arguments, prog_name="dsc-split")
        except SystemExit as e:
            if e.code == _INTERRUPTED:
                raise KeyboardInterrupt from e
            raise
        finally:
            sys.stdout.flush()
    raise SystemExit(0)


def _buffer_stdout() -> None:
    """Add a buffer to stdout if Python runs unbuffered: without one, text is lost when a disk or pipe is full."""
    stream = sys.__stdout__
    if stream is sys.stdout and isinstance(stream, io.TextIOWrapper) and isinstance(stream.buffer, io.RawIOBase):
        encoding, terminal = stream.encoding, stream.isatty()
        raw = stream.buffer
        stream.detach()
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, line_buffering=terminal)


def _make_app(arguments: Sequence[str]) -> typer.Typer:
    """Make the application; commands that are not among ``arguments`` only get their help line."""
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.callback(epilog=EPILOG)(_root)
    for name, summary in COMMANDS.items():
        if name in arguments:
            app.command(name)(_add_shared_options(_load(name)))
        else:
            app.command(name, help=summary)(_not_asked_for)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"dsc-split {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Split a model between a device and a server, and know at which data rate which split is fastest."""
    _set_up(verbose, debug)


def _not_asked_for() -> None:
    raise AssertionError("a command whose name is not among the arguments was run")


def _load(name: str) -> Callable[..., None]:
    """Import the function of a command."""
    name = name.replace("-", "_")
    function: Callable[..., None] = getattr(importlib.import_module(f"dsc_split.cli._{name}"), name)
    return function


def _add_shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the shared options to a command, and handle its errors."""
    signature = inspect.signature(function, eval_str=True)
    shared = {"verbose": Verbose, "debug": Debug}
    defaults: dict[str, object] = {"verbose": 0, "debug": False}
    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
        for name, annotation in shared.items()
    ]

    @functools.wraps(function)
    def command(*, verbose: int, debug: bool, **options: object) -> None:
        _set_up(verbose, debug)
        with _exit_on_error():
            function(**options)

    parameters = [*signature.parameters.values(), *extra]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # read by Typer
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


# ---- errors ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _exit_on_error() -> Iterator[None]:
    """Turn an error of the block into a message on stderr and an exit code."""
    try:
        yield
    except DscError as e:
        _fail(str(e), e.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted: what is finished stays.", 1)
    except MemoryError:
        _fail("out of memory. Try a smaller batch or a smaller model, or free memory.", 1)
    except BrokenPipeError:
        # The reader of our output has closed it: print nothing, not even when Python flushes stdout at exit.
        _discard_if_unwritable(sys.stdout)
        raise SystemExit(1) from None
    except OSError as e:
        _discard_if_unwritable(sys.stdout)
        full = "; free some space and run it again" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        place = f"{e.filename!r}: " if e.filename is not None else ""
        _fail(f"{place}{e.strerror or e}{full}.", 1)
    except (typer.Abort, typer.BadParameter, typer.Exit):
        raise  # Typer prints what is wrong with the usage, and exits.
    except Exception as e:
        hint = "" if _debug else " Run it again with --debug to see where."
        _fail(f"internal error: {type(e).__name__}: {e}.{hint}", 1)


def _fail(message: str, exit_code: int) -> NoReturn:
    if _debug:
        import traceback

        traceback.print_exc()
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    print("\033[31merror:\033[0m" if colour else "error:", message, file=sys.stderr)
    raise SystemExit(exit_code) from None


def _discard_if_unwritable(stream: TextIO) -> None:
    """Discard the buffer of a stream that cannot be written: Python would print an error at exit."""
    try:
        stream.flush()
    except OSError:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())


# ---- logging -----------------------------------------------------------------------------------------------


class _ConsoleHandler(logging.Handler):
    """Writes log records to stderr, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from dsc_split.cli._console import err

        try:
            err.print(f"{record.levelname.lower()}: {self.format(record)}", soft_wrap=not err.is_terminal)
        except Exception:
            self.handleError(record)


def _set_up(verbose: int, debug: bool) -> None:
    """Set the amount of output; called for the program's options and for the command's, and the larger one counts."""
    global _debug
    _debug = _debug or debug
    root, ours = logging.getLogger(), logging.getLogger("dsc_split")
    if not any(isinstance(handler, _ConsoleHandler) for handler in root.handlers):
        root.addHandler(_ConsoleHandler())
        logging.captureWarnings(True)
        ours.setLevel(logging.WARNING)
        root.setLevel(logging.ERROR)
    if verbose:
        level, others = (logging.INFO, logging.WARNING) if verbose == 1 else (logging.DEBUG, logging.INFO)
        ours.setLevel(min(ours.level, level))
        root.setLevel(min(root.level, others))
