"""The layer over CUDA: without a driver for real, with a stub of one, and with a driver that is pretended."""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsc_split.engines.gpu import _cuda
from dsc_split.engines.gpu._cuda import Handle, open_cuda
from dsc_split.errors import BackendError, BackendUnavailable, OutOfMemoryError

# ---- a driver that is not there, or only a stub -------------------------------------------------------------

STUB = """
static int answer(void) { return ANSWER; }
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
static int same(const char *a, const char *b) { while (*a && *a == *b) { a++; b++; } return *a == *b; }
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long long flags, int *status)
{
    *found = (void *)answer;
    if (same(name, "cuDriverGetVersion")) *found = (void *)cuDriverGetVersion;
    if (same(name, "cuGetProcAddress")) *found = (void *)cuGetProcAddress_v2;
    if (status) *status = 0;
    return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long long flags)
{
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
"""

OPEN = """
from dsc_split.engines.gpu._cuda import open_cuda
from dsc_split.errors import BackendUnavailable
try:
    open_cuda(extra="rtx")
except BackendUnavailable as e:
    print(e)
"""

CALL_EVERYTHING = """
from cuda.bindings import driver, runtime
from dsc_split.engines.gpu._cuda import Handle, _Cuda
from dsc_split.errors import BackendError

cuda = _Cuda(runtime, driver)
cuda._context = driver.CUcontext(16)
handle = lambda kind: Handle(kind=kind, value=4096)
event, host = handle("event"), handle("page-locked memory")
calls = {
    "enter": lambda: cuda.enter(primary=False),
    "active": lambda: cuda.active().__enter__(),
    "name": lambda: cuda.name,
    "compute capability": lambda: cuda.compute_capability,
    "stream": cuda.create_stream,
    "event": cuda.create_event,
    "allocate": lambda: cuda.allocate(16),
    "allocate host": lambda: cuda.allocate_host(16, mapped=False),
    "allocate mapped": lambda: cuda.allocate_host(16, mapped=True),
    "device address": lambda: cuda.device_address(host),
    "copy": lambda: cuda.copy(4096, 8192, 16, 1),
    "record": lambda: cuda.record(event, 1),
    "wait": lambda: cuda.wait(1, event),
    "elapsed": lambda: cuda.elapsed_ms(event, event),
    "capture": lambda: cuda.capture(1, lambda: None),
    "end capture": lambda: cuda._end_capture(1),
    "instantiate": lambda: cuda._call_runtime("cudaGraphInstantiate", "", runtime.cudaGraph_t(4096), 0),
    "destroy": lambda: cuda._call_runtime("cudaGraphDestroy", "", runtime.cudaGraph_t(4096)),
    "launch": lambda: cuda.launch(handle("graph"), 1),
    "synchronise": lambda: cuda.synchronise(1),
    **{
        f"free {kind}": lambda kind=kind: cuda.free(handle(kind))
        for kind in ("stream", "event", "graph", "device memory", "page-locked memory")
    },
}
for name, call in calls.items():
    try:
        call()
    except BackendError as e:
        print(f"{name}: {e}")
print(f"foreign: {cuda.foreign(4096)}")
for call in (lambda: driver.cuDevicePrimaryCtxRetain(0), driver.cuCtxPopCurrent, driver.cuCtxGetDevice):
    print(f"context {call}: {call()[0]!r}")
"""


@pytest.fixture
def with_stub(tmp_path: Path) -> Callable[..., str]:
    """Run Python with a driver whose functions all give one answer."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("gcc and cc are not installed, and a stub of libcuda has to be built")
    pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
    (tmp_path / "stub.c").write_text(STUB)

    def run(script: str, *, version: int = 99000, answer: int = 100, **variables: str) -> str:
        defines = [f"-DVERSION={version}", f"-DANSWER={answer}"]
        library = tmp_path / "libcuda.so.1"
        subprocess.run([compiler, "-shared", "-fPIC", *defines, "-o", library, tmp_path / "stub.c"], check=True)
        environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), **variables}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_without_a_driver_that_is_said() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if runtime.cudaDriverGetVersion()[1]:
        pytest.skip("this machine has an NVIDIA driver, and the test is of one without")

    with pytest.raises(BackendUnavailable, match=r"no NVIDIA driver: libcuda\.so\.1 cannot be found"):
        open_cuda(extra="rtx")


def test_without_the_package_the_pip_command_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", None)

    with pytest.raises(BackendUnavailable, match=r"pip install 'dsc-split\[jetson\]'"):
        open_cuda(extra="jetson")


def test_driver_without_a_gpu_is_told_from_one_that_hides_it(with_stub: Callable[..., str]) -> None:
    assert with_stub(OPEN).startswith("no GPU is visible: the driver found no CUDA-capable device.")
    assert "no GPU is visible (CUDA_VISIBLE_DEVICES=''): " in with_stub(OPEN, CUDA_VISIBLE_DEVICES="")


def test_driver_that_is_too_old_is_named_with_what_is_needed(with_stub: Callable[..., str]) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    needed = runtime.cudaRuntimeGetVersion()[1] // 1000

    said = with_stub(OPEN, version=11040)

    assert said.startswith(f"driver too old: it knows CUDA 11.4, this needs {needed}.0. Update the driver, or install")


def test_driver_that_fails_otherwise_is_named_with_the_words_of_cuda(with_stub: Callable[..., str]) -> None:
    assert with_stub(OPEN, answer=802).startswith("CUDA cannot start: cudaErrorSystemNotReady (system not yet init")


def test_every_call_reaches_the_real_library_with_arguments_that_it_takes(with_stub: Callable[..., str]) -> None:
    lines = with_stub(CALL_EVERYTHING).splitlines()

    failed = dict(line.split(": ", 1) for line in lines)
    assert len(failed) == 29
    assert failed.pop("foreign") == "lies in no memory that CUDA knows"
    assert [words for words in failed.values() if "NoDevice" not in words and "NO_DEVICE" not in words] == []


def test_end_of_memory_comes_out_of_the_real_library_as_such(with_stub: Callable[..., str]) -> None:
    script = """
from cuda.bindings import driver, runtime
from dsc_split.engines.gpu._cuda import _Cuda
from dsc_split.errors import OutOfMemoryError
try:
    _Cuda(runtime, driver).allocate(1 << 40)
except OutOfMemoryError as e:
    print(e)
"""
    said = with_stub(script, answer=2)

    assert (
        said == "CUDA cannot allocate 1099511627776 bytes of GPU memory (cudaErrorMemoryAllocation: out of memory).\n"
    )


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "runtime",
            "cudaGetDeviceCount() cudaDriverGetVersion() cudaRuntimeGetVersion() cudaEventCreate() "
            "cudaStreamCreateWithFlags(unsigned int flags) cudaMalloc(size_t size) "
            "cudaHostAlloc(size_t size, unsigned int flags) cudaHostGetDevicePointer(pHost, unsigned int flags) "
            "cudaStreamDestroy(stream) cudaEventDestroy(event) cudaGraphExecDestroy(graphExec) cudaFree(devPtr) "
            "cudaFreeHost(ptr) cudaMemcpyAsync(dst, src, size_t count, kind: cudaMemcpyKind, stream) "
            "cudaEventRecord(event, stream) cudaStreamWaitEvent(stream, event, unsigned int flags) "
            "cudaEventElapsedTime(start, end) cudaStreamBeginCapture(stream, mode: cudaStreamCaptureMode) "
            "cudaStreamEndCapture(stream) cudaGraphInstantiate(graph, unsigned long long flags) "
            "cudaGraphDestroy(graph) cudaGraphLaunch(graphExec, stream) cudaStreamSynchronize(stream) "
            "cudaGetErrorString(error: cudaError_t)",
        ),
        (
            "driver",
            "cuInit(unsigned int Flags) cuCtxGetCurrent() cuCtxGetDevice() cuCtxPushCurrent(ctx) cuCtxPopCurrent() "
            "cuDevicePrimaryCtxRetain(dev) cuDeviceGetName(int length, dev) "
            "cuDeviceGetAttribute(attrib: CUdevice_attribute, dev) "
            "cuPointerGetAttribute(attribute: CUpointer_attribute, ptr) cuGetErrorString(error: CUresult)",
        ),
    ],
)
def test_functions_of_the_real_library_have_the_parameters_that_they_are_given(module: str, names: str) -> None:
    real = pytest.importorskip(f"cuda.bindings.{module}", reason="cuda-bindings is not installed")

    expected = [f"{name})" for name in names.split(")")[:-1]]
    for signature in map(str.strip, expected):
        function = getattr(real, signature.partition("(")[0])
        if function.__doc__:
            assert function.__doc__.strip().splitlines()[0] == signature


# ---- a driver that is pretended -----------------------------------------------------------------------------

CudaError = enum.IntEnum("CudaError", {"cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2})


class Pretended:
    """Both of CUDA's interfaces; keeps the stack of contexts and a list of the calls."""

    cudaStreamNonBlocking = 1  # noqa: N815 - the library's names, here and below
    cudaHostAllocDefault = 0  # noqa: N815
    cudaHostAllocMapped = 2  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    CUpointer_attribute = SimpleNamespace(
        CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL="device", CU_POINTER_ATTRIBUTE_CONTEXT="context"
    )
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=8, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=6
    )

    def __init__(self, *current: int) -> None:
        self.contexts = list(current)
        self.calls: list[tuple[Any, ...]] = []
        self.results: dict[str, Any] = {"cudaStreamEndCapture": 50, "cudaGraphInstantiate": 51}
        self.fails: dict[str, CudaError] = {}
        self.memory: dict[tuple[str, int], int] = {}

    def cudaGetDeviceCount(self) -> tuple[CudaError, int]:  # noqa: N802
        return CudaError.cudaSuccess, 1

    def cuGetErrorString(self, error: Any) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"its words"

    cudaGetErrorString = cuGetErrorString  # noqa: N815

    def cuCtxGetCurrent(self) -> tuple[CudaError, int]:  # noqa: N802
        return CudaError.cudaSuccess, self.contexts[-1] if self.contexts else 0

    def cuCtxGetDevice(self) -> tuple[CudaError, int]:  # noqa: N802
        return CudaError.cudaSuccess, 1

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[CudaError, int]:  # noqa: N802
        self.calls.append(("cuDevicePrimaryCtxRetain", device))
        return CudaError.cudaSuccess, 900 + device

    def cuCtxPushCurrent(self, context: int) -> tuple[CudaError]:  # noqa: N802
        self.contexts.append(context)
        return (CudaError.cudaSuccess,)

    def cuCtxPopCurrent(self) -> tuple[CudaError, int]:  # noqa: N802
        return CudaError.cudaSuccess, self.contexts.pop()

    def cuDeviceGetName(self, length: int, device: int) -> tuple[CudaError, bytes]:  # noqa: N802
        return CudaError.cudaSuccess, b"NVIDIA Pretended\0\0\0"

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[CudaError, int]:  # noqa: N802
        return CudaError.cudaSuccess, attribute

    def cuPointerGetAttribute(self, attribute: str, address: int) -> tuple[CudaError, int]:  # noqa: N802
        if (attribute, address) not in self.memory:
            return CudaError.cudaErrorInvalidValue, 0
        return CudaError.cudaSuccess, self.memory[attribute, address]

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def function(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            return self.fails.get(name, CudaError.cudaSuccess), self.results.get(name, 40)

        return function


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Pretended]]:
    """Open the layer over a pretended driver, with contexts current."""

    def give(*current: int, primary: bool = False) -> tuple[Any, Pretended]:
        cuda = Pretended(*current)
        monkeypatch.setattr(_cuda, "require", lambda *args, **kwargs: cuda)
        layer = open_cuda(extra="rtx", primary=primary)
        cuda.calls.clear()
        return layer, cuda

    return give


@pytest.mark.parametrize(
    ("current", "primary", "device", "inside"),
    [
        ((), False, 0, 900),  # nothing is current: the primary context of the first GPU
        ((7,), False, 1, 7),  # a context that pycuda made, on the second GPU
        ((900,), False, 1, 900),
        ((7,), True, 0, 900),  # for a library that knows no other
    ],
)
def test_work_is_done_in_the_context_that_was_current_and_what_was_is_again_afterwards(
    opened: Callable[..., tuple[Any, Pretended]], current: tuple[int, ...], primary: bool, device: int, inside: int
) -> None:
    layer, cuda = opened(*current, primary=primary)
    assert cuda.contexts == list(current)
    cuda.contexts = [33]  # something else by then

    with layer.active():
        assert cuda.contexts[-1] == inside
    with pytest.raises(KeyError), layer.active():
        raise KeyError

    assert cuda.contexts == [33]
    assert layer.device == device


def test_primary_context_is_retained_once(opened: Callable[..., tuple[Any, Pretended]]) -> None:
    _, cuda = opened()

    open_cuda(extra="rtx")
    open_cuda(extra="rtx")

    assert cuda.calls == [("cuInit", 0), ("cuInit", 0)]


def test_the_gpu_is_described(opened: Callable[..., tuple[Any, Pretended]]) -> None:
    layer, _ = opened()

    assert (layer.name, layer.compute_capability) == ("NVIDIA Pretended", "8.6")


def test_errors_of_cuda_become_ours(opened: Callable[..., tuple[Any, Pretended]]) -> None:
    layer, cuda = opened()
    cuda.fails = {
        "cudaMalloc": CudaError.cudaErrorMemoryAllocation,
        "cudaHostAlloc": CudaError.cudaErrorMemoryAllocation,
        "cudaStreamSynchronize": CudaError.cudaErrorInvalidValue,
    }

    with pytest.raises(OutOfMemoryError, match="allocate 9 bytes of GPU memory"):
        layer.allocate(9)
    with pytest.raises(OutOfMemoryError, match="allocate 9 bytes of page-locked memory"):
        layer.allocate_host(9, mapped=True)
    with pytest.raises(BackendError, match=r"cannot finish the work on the GPU \(cudaErrorInvalidValue: its words\)"):
        layer.synchronise(1)


def test_graph_is_made_of_what_is_enqueued_and_its_template_dropped(
    opened: Callable[..., tuple[Any, Pretended]],
) -> None:
    layer, cuda = opened()

    graph = layer.capture(5, lambda: cuda.calls.append(("work",)))

    assert graph == Handle(kind="graph", value=51)
    assert cuda.calls == [
        ("cudaStreamBeginCapture", 5, 1),
        ("work",),
        ("cudaStreamEndCapture", 5),
        ("cudaGraphInstantiate", 50, 0),
        ("cudaGraphDestroy", 50),
    ]


@pytest.mark.parametrize("invalid", [True, False])
def test_capture_is_ended_where_the_work_fails(opened: Callable[..., tuple[Any, Pretended]], invalid: bool) -> None:
    layer, cuda = opened()
    cuda.fails = {"cudaStreamEndCapture": CudaError.cudaErrorInvalidValue} if invalid else {}

    def work() -> None:
        raise BackendError("not in a graph")

    with pytest.raises(BackendError, match="not in a graph"):
        layer.capture(5, work)

    names = [call[0] for call in cuda.calls]
    assert names == ["cudaStreamBeginCapture", "cudaStreamEndCapture", *([] if invalid else ["cudaGraphDestroy"])]


def test_template_of_a_graph_is_dropped_where_the_graph_cannot_be_made(
    opened: Callable[..., tuple[Any, Pretended]],
) -> None:
    layer, cuda = opened()
    cuda.fails = {"cudaGraphInstantiate": CudaError.cudaErrorMemoryAllocation}

    with pytest.raises(OutOfMemoryError, match="prepare a CUDA graph"):
        layer.capture(5, lambda: None)

    assert cuda.calls[-1] == ("cudaGraphDestroy", 50)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("stream", "cudaStreamDestroy"),
        ("event", "cudaEventDestroy"),
        ("graph", "cudaGraphExecDestroy"),
        ("device memory", "cudaFree"),
        ("page-locked memory", "cudaFreeHost"),
    ],
)
def test_each_kind_is_freed_by_its_own_function(
    opened: Callable[..., tuple[Any, Pretended]], kind: Any, function: str
) -> None:
    layer, cuda = opened()

    layer.free(Handle(kind=kind, value=8))

    assert cuda.calls == [(function, 8)]


def test_memory_of_another_gpu_or_context_is_told(opened: Callable[..., tuple[Any, Pretended]]) -> None:
    layer, cuda = opened(7)
    cuda.memory = {
        ("device", 10): 1,
        ("context", 10): 7,
        ("device", 20): 0,
        ("device", 30): 1,
        ("context", 30): 900,
        ("device", 40): 1,
        ("context", 40): 0,
        ("device", 50): 1,
    }

    words = {address: layer.foreign(address) for address in (10, 20, 30, 40, 50, 60)}

    assert words == {
        10: "",
        20: "lies on GPU 0; the engine runs on GPU 1",
        30: "belongs to another CUDA context; load the engine while that context is current",
        40: "",  # memory of a pool belongs to no context
        50: "",
        60: "lies in no memory that CUDA knows",
    }
