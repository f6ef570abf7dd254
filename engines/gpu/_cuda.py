"""A thin layer over CUDA: only the calls that engines need.

Engines use the protocol :class:`CudaLayer`, which tests implement, too; the real layer calls ``cuda.bindings`` 12 or
13. All work is done inside ``with layer.active():``, which makes the layer's context current, and restores the earlier
one at the end.
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

Bindings = Any
"""A module, error code or result of ``cuda.bindings``, which has no types."""

Kind = Literal["stream", "event", "graph", "device memory", "page-locked memory"]

INSUFFICIENT_DRIVER = 35
NO_DEVICE = 100
OUT_OF_MEMORY = 2
"""Error codes, the same in the driver and the runtime API."""


@dataclass(frozen=True, kw_only=True)
class Handle:
    """A CUDA object or memory, until :meth:`CudaLayer.free` frees it."""

    kind: Kind
    """What it is."""
    value: int
    """The handle, or the address of memory."""


class CudaLayer(Protocol):
    """What an engine needs of CUDA. Streams and addresses are numbers: other libraries may have made them."""

    @property
    def device(self) -> int:
        """Index of the GPU among those that this process sees."""

    @property
    def name(self) -> str:
        """Product name of the GPU."""

    @property
    def compute_capability(self) -> str:
        """Major and minor: ``7.5``."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Make the layer's context current in a block, and restore the earlier one at its end."""

    def create_stream(self) -> Handle:
        """Make a stream that does not wait for the default stream."""

    def create_event(self) -> Handle:
        """Make an event that records the time."""

    def allocate(self, size_bytes: int) -> Handle:
        """Allocate GPU memory."""

    def allocate_host(self, size_bytes: int, *, mapped: bool) -> Handle:
        """Allocate page-locked host memory; if ``mapped``, the GPU can use it directly."""

    def device_address(self, host: Handle) -> int:
        """Return the GPU's address of mapped host memory."""

    def free(self, handle: Handle) -> None:
        """Free something that this layer made."""

    def copy(self, destination: int, source: int, size_bytes: int, stream: int) -> None:
        """Enqueue a copy; the addresses determine the direction."""

    def record(self, event: Handle, stream: int) -> None:
        """Enqueue an event."""

    def wait(self, stream: int, event: Handle) -> None:
        """Let later work in a stream wait for an event, which may be recorded in another stream."""

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        """Return the milliseconds between two events that have happened."""

    def capture(self, stream: int, work: Callable[[], None]) -> Handle:
        """Make a graph of the work that ``work`` enqueues, without doing it."""

    def launch(self, graph: Handle, stream: int) -> None:
        """Enqueue a graph."""

    def synchronise(self, stream: int) -> None:
        """Wait until all enqueued work is done."""

    def foreign(self, address: int) -> str:
        """Return why memory at an address cannot be used in this context; empty where it can."""


def hold(held: contextlib.ExitStack, cuda: CudaLayer, handle: Handle) -> Handle:
    """Return a handle that is freed when a stack is closed."""
    held.callback(cuda.free, handle)
    return handle


def open_cuda(*, extra: str, primary: bool = False) -> CudaLayer:
    """Return a layer over the GPU.

    It uses the context that is current in this thread, for example one that ``pycuda`` made. Without one, it uses the
    primary context of the first GPU, which torch, ONNX Runtime and TensorRT share.

    Args:
        extra: The extra of dsc-split that installs ``cuda-bindings``.
        primary: Always use the primary context of the first GPU, for libraries that use no other.

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


def _require_device(runtime: Bindings) -> None:
    """Check that CUDA can work here."""
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
def _primary_context(driver: Bindings, device: int) -> Bindings:
    """Retain a GPU's primary context once, until the process ends, as the CUDA runtime does."""
    error, context = driver.cuDevicePrimaryCtxRetain(device)
    if int(error):
        raise _failure(driver.cuGetErrorString, error, f"open the primary context of GPU {device}")
    return context


class _Cuda:
    """The layer over ``cuda.bindings``."""

    def __init__(self, runtime: Bindings, driver: Bindings) -> None:
        self._runtime = runtime
        self._driver = driver
        self._context: Bindings = None
        self.device = 0

    def enter(self, *, primary: bool) -> None:
        """Choose the context."""
        driver = self._driver
        self._call_driver("cuInit", "start CUDA", 0)
        self._context = self._call_driver("cuCtxGetCurrent", "ask for the current context")
        if primary or not int(self._context):
            self._context = _primary_context(driver, self.device)
        else:
            self.device = int(self._call_driver("cuCtxGetDevice", "ask for the current GPU"))

    @property
    def name(self) -> str:
        name: bytes = self._call_driver("cuDeviceGetName", "ask for the GPU's name", 256, self.device)
        return name.partition(b"\0")[0].decode()

    @property
    def compute_capability(self) -> str:
        attributes = self._driver.CUdevice_attribute
        major, minor = (
            self._call_driver("cuDeviceGetAttribute", "ask for the GPU's compute capability", attribute, self.device)
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        return f"{major}.{minor}"

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self._call_driver("cuCtxPushCurrent", "enter the CUDA context", self._context)
        try:
            yield
        finally:
            self._call_driver("cuCtxPopCurrent", "leave the CUDA context")

    def create_stream(self) -> Handle:
        flags = self._runtime.cudaStreamNonBlocking
        return self._make("stream", "cudaStreamCreateWithFlags", "make a stream", flags)

    def create_event(self) -> Handle:
        return self._make("event", "cudaEventCreate", "make an event")

    def allocate(self, size_bytes: int) -> Handle:
        return self._make("device memory", "cudaMalloc", f"allocate {size_bytes} bytes of GPU memory", size_bytes)

    def allocate_host(self, size_bytes: int, *, mapped: bool) -> Handle:
        doing = f"allocate {size_bytes} bytes of page-locked memory"
        flags = self._runtime.cudaHostAllocMapped if mapped else self._runtime.cudaHostAllocDefault
        return self._make("page-locked memory", "cudaHostAlloc", doing, size_bytes, flags)

    def device_address(self, host: Handle) -> int:
        return int(self._call_runtime("cudaHostGetDevicePointer", "map host memory into the GPU", host.value, 0))

    def free(self, handle: Handle) -> None:
        function = {
            "stream": "cudaStreamDestroy",
            "event": "cudaEventDestroy",
            "graph": "cudaGraphExecDestroy",
            "device memory": "cudaFree",
            "page-locked memory": "cudaFreeHost",
        }[handle.kind]
        self._call_runtime(function, f"free the {handle.kind}", handle.value)

    def copy(self, destination: int, source: int, size_bytes: int, stream: int) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDefault
        self._call_runtime("cudaMemcpyAsync", f"copy {size_bytes} bytes", destination, source, size_bytes, kind, stream)

    def record(self, event: Handle, stream: int) -> None:
        self._call_runtime("cudaEventRecord", "record an event", event.value, stream)

    def wait(self, stream: int, event: Handle) -> None:
        self._call_runtime("cudaStreamWaitEvent", "wait for an event", stream, event.value, 0)

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        return float(self._call_runtime("cudaEventElapsedTime", "read the time between events", start.value, end.value))

    def capture(self, stream: int, work: Callable[[], None]) -> Handle:
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call_runtime("cudaStreamBeginCapture", "begin a CUDA graph", stream, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(BackendError):  # the unfinished graph is usually invalid
                self._call_runtime("cudaGraphDestroy", "drop a CUDA graph", self._end_capture(stream))
            raise
        graph = self._end_capture(stream)
        try:
            return self._make("graph", "cudaGraphInstantiate", "prepare a CUDA graph", graph, 0)
        finally:
            self._call_runtime("cudaGraphDestroy", "drop a CUDA graph", graph)

    def _end_capture(self, stream: int) -> Bindings:
        return self._call_runtime("cudaStreamEndCapture", "end a CUDA graph", stream)

    def launch(self, graph: Handle, stream: int) -> None:
        self._call_runtime("cudaGraphLaunch", "launch a CUDA graph", graph.value, stream)

    def synchronise(self, stream: int) -> None:
        self._call_runtime("cudaStreamSynchronize", "finish the work on the GPU", stream)

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

    def _make(self, kind: Kind, function: str, doing: str, *arguments: object) -> Handle:
        return Handle(kind=kind, value=int(self._call_runtime(function, doing, *arguments)))

    def _call_runtime(self, function: str, doing: str, *arguments: object) -> Bindings:
        return _call(getattr(self._runtime, function), self._runtime.cudaGetErrorString, doing, arguments)

    def _call_driver(self, function: str, doing: str, *arguments: object) -> Bindings:
        return _call(getattr(self._driver, function), self._driver.cuGetErrorString, doing, arguments)


def _call(function: Bindings, explain: Bindings, doing: str, arguments: tuple[object, ...]) -> Bindings:
    """Call a function of CUDA; return its result, or ``None`` where it has none."""
    error, *results = function(*arguments)
    if int(error):
        raise _failure(explain, error, doing)
    return results[0] if results else None


def _failure(explain: Bindings, error: Bindings, doing: str) -> BackendError:
    text = explain(error)[1]
    words = error.name if text is None else f"{error.name}: {text.decode()}"
    kind = OutOfMemoryError if int(error) == OUT_OF_MEMORY else BackendError
    return kind(f"CUDA cannot {doing} ({words}).")
