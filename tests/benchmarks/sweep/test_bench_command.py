"""The commands, and what is left when they are killed, interrupted, or run out of disk."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support.children import children_with
from tests.support.fake_executor import FakeExecutor

from dsc_split.benchmarks import CellStore
from dsc_split.benchmarks.cells._cells import Cell
from dsc_split.benchmarks.sweep.executors._table import EXECUTORS
from dsc_split.bundle import Bundle

DEVICE, SERVER = "onnxruntime:cpu,threads=1,slowdown=6", "onnxruntime:cpu,threads=1"
OPTIONS = ["--device", DEVICE, "--server", SERVER, "--batches", "2", "--precision-goal", "1000"]
CELLS = 4


def start(bundle: Bundle, *options: str, before: str = "") -> subprocess.Popen[bytes]:
    code = f"import sys\n{before}\nfrom dsc_split.cli.main import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, "bench", str(bundle.path), *OPTIONS, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def cell_files(bundle: Bundle) -> dict[str, Cell]:
    """Read every cell; one that cannot be read is an error."""
    return {path.name: Cell.read(path) for path in (bundle.path / "cells").glob("*.json")}


def wait_for_cells(bundle: Bundle, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while len(list((bundle.path / "cells").glob("*.json"))) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline, "no cell came"
        time.sleep(0.01)


def workers_of(bundle: Bundle) -> list[psutil.Process]:
    return children_with("Bench", str(bundle.path))


def test_bench_measures_and_writes_the_table(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    done = dsc("bench", bundle.path, *OPTIONS, "--json")

    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["counts"]["ok"] == CELLS
    table = json.loads((bundle.path / "table.json").read_text())
    assert Path(document["table"]) == bundle.path / "table.json"
    assert [batch["batch"] for batch in table["batches"]] == [2]
    assert [len(batch["rows"]) for batch in table["batches"]] == [3]
    assert table["emulated"]


@pytest.mark.usefixtures("fake_executor")
def test_bench_of_one_side_says_that_there_is_no_table_yet(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    done = dsc("bench", bundle.path, "--side", "device", *OPTIONS)

    assert done.exit_code == 0, done.stderr
    assert "no table yet" in done.stderr
    assert "2 cells (2 ok; 0 of them reused)" in done.stdout
    assert not (bundle.path / "table.json").exists()
    dsc("bench", bundle.path, "--side", "server", *OPTIONS)
    assert (bundle.path / "table.json").exists()


@pytest.mark.parametrize(
    ("options", "exit_code", "words"),
    [
        (["--batches", "65"], 2, "larger than 64"),
        (["--side", "cloud"], 2, "both, device or server"),
        (["--device", "tensorflow"], 2, "unknown back-end 'tensorflow'"),
        (["--device", "onnxruntime:cuda"], 5, "dsc-split[gpu]"),
        (["--precision-goal", "nan"], 2, "nan"),
        (["--time-limit", "0"], 2, "0"),
        (["--memory-limit", "much"], 2, "much"),
        (["--period", "-1"], 2, "-1"),
    ],
)
def test_wrong_options_have_their_exit_code(
    bundle: Bundle, dsc: Callable[..., Any], options: list[str], exit_code: int, words: str
) -> None:
    done = dsc("bench", bundle.path, *options)

    assert done.exit_code == exit_code
    assert words in done.stderr
    assert done.stdout == ""


def test_build_and_check_say_what_they_did(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    built = dsc("build", bundle.path, "--side", "device", "--target", SERVER)
    checked = dsc("check", bundle.path, "--side", "device", "--json")

    assert (built.exit_code, checked.exit_code) == (0, 0)
    assert "head a" in built.stdout
    assert "2 of 2 ready" in built.stderr
    assert json.loads(checked.stdout)["target"] == SERVER


def test_check_of_a_wrong_engine_ends_with_the_exit_code_of_back_ends(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    wrong = "onnx/model.onnx"  # it has the head's input, but the output y
    (bundle.path / "onnx/a.head.onnx").write_bytes((bundle.path / wrong).read_bytes())
    with bundle.edit() as draft:
        files = draft.manifest.files
        draft.change(files={**files, "onnx/a.head.onnx": files[wrong]})

    done = dsc("check", bundle.path, "--side", "device")

    assert done.exit_code == 4
    assert "head a: 'onnx/a.head.onnx' gives ['y']; ['a'] were expected" in done.stdout
    assert "1 of 2 engines" in done.stderr


def test_a_device_needs_neither_torch_nor_onnx(bundle: Bundle) -> None:
    blocked = "sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnx_ir', 'onnxscript', 'matplotlib']))"
    process = start(bundle, "--side", "device", before=blocked)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr

    code = f"import sys; {blocked}\nfrom dsc_split.cli.main import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, "check", str(bundle.path), "--side", "device"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def kill_at_random_and_finish(bundle: Bundle, dsc: Callable[..., Any], times: int) -> None:
    options = ["--batches", "1,2,3"]
    chance, count = random.Random(0), 3 * CELLS
    before: dict[str, Cell] = {}
    for _ in range(times):
        process = start(bundle, *options)
        with process:
            time.sleep(chance.uniform(0.2, 4.0))
            process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(workers_of(bundle), timeout=10)
        assert not alive
        after = cell_files(bundle)
        assert before.items() <= after.items(), "a finished cell was lost or changed"
        before = after
    done = dsc("bench", bundle.path, *OPTIONS, *options)
    assert done.exit_code == 0, done.stderr
    assert f"{count} cells ({count} ok; {len(before)} of them reused)" in done.stdout
    assert before.items() <= cell_files(bundle).items()
    table = json.loads((bundle.path / "table.json").read_text())
    assert [len(batch["rows"]) for batch in table["batches"]] == [3, 3, 3]
    assert not list((bundle.path / "cells").glob(".*"))


def test_killed_at_random_moments_no_finished_cell_is_lost(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    kill_at_random_and_finish(bundle, dsc, times=2)


@pytest.mark.slow
def test_killed_twenty_times_no_finished_cell_is_lost(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    kill_at_random_and_finish(bundle, dsc, times=20)


def test_interrupted_the_worker_ends_and_finished_cells_stay(bundle: Bundle) -> None:
    process = start(bundle, "--time-limit", "60")
    with process:
        wait_for_cells(bundle, 1, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)

    assert process.returncode == 1
    assert b"interrupted" in stderr
    assert b"Traceback" not in stderr
    assert not workers_of(bundle)
    assert cell_files(bundle)
    with Bundle.open(bundle.path).lock():
        pass


def test_full_disk_ends_it_with_a_clear_error_and_finished_cells_stay(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    # The manifest is smaller than this limit on the size of a file, cells with their samples are larger.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXECUTORS, "local", FakeExecutor)
        dsc("bench", bundle.path, "--side", "device", *OPTIONS)
    before = cell_files(bundle)

    process = start(bundle, before=limit)
    _, stderr = process.communicate(timeout=60)

    assert process.returncode == 1
    assert b"cannot write" in stderr
    assert b"Traceback" not in stderr
    assert cell_files(bundle) == before
    assert not list((bundle.path / "cells").glob(".*"))
    assert dsc("bench", bundle.path, *OPTIONS).exit_code == 0
    assert len(list(CellStore(bundle).all())) == CELLS
