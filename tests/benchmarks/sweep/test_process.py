from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from onnx import helper

from dsc_split.benchmarks.sweep._process import Worker, WorkerDied
from dsc_split.bundle import Bundle
from dsc_split.errors import BackendError, BackendUnavailable, OutOfMemoryError

GIB = 2**30
MODEL = {"graph": "onnx/model.onnx", "side": "device", "batch": 2, "warm_up_ms": 20.0}


def test_worker_loads_times_and_unloads(bundle: Bundle) -> None:
    with Worker(bundle.path, "onnxruntime:cpu,threads=1", 4 * GIB) as worker:
        loaded = worker.ask("load", **MODEL)
        answer = worker.ask("round", graph="onnx/model.onnx", side="device", count=3, period_ms=None)
        worker.ask("unload", graph="onnx/model.onnx")

    assert loaded["resident_bytes"] > 10e6
    assert loaded["call_ms"] > 0
    assert len(answer["samples_ms"]) == 3
    assert answer["first_after_pause_ms"] == []
    assert not psutil.pid_exists(worker.pid)


def test_first_paced_call_of_a_round_is_kept_apart(bundle: Bundle) -> None:
    with Worker(bundle.path, "onnxruntime:cpu,threads=1", 4 * GIB) as worker:
        worker.ask("load", **MODEL)
        answer = worker.ask("round", graph="onnx/model.onnx", side="device", count=3, period_ms=5.0)

    assert (len(answer["samples_ms"]), len(answer["first_after_pause_ms"])) == (3, 1)


def test_what_libraries_print_does_not_disturb_the_answers(
    bundle: Bundle, sabotage: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    sabotage(
        "import onnxruntime, os\n_run = onnxruntime.InferenceSession.run\n"
        "def run(*args, **kwargs):\n    os.write(1, b'{}\\n')\n    print('{}')\n    return _run(*args, **kwargs)\n"
        "onnxruntime.InferenceSession.run = run\n"
    )

    with Worker(bundle.path, "onnxruntime:cpu", 4 * GIB) as worker:
        assert worker.ask("load", **MODEL)["stable"] in (True, False)

    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("os.kill(os.getpid(), 11)", WorkerDied, "ended by SIGSEGV"),
        ("os.abort()", WorkerDied, "ended by SIGABRT"),
        ("os._exit(7)", WorkerDied, "ended with status 7"),
        ("os.kill(os.getpid(), 9)", OutOfMemoryError, "ended by SIGKILL"),
        ("os.write(2, b'terminate: std::bad_alloc\\n'); os.abort()", OutOfMemoryError, "std::bad_alloc"),
        ("os.write(2, b'Memory allocation still failed after 10 retries'); os._exit(1)", OutOfMemoryError, "retries"),
        ("raise MemoryError", OutOfMemoryError, "out of memory"),
    ],
)
def test_death_of_the_worker_is_an_error_that_says_how(
    bundle: Bundle, sabotage: Callable[[str], None], how: str, error: type[BackendError], words: str
) -> None:
    sabotage(f"import onnxruntime, os\ndef run(*args, **kwargs):\n    {how}\nonnxruntime.InferenceSession.run = run\n")

    with (
        Worker(bundle.path, "onnxruntime:cpu", 4 * GIB) as worker,
        pytest.raises(error, match=words) as caught,
    ):
        worker.ask("load", **MODEL)

    assert isinstance(caught.value, OutOfMemoryError) == (error is OutOfMemoryError)


def test_worker_that_dies_between_two_requests_is_noticed(bundle: Bundle) -> None:
    with Worker(bundle.path, "onnxruntime:cpu", 4 * GIB) as worker:
        worker.ask("load", **MODEL)
        process = psutil.Process(worker.pid)
        process.terminate()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)

        with pytest.raises(WorkerDied, match="SIGTERM"):
            worker.ask("round", graph="onnx/model.onnx", side="device", count=1, period_ms=None)


def test_missing_backend_in_the_worker_is_unavailable_and_not_a_failure(
    bundle: Bundle, sabotage: Callable[[str], None]
) -> None:
    sabotage("import sys; sys.modules['onnxruntime'] = None")

    with (
        Worker(bundle.path, "onnxruntime:cpu", 4 * GIB) as worker,
        pytest.raises(BackendUnavailable, match="pip install"),
    ):
        worker.ask("load", **MODEL)


def test_memory_limit_holds(bundle: Bundle, replace_graph: Callable[..., Bundle]) -> None:
    # x -> Resize by 256 in both directions -> y: 50 MB for each sample of the batch.
    shape = ["batch", 3, 8, 8]
    scales = helper.make_tensor("s", 1, [4], [1.0, 1.0, 256.0, 256.0])
    nodes = [
        helper.make_node("Constant", [], ["scales"], value=scales),
        helper.make_node("Resize", ["x", "", "scales"], ["y"], mode="nearest"),
    ]
    big: tuple[str, list[int | str]] = ("y", ["batch", 3, 2048, 2048])
    bundle = replace_graph(bundle, "onnx/model.onnx", nodes, [("x", shape)], [big])

    with Worker(bundle.path, "onnxruntime:cpu,threads=1", GIB) as worker:
        worker.ask("load", **{**MODEL, "batch": 1})
        with pytest.raises(OutOfMemoryError):
            worker.ask("load", **{**MODEL, "batch": 64})


def test_worker_ends_when_its_parent_is_killed_even_in_the_middle_of_a_call(
    bundle: Bundle, sabotage: Callable[[str], None], tmp_path: Path
) -> None:
    sabotage(
        "import onnxruntime, time\n"
        "def run(*args, **kwargs):\n    time.sleep(600)\n"
        "onnxruntime.InferenceSession.run = run\n"
    )
    code = (
        "import sys; from pathlib import Path; from dsc_split.benchmarks.sweep._process import Worker\n"
        "worker = Worker(Path(sys.argv[1]), 'onnxruntime:cpu', 2**32); print(worker.pid, flush=True)\n"
        "worker.ask('load', graph='onnx/model.onnx', side='device', batch=2, warm_up_ms=20.0)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(bundle.path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        time.sleep(0.5)
        assert worker.is_running()
        parent.send_signal(signal.SIGKILL)

    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running()
