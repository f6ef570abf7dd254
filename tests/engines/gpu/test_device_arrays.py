"""Arrays in GPU memory, in and out of TensorRT engines, on a GPU that is pretended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.support import fake_cuda as fakes

from dsc_split.engines.gpu._device_arrays import DeviceArray
from dsc_split.engines.gpu._dlpack import read_dlpack
from dsc_split.errors import BackendError

X = fakes.X
OnGpu, Shared = fakes.OnGpu, fakes.Shared
load, pretended = fakes.load, fakes.pretended


def test_array_in_gpu_memory_is_used_in_place() -> None:
    trt = pretended()
    engine = load(trt)
    x = OnGpu(trt.cuda, X)
    trt.cuda.calls.clear()

    y = engine.run({"x": x})["y"]

    np.testing.assert_array_equal(y, X * 2)
    assert trt.cuda.calls[:4] == ["allocate 2000", "allocate host 24", "allocate 24", "enqueue"]  # of the output


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({"stream": None}, []),
        ({"stream": 7}, ["record in 7", "wait in own"]),
        ({"version": 2}, ["record in 1", "wait in own"]),
        ({}, []),
    ],
)
def test_stream_of_the_cuda_array_interface_is_waited_for(changes: dict[str, Any], waits: list[str]) -> None:
    trt = pretended()
    engine = load(trt)
    x = OnGpu(trt.cuda, X, **changes)
    trt.cuda.calls.clear()

    np.testing.assert_array_equal(engine.run({"x": x})["y"], X * 2)

    before = trt.cuda.calls[: trt.cuda.calls.index("enqueue")]
    assert [call for call in before if not call.startswith("allocate")] == waits


def test_array_that_speaks_dlpack_is_used_in_place_and_told_the_stream() -> None:
    trt = pretended()
    engine = load(trt)
    x = Shared(trt.cuda, X)

    np.testing.assert_array_equal(engine.run({"x": x})["y"], X * 2)
    engine.run_on_device({"x": x}, stream=0)

    assert x.streams == [engine._runner.stream, 1]


def test_array_on_the_host_that_speaks_dlpack_is_copied() -> None:
    torch = pytest.importorskip("torch")

    np.testing.assert_array_equal(load(pretended()).run({"x": torch.from_numpy(X)})["y"], X * 2)
    with pytest.raises(BackendError, match="input 'x' cannot be shared through DLPack"):
        load(pretended()).run({"x": torch.from_numpy(X).requires_grad_()})
    with pytest.raises(BackendError, match="input 'x' cannot be shared through DLPack"):
        load(pretended()).run({"x": torch.from_numpy(X).bfloat16()})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda cuda: OnGpu(cuda, X, strides=(4, 8)),
            r"is not contiguous: its strides are \(4, 8\) for shape \(2, 3\)",
        ),
        (lambda cuda: OnGpu(cuda, X, typestr="<V2"), "void16 with 2 dimensions; float32"),
        (lambda cuda: OnGpu(cuda, X, typestr=">f4"), "in the other byte order"),
        (lambda cuda: OnGpu(cuda, X, typestr="<q9"), "type '<q9', which NumPy does not know"),
        (lambda cuda: OnGpu(cuda, X, data=(4100, False)), "starts at address 0x1004, which is no multiple of 256"),
        (lambda cuda: OnGpu(cuda, X, data=(4096, False)), "lies on GPU 1; the engine runs on GPU 0. A NumPy array, or"),
        (lambda cuda: OnGpu(cuda, X, mask=X), "is a masked array"),
        (lambda cuda: OnGpu(cuda, X.astype(np.float16)), "is float16 with 2 dimensions; float32 with 2"),
        (lambda cuda: OnGpu(cuda, X[0]), "is float32 with 1 dimensions; float32 with 2"),
        (lambda cuda: Shared(cuda, X, device=(10, 1)), "lies on ROCm 1"),
        (lambda cuda: Shared(cuda, X, device=(99, 0)), "lies on a device of kind 99 0"),
        (lambda cuda: [[1.0, 2.0, 3.0]], "is a 'list'. A NumPy array, or a contiguous array on the engine's GPU"),
    ],
)
def test_arrays_that_cannot_be_used_in_place_are_refused_by_name(make: Callable[[Any], Any], words: str) -> None:
    trt = pretended()
    trt.cuda.wrong_context[4096] = "lies on GPU 1; the engine runs on GPU 0"
    engine = load(trt)

    for run in (engine.run, engine.run_on_device, engine.bind):
        with pytest.raises(BackendError, match="input 'x'.*" + words):
            run({"x": make(trt.cuda)})


def test_array_in_gpu_memory_is_copied_when_it_is_bound() -> None:
    trt = pretended()
    engine = load(trt)
    call = engine.bind({"x": OnGpu(trt.cuda, X, stream=7)})

    call()

    np.testing.assert_array_equal(call.outputs["y"].host, X * 2)
    assert "copy 24 in 7" in trt.cuda.calls


def test_large_array_on_the_host_after_a_larger_one_on_the_gpu_finds_room() -> None:
    trt = pretended()
    engine = load(trt)
    large = np.ones((8, 3), np.float32)

    for x, values in ((X, X), (OnGpu(trt.cuda, large), large), (large, large)):
        np.testing.assert_array_equal(engine.run_on_device({"x": x})["y"].copy_to_host(), values * 2)
    assert engine._device_call.inputs["x"]._capacity_bytes == large.nbytes


def test_outputs_stay_on_the_gpu_and_say_where_they_are() -> None:
    trt = pretended()
    engine = load(trt)

    y = engine.run_on_device({"x": OnGpu(trt.cuda, X)})["y"]

    interface = y.__cuda_array_interface__
    assert interface == {
        "version": 3,
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (y.address, False),
        "strides": None,
        "stream": None,
    }
    tensor = read_dlpack(y.__dlpack__())
    assert (tensor.address, tensor.shape, tensor.strides, tensor.dtype) == (y.address, (2, 3), (3, 1), "float32")
    assert y.__dlpack_device__() == (2, 0)
    np.testing.assert_array_equal(y.copy_to_host(), X * 2)
    with pytest.raises(BufferError, match="shared as it is"):
        y.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="shared as it is"):
        y.__dlpack__(dl_device=(1, 0))


def test_output_of_one_engine_is_input_of_the_next() -> None:
    trt = pretended()
    head, tail = load(trt), load(trt)

    crossing = head.run_on_device({"x": X})["y"]

    np.testing.assert_array_equal(tail.run({"x": crossing})["y"], X * 4)


OUTLIVES = """
import sys
import numpy as np
from dsc_split.engines.gpu import _dlpack

values = np.arange(6, dtype=np.float32).reshape(2, 3)

class Exporter:
    def __dlpack__(self, **options):
        capsule = _dlpack.write_dlpack(address=values.ctypes.data, dtype=values.dtype, shape=values.shape, device=0)
        pointer = _dlpack._get_pointer(capsule, _dlpack.NAME)
        _dlpack._ManagedTensor.from_address(pointer).tensor.device_type = _dlpack.CPU  # so that NumPy takes it
        return capsule

    def __dlpack_device__(self):
        return _dlpack.CPU, 0

assert (np.from_dlpack(Exporter()) == values).all()
sys.keep = np.from_dlpack(Exporter()), Exporter().__dlpack__()
"""


def test_consumer_of_an_output_may_outlive_the_interpreter() -> None:
    done = subprocess.run([sys.executable, "-c", OUTLIVES], capture_output=True, text=True, timeout=60, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_libraries_read_the_capsule_of_an_output() -> None:
    utils = pytest.importorskip("cuda.core.utils", reason="cuda-core is not installed")
    trt = pretended()
    y = load(trt).run_on_device({"x": X})["y"]

    view = utils.StridedMemoryView.from_dlpack(y, stream_ptr=-1)

    assert (view.ptr, view.shape, view.dtype, view.device_id) == (y.address, (2, 3), np.float32, 0)
    assert view.is_device_accessible


@pytest.mark.parametrize(
    "stream",
    [
        77,
        SimpleNamespace(__cuda_stream__=lambda: (0, 77)),
        SimpleNamespace(cuda_stream=77),
        SimpleNamespace(ptr=77),
        SimpleNamespace(handle=77),
    ],
)
def test_work_in_a_stream_of_the_caller_is_not_waited_for(stream: Any) -> None:
    trt = pretended()
    engine = load(trt)

    y = engine.run_on_device({"x": OnGpu(trt.cuda, X, stream=5)}, stream=stream)["y"]

    assert not [call for call in trt.cuda.calls if call.startswith("synchronise")]
    assert [call for call in trt.cuda.calls if call.split()[0] in ("record", "wait", "enqueue")] == [
        "record in 5",
        "wait in 77",
        "enqueue",
        "record in 77",
    ]
    assert y.__cuda_array_interface__["stream"] == 77
    trt.cuda.calls.clear()
    y.__dlpack__(stream=5)
    assert trt.cuda.calls == ["make event", "record in 77", "wait in 5", "free event"]
    np.testing.assert_array_equal(y.copy_to_host(), X * 2)


def test_work_left_in_a_stream_is_waited_for_by_the_next_call_and_by_close() -> None:
    trt = pretended()
    engine = load(trt)
    waits = ["wait in own", "synchronise own"]

    engine.run_on_device({"x": OnGpu(trt.cuda, X)}, stream=77)
    trt.cuda.calls.clear()
    engine.run_on_device({"x": OnGpu(trt.cuda, X)}, stream=77)
    assert trt.cuda.calls[:2] == waits
    trt.cuda.calls.clear()
    engine.close()
    assert trt.cuda.calls[:2] == waits


def test_what_is_no_stream_is_refused() -> None:
    with pytest.raises(BackendError, match="'str' is no CUDA stream"):
        load(pretended()).run_on_device({"x": X}, stream="default")


def test_legacy_stream_has_a_number_of_its_own_in_interfaces() -> None:
    array = DeviceArray(fakes.FakeCuda(), address=256, dtype=np.dtype("f4"), shape=(1,), stream=0, owner=None)

    assert array.__cuda_array_interface__["stream"] == 1
