"""A thin layer over CUDA: what running an engine asks of the driver, and no more.

Engines know the protocol :class:`CudaLayer` alone, so that tests can put another one under them; the real one
speaks to ``cuda.bindings``, 12 and 13 alike. All work is done inside ``with layer.active():``, which makes the
layer's context current and gives back whatever was current before.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dsc_split._support.optional import require
from dsc_split.errors import BackendError, BackendUnavailable, OutOfMemoryError

__all__ = ["CudaLayer", "Handle", "hold", "open_cuda"]

Kind = Literal["stream", "event", "graph", "device memory", "page-locked memory"]

INSUFFICIENT_DRIVER = 35
NO_DEVICE = 100
OUT_OF_MEMORY = 2
"""Error codes, the same in the driver's and the runtime's interface."""


@dataclass(frozen=True, kw_only=True)
class Handle:
    """Something that CUDA holds for us until it is given to :meth:`CudaLayer.free`."""

    kind: Kind
    """What it is."""
    value: int
    """The handle, or the address of memory."""


class CudaLayer(Protocol):
    """What an engine asks of CUDA. Streams and addresses are numbers, since they may come from elsewhere."""

    @property
    def device(self) -> int:
        """Index of the GPU among those that this process sees."""

    @property
    def name(self) -> str:
        """What its maker calls the GPU."""

    @property
    def compute_capability(self) -> str:
        """Major and minor: ``7.5``."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Make the layer's context current, and what was current before, afterwards."""

    def create_stream(self) -> Handle:
        """Make a stream that does not wait for the default stream."""

    def create_event(self) -> Handle:
        """Make an event that keeps the time."""

    def allocate(self, size_bytes: int) -> Handle:
        """Allocate GPU memory."""

    def allocate_host(self, size_bytes: int, *, mapped: bool) -> Handle:
        """Allocate page-locked host memory; where mapped, the GPU can reach it, too."""

    def device_address(self, host: Handle) -> int:
        """Give the address under which the GPU reaches mapped host memory."""

    def free(self, handle: Handle) -> None:
        """Free what was made or allocated here."""

    def copy(self, destination: int, source: int, size_bytes: int, stream: int) -> None:
        """Enqueue a copy; the addresses tell the direction."""

    def record(self, event: Handle, stream: int) -> None:
        """Enqueue an event."""

    def wait(self, stream: int, event: Handle) -> None:
        """Let what is enqueued later wait for an event that was recorded, maybe in another stream."""

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        """Give the milliseconds between two events that have passed."""

    def capture(self, stream: int, work: Callable[[], None]) -> Handle:
        """Make a graph of what ``work`` enqueues, which is not done now."""

    def launch(self, graph: Handle, stream: int) -> None:
        """Enqueue a graph."""

    def synchronise(self, stream: int) -> None:
        """Wait until everything that was enqueued is done."""

    def foreign(self, address: int) -> str:
        """Say why memory at an address cannot be used in this context; empty where it can."""


def hold(held: contextlib.ExitStack, cuda: CudaLayer, handle: Handle) -> Handle:
    """Have a handle freed when a stack is closed."""
    held.callback(cuda.free, handle)
    return handle


def open_cuda(*, extra: str, primary: bool = False) -> CudaLayer:
    """Give a layer over the GPU.

    Works in the context that is current in this thread, such as one that ``pycuda`` made; where there is none, in
    the primary context of the first GPU, which torch, ONNX Runtime and TensorRT share.

    Args:
        extra: The extra of this package that brings ``cuda-bindings``.
        primary: Work in the first GPU's primary context whatever is current: for libraries that know no other.

    Raises:
        BackendUnavailable: ``cuda-bindings`` is not installed, there is no driver, it is too old, or no GPU is
            visible.
    """
    runtime = require("cuda.bindings.runtime", extra=extra, purpose="run engines on a GPU")
    driver = require("cuda.bindings.driver", extra=extra, purpose="run engines on a GPU")
    _require_device(runtime)
    cuda = _Cuda(runtime, driver)
    cuda.enter(primary=primary)
    return cuda


def _require_device(runtime: Any) -> None:
    """Raise with the reason where CUDA cannot work at all."""
    error, _count = runtime.cudaGetDeviceCount()
    code = int(error)
    if code == 0:
        return
    installed = runtime.cudaDriverGetVersion()[1]
    if not installed:
        raise BackendUnavailable("no NVIDIA driver: libcuda.so.1 cannot be found. Install the driver of the GPU.")
    if code == INSUFFICIENT_DRIVER:
        needed = runtime.cudaRuntimeGetVersion()[1] // 1000
        raise BackendUnavailable(
            f"driver too old: it knows CUDA {installed // 1000}.{installed % 1000 // 10}, this needs {needed}.0. "
            f"Update the driver, or install packages for CUDA {installed // 1000}: dsc-split doctor"
        )
    if code == NO_DEVICE:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
        raise BackendUnavailable(f"no GPU is visible{why}: the driver found no CUDA-capable device.")
    text = runtime.cudaGetErrorString(error)[1]
    raise BackendUnavailable(f"CUDA cannot start: {error.name} ({text.decode()}).")


@functools.cache
def _primary_context(driver: Any, device: int) -> Any:
    """Retain a GPU's primary context, once and for as long as the process lives, as the CUDA runtime itself does."""
    error, context = driver.cuDevicePrimaryCtxRetain(device)
    if int(error):
        raise _failure(driver.cuGetErrorString, error, f"open the primary context of GPU {device}")
    return context


class _Cuda:
    """The layer over ``cuda.bindings``."""

    def __init__(self, runtime: Any, driver: Any) -> None:
        self._runtime = runtime
        self._driver = driver
        self._context: Any = None
        self.device = 0

    def enter(self, *, primary: bool) -> None:
        """Choose the context to work in."""
        driver = self._driver
        self._drive("cuInit", "start CUDA", 0)
        self._context = self._drive("cuCtxGetCurrent", "ask for the current context")
        if primary or not int(self._context):
            self._context = _primary_context(driver, self.device)
        else:
            self.device = int(self._drive("cuCtxGetDevice", "ask for the current GPU"))

    @property
    def name(self) -> str:
        name: bytes = self._drive("cuDeviceGetName", "ask for the GPU's name", 256, self.device)
        return name.partition(b"\0")[0].decode()

    @property
    def compute_capability(self) -> str:
        attributes = self._driver.CUdevice_attribute
        major, minor = (
            self._drive("cuDeviceGetAttribute", "ask for the GPU's compute capability", attribute, self.device)
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return f"{major}.{minor}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._drive("cuCtxPushCurrent", "enter the CUDA context", self._context)
        try:
            yield
        finally:
            self._drive("cuCtxPopCurrent", "leave the CUDA context")

    def create_stream(self) -> Handle:
        flags = self._runtime.cudaStreamNonBlocking
        return Handle(kind="stream", value=int(self._do("cudaStreamCreateWithFlags", "make a stream", flags)))

    def create_event(self) -> Handle:
        return Handle(kind="event", value=int(self._do("cudaEventCreate", "make an event")))

    def allocate(self, size_bytes: int) -> Handle:
        doing = f"allocate {size_bytes} bytes of GPU memory"
        return Handle(kind="device memory", value=int(self._do("cudaMalloc", doing, size_bytes)))

    def allocate_host(self, size_bytes: int, *, mapped: bool) -> Handle:
        doing = f"allocate {size_bytes} bytes of page-locked memory"
        flags = self._runtime.cudaHostAllocMapped if mapped else self._runtime.cudaHostAllocDefault
        return Handle(kind="page-locked memory", value=int(self._do("cudaHostAlloc", doing, size_bytes, flags)))

    def device_address(self, host: Handle) -> int:
        return int(self._do("cudaHostGetDevicePointer", "map host memory into the GPU", host.value, 0))

    def free(self, handle: Handle) -> None:
        function = {
            "stream": "cudaStreamDestroy",
            "event": "cudaEventDestroy",
            "graph": "cudaGraphExecDestroy",
            "device memory": "cudaFree",
            "page-locked memory": "cudaFreeHost",
        }[handle.kind]
        self._do(function, f"free the {handle.kind}", handle.value)

    def copy(self, destination: int, source: int, size_bytes: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._do("cudaMemcpyAsync", f"copy {size_bytes} bytes", destination, source, size_bytes, kind, stream)

    def record(self, event: Handle, stream: int) -> None:
        self._do("cudaEventRecord", "record an event", event.value, stream)

    def wait(self, stream: int, event: Handle) -> None:
        self._do("cudaStreamWaitEvent", "wait for an event", stream, event.value, 0)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        return float(self._do("cudaEventElapsedTime", "read the time between events", start.value, end.value))

    def capture(self, stream: int, work: Callable[[], None]) -> Handle:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._do("cudaStreamBeginCapture", "begin a CUDA graph", stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # what was captured until here is invalid in most cases
                self._do("cudaGraphDestroy", "drop a CUDA graph", self._end_capture(stream))
            raise
        graph = self._end_capture(stream)
        try:
            launchable = self._do("cudaGraphInstantiate", "prepare a CUDA graph", graph, 0)
        finally:
            self._do("cudaGraphDestroy", "drop a CUDA graph", graph)
        return Handle(kind="graph", value=int(launchable))

    def _end_capture(self, stream: int) -> Any:
        return self._do("cudaStreamEndCapture", "end a CUDA graph", stream)

    def launch(self, graph: Handle, stream: int) -> None:
        self._do("cudaGraphLaunch", "launch a CUDA graph", graph.value, stream)

    def synchronise(self, stream: int) -> None:
        self._do("cudaStreamSynchronize", "finish the work on the GPU", stream)

    def foreign(self, address: int) -> str:
        attribute = self._driver.CUpointer_attribute
        error, device = self._driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address)
        if int(error):
            return "lies in no memory that CUDA knows"
        if int(device) != self.device:
            return f"lies on GPU {int(device)}; the engine runs on GPU {self.device}"
        error, context = self._driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_CONTEXT, address)
        if not int(error) and int(context) not in (0, int(self._context)):
            return "belongs to another CUDA context; load the engine while that context is current"
        return ""

    def _do(self, function: str, doing: str, *arguments: Any) -> Any:
        return _call(getattr(self._runtime, function), self._runtime.cudaGetErrorString, doing, arguments)

    def _drive(self, function: str, doing: str, *arguments: Any) -> Any:
        return _call(getattr(self._driver, function), self._driver.cuGetErrorString, doing, arguments)


def _call(function: Callable[..., Any], explain: Callable[..., Any], doing: str, arguments: tuple[Any, ...]) -> Any:
    """Call CUDA; returns its one result, if it has one."""
    error, *results = function(*arguments)
    if int(error):
        raise _failure(explain, error, doing)
    return results[0] if results else None


def _failure(explain: Callable[..., Any], error: Any, doing: str) -> BackendError:
    text = explain(error)[1]
    words = error.name if text is None else f"{error.name}: {text.decode()}"
    kind = OutOfMemoryError if int(error) == OUT_OF_MEMORY else BackendError
    return kind(f"CUDA cannot {doing} ({words}).")
