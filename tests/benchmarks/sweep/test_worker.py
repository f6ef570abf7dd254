from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import helper

from dsc_split._support.child import Child, ChildOptions
from dsc_split.benchmarks.sweep._worker import Bench, Loaded
from dsc_split.bundle import Bundle
from dsc_split.errors import BackendUnavailable, OutOfMemoryError

GIB = 2**30
MODEL = "onnx/model.onnx"


def start(bundle: Bundle, *, memory_limit_bytes: int = 4 * GIB) -> Child[Bench]:
    options = ChildOptions(memory_limit_bytes=memory_limit_bytes, time_limit_s=60.0)
    return Child(options, Bench, str(bundle.path), "onnxruntime:cpu,threads=1")


def load(worker: Child[Bench], batch: int = 2) -> Loaded:
    return worker.ask(Bench.load, MODEL, "device", batch, warm_up_ms=20.0)


def test_worker_loads_times_and_unloads(bundle: Bundle) -> None:
    with start(bundle) as worker:
        loaded = load(worker)
        answer = worker.ask(Bench.round, MODEL, "device", count=3, period_ms=None)
        worker.ask(Bench.unload, MODEL)

    assert loaded["warm_up"]["resident_bytes"] > 10e6
    assert loaded["warm_up"]["call_ms"] > 0
    assert len(answer["samples_ms"]) == 3
    assert answer["first_after_pause_ms"] == []


def test_first_paced_call_of_a_round_is_kept_apart(bundle: Bundle) -> None:
    with start(bundle) as worker:
        load(worker)
        answer = worker.ask(Bench.round, MODEL, "device", count=3, period_ms=5.0)

    assert (len(answer["samples_ms"]), len(answer["first_after_pause_ms"])) == (3, 1)


def test_what_libraries_print_does_not_disturb_the_answers(
    bundle: Bundle, sabotage: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    sabotage(
        "import onnxruntime, os\n_run = onnxruntime.InferenceSession.run\n"
        "def run(*args, **kwargs):\n    os.write(1, b'{}\\n')\n    print('{}')\n    return _run(*args, **kwargs)\n"
        "onnxruntime.InferenceSession.run = run\n"
    )

    with start(bundle) as worker:
        assert load(worker)["device_state"] == {}

    assert capfd.readouterr() == ("", "")


def test_missing_backend_in_the_worker_is_unavailable_and_not_a_failure(
    bundle: Bundle, sabotage: Callable[[str], None]
) -> None:
    sabotage("import sys; sys.modules['onnxruntime'] = None")

    with (
        start(bundle) as worker,
        pytest.raises(BackendUnavailable, match="pip install"),
    ):
        load(worker)


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

    with start(bundle, memory_limit_bytes=GIB) as worker:
        load(worker, batch=1)
        with pytest.raises(OutOfMemoryError):
            load(worker, batch=64)
