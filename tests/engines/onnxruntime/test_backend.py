from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.support import fake_cuda as fakes

from dsc_split.bundle import Bundle
from dsc_split.engines import BackendLike, Target, get_backend
from dsc_split.engines.onnxruntime._backend import OnnxRuntimeBackend
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
    cuda = fakes.FakeCuda()
    monkeypatch.setattr("dsc_split.engines.onnxruntime._backend.open_cuda", lambda **options: cuda)
    session = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: session)
    with pytest.raises(BackendUnavailable, match="could not start CUDAExecutionProvider"):
        get_backend("onnxruntime:cuda").load(bundle.model_path)
    assert cuda.live == {}


def test_a_backend_of_ones_own_is_taken_as_it_is() -> None:
    own: BackendLike = get_backend("onnxruntime")

    assert get_backend(own) is own


# ---- CUDA ----------------------------------------------------------------------------------------------------


class OnPretendedGpu:
    """A session on the processor that takes what is bound for the GPU, which lies in host memory."""

    def __init__(self, session: Any, cuda: Any) -> None:
        self._session = session
        self._cuda = cuda
        self.get_inputs = session.get_inputs
        self.get_outputs = session.get_outputs
        self.run = session.run
        self.bound: list[tuple[Any, ...]] = []

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        binding = self._session.io_binding()

        def bind(kind: str, name: str, device: str, index: int, *rest: Any) -> None:
            self.bound.append((kind, name, device, index, *rest[:2]))
            getattr(binding, f"bind_{kind}")(name, "cpu", index, *rest)

        return SimpleNamespace(
            bind_input=lambda *args: bind("input", *args), bind_output=lambda *args: bind("output", *args), real=binding
        )

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self._cuda.calls.append("run")
        self._session.run_with_iobinding(binding.real, options)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend a GPU; tells the layer, the sessions and the options that they were made with."""
    import onnxruntime

    cuda = fakes.FakeCuda()
    real, made = onnxruntime.InferenceSession, SimpleNamespace(cuda=cuda, sessions=[], options=[], opened=[])

    def make(path: str, options: Any, providers: list[Any]) -> OnPretendedGpu:
        ((provider, chosen),) = providers
        assert provider == "CUDAExecutionProvider"
        made.options.append(chosen)
        made.sessions.append(OnPretendedGpu(real(path, options, providers=["CPUExecutionProvider"]), cuda))
        return made.sessions[-1]  # type: ignore[no-any-return]

    def give(**options: Any) -> Any:
        made.opened.append(options)
        return cuda

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)
    monkeypatch.setattr("dsc_split.engines.onnxruntime._backend.open_cuda", give)
    return made


def load_on_gpu(bundle: Bundle, io: str = "pinned") -> Any:
    target = Target(backend="onnxruntime", architecture="cuda", options=() if io == "pinned" else (("io", io),))
    return OnnxRuntimeBackend(target, extra="gpu").load(bundle.model_path)


@pytest.mark.parametrize("io", ["pinned", "mapped"])
def test_on_cuda_the_bound_call_computes_the_same_as_run(bundle: Bundle, on_gpu: Any, io: str) -> None:
    engine = load_on_gpu(bundle, io)
    call = engine.bind({"x": X})

    call()

    np.testing.assert_array_equal(call.outputs["y"].host, engine.run({"x": X})["y"])
    assert engine.facts["io"] == io
    assert "captures a graph only where" in engine.facts["cuda_graph"]
    copies = [name for name in on_gpu.cuda.calls if name.startswith("copy")]
    assert len(copies) == (2 if io == "pinned" else 0)


def test_on_cuda_copies_and_work_are_enqueued_in_one_stream_between_events(bundle: Bundle, on_gpu: Any) -> None:
    call = load_on_gpu(bundle).bind({"x": X})
    on_gpu.cuda.calls.clear()

    call()

    assert on_gpu.cuda.calls == [
        f"copy {X.nbytes} in own",
        "record in own",
        "run",
        "record in own",
        f"copy {call.outputs['y'].host.nbytes} in own",
        "synchronise own",
    ]
    assert call.compute_ms() == 2  # the clock of the pretended GPU counts calls
    (stream,) = [handle for handle, (kind, _) in on_gpu.cuda.live.items() if kind == "stream"]
    assert on_gpu.options == [{"device_id": "0", "use_tf32": "0", "user_compute_stream": str(stream)}]
    assert on_gpu.opened == [{"extra": "gpu", "primary": True}]
    assert on_gpu.sessions[0].bound == [
        ("input", "x", "cuda", 0, np.float32, (2, 3, 8, 8)),
        ("output", "y", "cuda", 0, np.float32, (2, 4, 8, 8)),
    ]


def test_on_cuda_bound_calls_do_not_disturb_each_other(bundle: Bundle, on_gpu: Any) -> None:
    engine = load_on_gpu(bundle)
    one, other = engine.bind({"x": X}), engine.bind({"x": X[:1] * 3})

    one()
    other()

    np.testing.assert_array_equal(one.outputs["y"].host, engine.run({"x": X})["y"])
    np.testing.assert_array_equal(other.outputs["y"].host, engine.run({"x": X[:1] * 3})["y"])


def test_on_cuda_nothing_is_left_whichever_call_of_the_driver_fails(bundle: Bundle, on_gpu: Any) -> None:
    cuda = on_gpu.cuda

    def everything() -> None:
        with load_on_gpu(bundle) as engine:
            engine.run({"x": X})
            engine.bind({"x": X})()

    everything()
    count = cuda._count
    assert count > 10
    assert cuda.live == {}
    for after in range(count):
        cuda.allow(after)
        with pytest.raises(BackendError, match="pretended"):
            everything()
        assert cuda.live == {}
        assert cuda.entered == 0


def test_on_cuda_shapes_that_do_not_fit_are_an_error_of_ours(bundle: Bundle, on_gpu: Any) -> None:
    with load_on_gpu(bundle) as engine, pytest.raises(BackendError, match=r"cannot run 'model\.onnx'"):
        engine.run({"x": X[:, :2]})


def test_on_cuda_types_that_numpy_lacks_are_refused_by_name(tmp_path: Path, on_gpu: Any) -> None:
    info = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.BFLOAT16, ["batch"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.BFLOAT16, ["batch"])
    graph = onnx.helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [info], [result])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "b.onnx")
    backend = OnnxRuntimeBackend(Target.parse("onnxruntime:cuda"), extra="gpu")

    with pytest.raises(BackendError, match=r"'x' of 'b\.onnx' has elements of type bfloat16, which NumPy lacks"):
        backend.load(tmp_path / "b.onnx")
    assert on_gpu.cuda.live == {}


def test_without_a_gpu_the_target_says_why_and_loading_does_too(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    def fail(**options: Any) -> Any:
        raise BackendUnavailable("no NVIDIA driver: libcuda.so.1 cannot be found.")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("dsc_split.engines.onnxruntime._backend.open_cuda", fail)
    backend = OnnxRuntimeBackend(Target.parse("onnxruntime:cuda"), extra="gpu")

    for use in (backend.require_device, lambda: backend.load(bundle.model_path)):
        with pytest.raises(BackendUnavailable, match="'onnxruntime:cuda' cannot be used: no NVIDIA driver"):
            use()
