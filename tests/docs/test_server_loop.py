"""The C++ server loop: it switches with the link, and reads its table again while it runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from tests.support.cpp_compiler import build, run
from tests.support.paths import EXAMPLES

from dsc_split import LookupTable

EXAMPLE = EXAMPLES / "cpp_server_loop"
TIME_LIMIT_S = 20.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def program() -> str:
    return str(build(EXAMPLE / "server_loop.cpp", flags=("-O1", "-pthread", "-fsanitize=thread"), json=True))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copy(EXAMPLE / "table.json", tmp_path / "table.json"))


class Server:
    """The program while it runs, in real time."""

    def __init__(self, process: subprocess.Popen[bytes], printed: Path) -> None:
        self.process = process
        self._printed = printed

    def wait_for(self, text: str, *, times: int = 1) -> None:
        """Wait until it has printed ``text`` so many times."""
        end = time.monotonic() + TIME_LIMIT_S
        while self._printed.read_text().count(text) < times:
            assert time.monotonic() < end, self._printed.read_text()
            assert self.process.poll() is None, self._printed.read_text()
            time.sleep(0.02)


Serve = Callable[[Path], AbstractContextManager[Server]]


@pytest.fixture
def serve(program: str, tmp_path: Path) -> Serve:
    @contextmanager
    def start(table: Path) -> Iterator[Server]:
        printed = tmp_path / "printed"
        with printed.open("wb") as file:
            process = subprocess.Popen([program, str(table), "--real-time", "--period", "5"], stdout=file, stderr=file)
        try:
            server = Server(process, printed)
            server.wait_for("unknown-rate")
            yield server
            assert process.poll() is None, printed.read_text()
        finally:
            process.kill()
            process.wait()

    return start


def replace_table(table: Path, text: str) -> None:
    """Replace a table as it should be done: all or nothing."""
    partial = table.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(table)


def changed(table: Path, **values: object) -> str:
    return json.dumps({**json.loads(table.read_text()), **values})


def test_loop_takes_less_time_than_any_choice_alone(program: str, table: Path, tmp_path: Path) -> None:
    rates = tmp_path / "rates.csv"
    rates.write_text("time_s,rate_mb_s\n" + "".join(f"{second},{(60, 1)[second // 20 % 2]}\n" for second in range(81)))

    done = run([program, str(table), "--batch", "8", "--rates", str(rates)])

    assert done.returncode == 0, done.stderr
    picks = [LookupTable.load(table).pick(8, rate_mb_s).choice.name for rate_mb_s in (60, 1)]
    chosen = re.findall(r"estimate .*: (\S+), .* \((?:best|server-down)\)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in itertools.groupby(name for name in chosen if name in picks)] == picks * 2
    means = [float(mean) for mean in re.findall(r"^ *([\d.]+) ms (?:on|with)", done.stdout, re.MULTILINE)]
    policy_ms, ideal_ms, *alone_ms = means
    assert len(alone_ms) == 7
    assert ideal_ms <= policy_ms < 0.9 * min(alone_ms)


def test_tunnel_costs_one_deadline_and_then_runs_on_the_device(program: str, table: Path) -> None:
    done = run([program, str(table)])

    assert done.returncode == 0, done.stderr
    assert "no-offload, 18.0 ms (server-down)" in done.stdout
    assert "missed deadlines 1, refused 0" in done.stdout


def test_table_is_read_again_when_its_file_changes(serve: Serve, table: Path) -> None:
    with serve(table) as server:
        replace_table(table, changed(table, emulated="something else"))
        server.wait_for("table read again")
        replace_table(table, changed(table, emulated=None))
        server.wait_for("table read again", times=2)


def test_table_is_read_again_on_sighup(serve: Serve, table: Path) -> None:
    with serve(table) as server:
        before = table.stat()
        text = table.read_text()
        table.write_text(text.replace('"paper"', '"other"'))
        os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("table read again")


def test_bad_table_is_refused_with_the_reason_and_the_old_one_kept(serve: Serve, table: Path) -> None:
    good = table.read_text()
    with serve(table) as server:
        replace_table(table, good[:-20])
        server.wait_for("table kept: ")
        replace_table(table, good)
        server.wait_for("table read again")
        replace_table(table, changed(table, pair_id="sha256:" + 64 * "0"))
        server.wait_for("is of other pairs than the engines")
        table.unlink()
        server.wait_for("cannot be read")


def test_program_without_a_good_table_says_why_and_ends(program: str, table: Path) -> None:
    table.write_text(changed(table, version=2))

    done = run([program, str(table)])

    assert done.returncode == 1
    assert f"{table}" in done.stderr
    assert "version" in done.stderr


def test_batch_larger_than_the_table_is_refused_at_every_request(program: str, table: Path) -> None:
    done = run([program, str(table), "--batch", "999"])

    assert done.returncode == 0
    assert "request refused: the batch size is larger than every measured one\n" in done.stderr
    assert re.search(r"^requests 0, switches 0, missed deadlines 0, refused 12\d\d$", done.stdout, re.MULTILINE)
