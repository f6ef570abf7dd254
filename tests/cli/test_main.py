from __future__ import annotations

import errno
import inspect
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsc_split import __version__, errors
from dsc_split.cli import main as program
from dsc_split.errors import DscError

Dsc = Callable[..., Any]


def classes_below(base: type[DscError]) -> list[type[DscError]]:
    return [base] + [found for sub in base.__subclasses__() for found in classes_below(sub)]


def raising(error: BaseException) -> Callable[[str], Callable[[], None]]:
    """Stand in for the loader of commands: the command raises ``error``."""

    def doctor() -> None:
        """Fail."""
        raise error

    return lambda name: doctor


def test_help_lists_every_command_with_its_line(dsc: Dsc) -> None:
    outcome = dsc("--help")

    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    listed = re.findall(r"^  ([a-z-]+)  +(\S.*)$", outcome.stdout.partition("Commands:")[2], re.MULTILINE)
    assert dict(listed) == program.COMMANDS


@pytest.mark.parametrize("name", program.COMMANDS)
def test_line_in_help_is_how_the_commands_docstring_begins(name: str) -> None:
    assert (inspect.getdoc(program._load(name)) or "").startswith(program.COMMANDS[name].removesuffix("."))


@pytest.mark.parametrize("name", program.COMMANDS)
def test_every_command_has_help_with_the_shared_options(dsc: Dsc, name: str) -> None:
    outcome = dsc(name, "--help")

    assert outcome.exit_code == 0
    assert program.COMMANDS[name].removesuffix(".") in " ".join(outcome.stdout.split())
    assert "--verbose" in outcome.stdout
    assert "--debug" in outcome.stdout


def test_version_is_printed(dsc: Dsc) -> None:
    outcome = dsc("--version")

    assert (outcome.exit_code, outcome.stdout) == (0, f"dsc-split {__version__}\n")


@pytest.mark.parametrize("arguments", [["exprot"], ["doctor", "--nope"], ["doctor", "stray"], ["-v"]], ids=" ".join)
def test_wrong_usage_exits_with_2_and_prints_nothing_to_stdout(dsc: Dsc, arguments: list[str]) -> None:
    outcome = dsc(*arguments)

    assert outcome.exit_code == 2
    assert outcome.stdout == ""
    assert outcome.stderr


def test_misspelt_command_gets_the_nearest_name(dsc: Dsc) -> None:
    assert "'export'" in dsc("exprot").stderr


@pytest.mark.parametrize("error", classes_below(DscError), ids=lambda error: error.__name__)
def test_each_error_exits_with_the_code_of_its_class(
    dsc: Dsc, monkeypatch: pytest.MonkeyPatch, error: type[DscError]
) -> None:
    monkeypatch.setattr(program, "_load", raising(error("cut 'layer3.0' [bold]does[/bold] not separate.")))

    outcome = dsc("doctor")

    assert outcome.exit_code == error.exit_code
    assert outcome.stderr == "error: cut 'layer3.0' [bold]does[/bold] not separate.\n"
    assert outcome.stdout == ""


def test_exit_codes_are_those_of_the_contract() -> None:
    assert {name: getattr(errors, name).exit_code for name in errors.__all__} == {
        "BackendError": 4,
        "BackendUnavailable": 5,
        "BundleBusyError": 1,
        "BundleError": 6,
        "CutError": 3,
        "DamagedError": 6,
        "DscError": 1,
        "EngineFileError": 6,
        "EngineMismatch": 6,
        "ExportError": 1,
        "ModelFileError": 6,
        "OutOfMemoryError": 4,
        "SignatureError": 6,
        "TableError": 6,
        "UsageError": 2,
    }


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "interrupted: what is finished stays"),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "b4/cells"), "'b4/cells': No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "b4"), "'b4': Permission denied"),
        (ZeroDivisionError("division by zero"), "internal error: ZeroDivisionError: division by zero."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_other_failures_exit_with_1_and_one_line(
    dsc: Dsc, monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    monkeypatch.setattr(program, "_load", raising(error))

    outcome = dsc("doctor")

    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("error: ")
    assert words in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert outcome.stdout == ""


def test_interruption_before_the_command_runs_is_said_too(dsc: Dsc, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "_set_up", interrupt)

    outcome = dsc("doctor")

    assert (outcome.exit_code, outcome.stderr) == (1, "error: interrupted: what is finished stays.\n")


@pytest.mark.parametrize("arguments", [["--debug", "doctor"], ["doctor", "--debug"]], ids=" ".join)
def test_debug_shows_the_traceback(dsc: Dsc, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setattr(program, "_load", raising(ZeroDivisionError("division by zero")))

    outcome = dsc(*arguments)

    assert outcome.exit_code == 1
    assert "Traceback" in outcome.stderr
    assert "--debug" not in outcome.stderr.splitlines()[-1]


def test_reader_that_closes_the_pipe_is_no_error_message() -> None:
    script = f"{sys.executable} -m dsc_split.cli doctor --json | true"

    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert done.stderr == ""


def test_full_disk_under_stdout_is_an_error() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dsc_split.cli", "--version"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )

    assert done.returncode == 1
    assert done.stderr.startswith("error: No space left on device")


def test_output_of_an_unbuffered_python_is_whole_in_a_pipe_that_is_read_slowly(root: Path) -> None:
    # Python's own text layer drops what one write did not take; os.pipe takes 64 KiB at once.
    table = root / "tests" / "data" / "tables" / "golden.json"
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "dsc_split.cli", "table", table, "--json", "--rates", "1"],
        stdout=subprocess.PIPE,
        pipesize=4096,
    ) as running:
        assert running.stdout is not None
        time.sleep(1.0)
        printed = running.stdout.read()

    assert running.returncode == 0
    assert json.loads(printed) == json.loads(table.read_text(encoding="utf-8"))


def test_help_and_import_load_nothing_that_is_slow() -> None:
    script = (
        "import sys; import dsc_split; print(sorted(set(sys.modules) & {'numpy', 'rich', 'typer'}))\n"
        "from dsc_split.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted(set(sys.modules) & {'numpy', 'rich', 'psutil', 'torch', 'onnx'}))"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")


def logging_command(name: str) -> Callable[[], None]:
    def doctor() -> None:
        """Talk."""
        ours, other = logging.getLogger("dsc_split.test"), logging.getLogger("other.library")
        ours.debug("fine detail")
        ours.info("wrote [1] file")
        ours.warning("no useful cut")
        other.warning("odd thing elsewhere")
        print("result")

    return doctor


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["doctor"], ["warning: no useful cut"]),
        (
            ["doctor", "-v"],
            ["info: wrote [1] file", "warning: no useful cut", "warning: odd thing elsewhere"],
        ),
        (
            ["-vv", "doctor"],
            [
                "debug: fine detail",
                "info: wrote [1] file",
                "warning: no useful cut",
                "warning: odd thing elsewhere",
            ],
        ),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_log_goes_to_stderr_as_much_as_was_asked_for(
    dsc: Dsc, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: list[str]
) -> None:
    monkeypatch.setattr(program, "_load", logging_command)

    outcome = dsc(*arguments)

    assert (outcome.exit_code, outcome.stdout) == (0, "result\n")
    assert outcome.stderr.splitlines() == said


def test_warnings_of_other_libraries_are_shown_only_when_asked_for(dsc: Dsc, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Callable[[], None]:
        def doctor() -> None:
            """Warn."""
            warnings.warn("about to change", stacklevel=1)

        return doctor

    monkeypatch.setattr(program, "_load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("always")

        assert dsc("doctor").stderr == ""
        assert "about to change" in dsc("doctor", "-v").stderr
