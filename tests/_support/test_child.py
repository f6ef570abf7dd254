"""The kit for child processes: answers, errors, limits, deaths, and no orphans."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tests.support.child_programs import Mark, Sum
from tests.support.paths import ROOT

import dsc_split
from dsc_split import errors
from dsc_split._support.child import (
    PARENT_GONE,
    START,
    Child,
    ChildDied,
    ChildOptions,
    ChildOutOfMemoryError,
    ChildTimeoutError,
)
from dsc_split.errors import BundleError, DscError, OutOfMemoryError, UsageError

MIB = 2**20
OPTIONS = ChildOptions(time_limit_s=60.0)


@pytest.fixture(autouse=True)
def _programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children find the programs of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "it is still there"
            time.sleep(0.01)


# ---- asking ------------------------------------------------------------------------------------------------------


def test_a_child_keeps_its_state_and_ends_with_the_block() -> None:
    with Child(OPTIONS, Sum, start=1) as child:
        assert child.ask(Sum.add, 2) == 3
        assert child.ask(Sum.add, number=4) == 7
        assert child.status is None

    assert child.status == PARENT_GONE
    assert not psutil.pid_exists(child.pid)


def test_requests_and_answers_may_be_larger_than_a_pipe() -> None:
    text = "\u00e9\n" * MIB
    with Child(OPTIONS, Sum) as child:
        assert child.ask(Sum.repeat, text) == text


@pytest.mark.parametrize("kind", [*errors.__all__])
def test_an_error_comes_back_as_its_own_class_and_the_child_goes_on(shared: Child[Sum], kind: str) -> None:
    with pytest.raises(DscError, match="got 'x'") as caught:
        shared.ask(Sum.fail, kind, "got 'x'")

    assert type(caught.value) is getattr(errors, kind)
    assert shared.ask(Sum.repeat, "y") == "y"


def test_an_error_of_an_unknown_class_comes_back_as_the_nearest_known_one(shared: Child[Sum]) -> None:
    with pytest.raises(BundleError) as caught:
        shared.ask(Sum.fail, "OwnBundleError", "no")

    assert type(caught.value) is BundleError


def test_an_error_of_the_program_itself_is_the_answer_to_the_first_request() -> None:
    with Child(OPTIONS, Sum, -1) as child, pytest.raises(UsageError, match="below zero"):
        child.ask(Sum.add, 1)


def test_what_libraries_print_does_not_disturb_the_answers(
    shared: Child[Sum], capfd: pytest.CaptureFixture[str]
) -> None:
    assert shared.ask(Sum.print_everywhere) == ""
    assert shared.ask(Sum.repeat, "x") == "x"
    assert capfd.readouterr() == ("", "")


def test_no_file_is_left_open() -> None:
    def open_files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    with Child(OPTIONS, Sum) as child:
        child.ask(Sum.add, 1)
    with contextlib.suppress(ChildDied), Child(OPTIONS, Sum) as child:
        child.ask(Sum.do, "os.abort()")
    assert open_files() == before


def test_a_program_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")

    with pytest.raises(errors.BackendError, match="worker process cannot be started: No such file"):
        Child(OPTIONS, Sum)


@pytest.fixture(scope="module")
def shared() -> Iterator[Child[Sum]]:
    """A child that several tests ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
        with Child(OPTIONS, Sum) as child:
            child.ask(Sum.add, 0)
            yield child


# ---- death -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("os.kill(os.getpid(), 11)", ChildDied, r"worker process ended by SIGSEGV \(it said nothing\)\."),
        ("os.abort()", ChildDied, "ended by SIGABRT"),
        ("os._exit(7)", ChildDied, "ended with status 7"),
        ("os.write(1, b'first\\nlast words\\n \\n'); os._exit(0)", ChildDied, r"status 0 \(last words\)"),
        ("raise KeyError('a bug')", ChildDied, r"status 1 \(KeyError: 'a bug'\)"),
        ("os.kill(os.getpid(), 9)", ChildOutOfMemoryError, "ended by SIGKILL .*: out of memory"),
        ("os.write(2, b'terminate: std::bad_alloc\\n'); os.abort()", ChildOutOfMemoryError, "std::bad_alloc"),
        ("os.write(2, b'Memory allocation still failed after 10 retries'); os._exit(1)", ChildOutOfMemoryError, "10"),
    ],
)
def test_death_is_an_error_that_says_how_and_says_it_again(how: str, error: type[ChildDied], words: str) -> None:
    with Child(OPTIONS, Sum) as child:
        for _ in range(2):
            with pytest.raises(ChildDied, match=words) as caught:
                child.ask(Sum.do, how)
            assert type(caught.value) is error


def test_death_between_two_requests_is_noticed() -> None:
    with Child(OPTIONS, Sum) as child:
        child.ask(Sum.add, 1)
        os.kill(child.pid, signal.SIGTERM)
        wait_until_gone(child.pid)

        with pytest.raises(ChildDied, match="ended by SIGTERM"):
            child.ask(Sum.add, 1)


def test_a_native_call_that_never_returns_is_killed_when_its_time_is_over() -> None:
    with Child(OPTIONS, Sum) as child:
        child.ask(Sum.add, 1)
        start = time.monotonic()
        with pytest.raises(ChildTimeoutError, match=r"worker process did not answer within 0\.5 s and was killed"):
            child.ask_within(0.5, Sum.hang)
        assert 0.5 <= time.monotonic() - start < 10
        with pytest.raises(ChildTimeoutError, match="was killed"):
            child.ask(Sum.add, 1)

    assert child.status == -signal.SIGKILL


# ---- limits ------------------------------------------------------------------------------------------------------


def test_memory_is_limited_before_the_program_is_imported_and_its_end_is_survived() -> None:
    options = ChildOptions(memory_limit_bytes=512 * MIB, time_limit_s=60.0)
    with Child(options, Sum) as child:
        assert child.ask(Sum.data_limit_bytes_at_import) == 512 * MIB
        assert child.ask(Sum.take, 64 * MIB) == 64 * MIB
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            child.ask(Sum.take, 512 * MIB)
        assert child.ask(Sum.add, 1) == 1


def test_no_core_files_are_written(shared: Child[Sum]) -> None:
    assert shared.ask(Sum.core_limit_bytes) == 0


# ---- what it imports ---------------------------------------------------------------------------------------------


def test_nothing_is_imported_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("queue", "json", "resource", "numpy", "checks", "dsc_split")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)

    with Child(OPTIONS, Sum) as child:
        found = child.ask(Sum.files, "queue", "json", "numpy", "dsc_split")
        with pytest.raises(ChildDied, match="ModuleNotFoundError: No module named 'checks'"):
            child.ask(Sum.files, "checks")  # a module beside the program that every child starts with

    assert found[-1] == dsc_split.__file__
    assert not [file for file in found if file is None or file.startswith(str(tmp_path))]


def test_the_package_is_the_parents_whatever_else_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dsc_split.py").write_text("raise SystemExit('another one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    with Child(OPTIONS, Sum) as child:
        assert child.ask(Sum.files, "dsc_split") == [dsc_split.__file__]


def test_pythonpath_and_sitecustomize_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['onnxruntime'] = None")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    with Child(OPTIONS, Sum) as child:
        assert child.ask(Sum.files, "sitecustomize") == [str(tmp_path / "sitecustomize.py")]
        with pytest.raises(ChildDied, match="onnxruntime"):
            child.ask(Sum.files, "onnxruntime")


# ---- signals and the parent's end --------------------------------------------------------------------------------


def test_ctrl_c_never_reaches_the_program() -> None:
    with Child(OPTIONS, Sum) as child:
        for _ in range(20):  # from before Python has started until after it is running
            os.kill(child.pid, signal.SIGINT)
            time.sleep(0.01)
        assert child.ask(Sum.add, 1) == 1
        os.kill(child.pid, signal.SIGINT)
        assert child.ask(Sum.add, 1) == 2


def test_the_child_is_killed_at_once_after_an_error() -> None:
    start = time.monotonic()
    with contextlib.suppress(ZeroDivisionError), Child(ChildOptions(grace_s=60.0), Sum) as child:
        child.ask(Sum.add, 1)
        raise ZeroDivisionError

    assert child.status == -signal.SIGKILL
    assert time.monotonic() - start < 30


KILLED = """
import sys
from tests.support.child_programs import Sum
from dsc_split._support.child import Child, ChildOptions
child = Child(ChildOptions(), Sum)
child.ask(Sum.add, 1)
print(child.pid, flush=True)
child.ask(Sum.hang)
"""


def test_the_child_dies_with_a_killed_parent_even_in_a_native_call_that_never_returns() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.3)
        assert psutil.pid_exists(pid)
        parent.kill()

    wait_until_gone(pid)


def test_a_child_whose_parent_died_before_it_asked_for_the_signal_ends_at_once() -> None:
    start = {
        "program": "tests.support.child_programs:Sum",
        "arguments": [],
        "named": {},
        "parent": 1,
        "answers": 1,
        "memory_limit_bytes": None,
        "cleans_up": False,
    }
    command = [sys.executable, str(START), json.dumps(start)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as orphan:  # its requests do not end
        assert orphan.wait(timeout=60) == PARENT_GONE


# ---- programs that clean up --------------------------------------------------------------------------------------

CLEANS_UP = ChildOptions(cleans_up=True, time_limit_s=60.0, grace_s=20.0)


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_a_program_that_cleans_up_does_so_at_the_end_and_after_an_error(
    tmp_path: Path, error: type[Exception] | None
) -> None:
    mark = tmp_path / "mark"
    with contextlib.suppress(ZeroDivisionError), Child(CLEANS_UP, Mark, str(mark)) as child:
        child.ask(Mark.ready)
        if error is not None:
            raise error

    assert mark.read_text() == "closed"
    assert child.status == 0


def test_signals_for_the_whole_terminal_do_not_reach_a_program_that_cleans_up(tmp_path: Path) -> None:
    with Child(CLEANS_UP, Mark, str(tmp_path / "mark")) as child:
        child.ask(Mark.ready)
        assert os.getpgid(child.pid) != os.getpgid(0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(child.pid, number)
        child.ask(Mark.ready)

    assert (tmp_path / "mark").exists()


def test_a_program_that_takes_too_long_to_clean_up_is_killed(tmp_path: Path) -> None:
    options = ChildOptions(cleans_up=True, grace_s=0.2)
    with Child(options, Mark, str(tmp_path / "mark"), close_s=60.0) as child:
        child.ask(Mark.ready)

    assert child.status == -signal.SIGKILL
    assert not (tmp_path / "mark").exists()


CLEANED = """
import os, sys
from tests.support.child_programs import Mark
from dsc_split._support.child import Child, ChildOptions
child = Child(ChildOptions(cleans_up=True), Mark, sys.argv[1])
child.ask(Mark.ready)
os.kill(os.getpid(), 9)
"""


def test_a_program_cleans_up_after_its_parent_was_killed(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    done = subprocess.run([sys.executable, "-c", CLEANED, str(mark)], timeout=60, check=False)

    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not mark.exists():
        assert time.monotonic() < deadline, "it did not clean up"
        time.sleep(0.01)
