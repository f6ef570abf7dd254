from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import helper

from dsc_split.bundle import Bundle
from dsc_split.engines import BackendLike, get_backend
from dsc_split.errors import BackendError, BackendUnavailable, OutOfMemoryError

X = np.ones((2, 3, 8, 8), np.float32)


def test_engine_states_its_inputs_and_computes_its_outputs(bundle: Bundle) -> None:
    samples = np.load(bundle.path / "samples/model.npz")
    engine = get_backend("onnxruntime:cpu,threads=1").load(bundle.model_path)

    outputs = engine.run({"x": samples["input:x"]})

    (x,), (y,) = engine.inputs, engine.outputs
    assert (x.name, x.dtype, x.shape) == ("x", "float32", ("batch", 3, 8, 8))
    assert (y.name, y.dtype, y.shape) == ("y", "float32", ("batch", 4, 8, 8))
    np.testing.assert_allclose(outputs["y"], samples["output:y"], rtol=1e-5, atol=1e-5)


def test_bound_call_computes_the_same_as_run(bundle: Bundle) -> None:
    engine = get_backend("onnxruntime").load(bundle.model_path)

    bound = engine.bind({"x": X})()

    assert isinstance(bound, list)
    np.testing.assert_array_equal(bound[0], engine.run({"x": X})["y"])


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "Missing or unknown: x"),
        ({"x": X, "z": X}, "Missing or unknown: z"),
        ({"x": X.astype(np.float64)}, "'x' of 'model.onnx' is float64 with 4 dimensions; float32 with 4"),
        ({"x": X[0]}, "float32 with 3 dimensions; float32 with 4"),
        ({"x": X[:, :2]}, "cannot run 'model.onnx'"),
    ],
)
def test_inputs_that_do_not_fit_are_named(bundle: Bundle, inputs: dict[str, np.ndarray], words: str) -> None:
    engine = get_backend("onnxruntime").load(bundle.model_path)

    with pytest.raises(BackendError) as caught:
        engine.run(inputs)

    assert words in str(caught.value)


def test_emulated_target_sleeps_what_the_real_one_takes_longer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, slept = iter([10.0, 12.5]), list[float]()
    clock = SimpleNamespace(perf_counter=lambda: next(readings), sleep=slept.append)
    engine = get_backend("onnxruntime:cpu,slowdown=6").load(bundle.model_path)
    monkeypatch.setattr("dsc_split.engines._base.time", clock)

    engine.run({"x": X})
    engine.bind({"x": X})()

    assert slept == [5 * 2.5]


def test_unknown_operator_is_named_at_load(bundle: Bundle, replace_graph: Callable[..., Bundle]) -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], domain="org.example")
    shape = ["batch", 3, 8, 8]
    broken = replace_graph(bundle, "onnx/model.onnx", [node], [("x", shape)], [("y", shape)])

    with pytest.raises(BackendError, match=r"there is no operator 'org\.example:Mystery'"):
        get_backend("onnxruntime").load(broken.model_path)


def test_damaged_graph_is_an_error_and_nothing_is_printed(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    bundle.model_path.write_bytes(bundle.model_path.read_bytes()[:100])

    with pytest.raises(BackendError, match=r"onnxruntime:cpu cannot load 'model\.onnx'"):
        get_backend("onnxruntime").load(bundle.model_path)

    assert capfd.readouterr() == ("", "")


def test_missing_graph_is_an_error(bundle: Bundle) -> None:
    with pytest.raises(BackendError, match="there is no file"):
        get_backend("onnxruntime").load(bundle.path / "gone.onnx")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer of size 9"),
        RuntimeError("CUDA failure 2: out of memory"),
    ],
)
def test_end_of_memory_has_an_error_of_its_own(bundle: Bundle, error: Exception) -> None:
    engine = get_backend("onnxruntime").load(bundle.model_path)

    with pytest.raises(OutOfMemoryError), engine.errors():
        raise error


def test_missing_package_gives_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    with pytest.raises(BackendUnavailable, match=r"pip install 'dsc-split\[cpu\]'"):
        get_backend("onnxruntime:cpu")
    with pytest.raises(BackendUnavailable, match=r"pip install 'dsc-split\[gpu\]'"):
        get_backend("onnxruntime:cuda")


def test_cuda_never_falls_back_to_the_processor_in_silence(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendUnavailable, match=r"no CUDAExecutionProvider.*dsc-split\[gpu\]"):
        get_backend("onnxruntime:cuda")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: session)
    with pytest.raises(BackendUnavailable, match="could not start CUDAExecutionProvider"):
        get_backend("onnxruntime:cuda").load(bundle.model_path)


def test_a_backend_of_ones_own_is_taken_as_it_is() -> None:
    own: BackendLike = get_backend("onnxruntime")

    assert get_backend(own) is own
