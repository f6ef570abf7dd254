"""A GPU that lies in host memory, and a TensorRT that computes with NumPy: what the run path's tests stand on."""

from __future__ import annotations

import contextlib
import ctypes
import enum
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from msgspec.structs import replace

from dsc_split.engines import Backend, Target
from dsc_split.engines._engine_file import EngineDescription, PlanProfile, PlanTensor, ShapeBounds
from dsc_split.engines.gpu._cuda import Handle, Kind
from dsc_split.engines.gpu._dlpack import CUDA, write_dlpack
from dsc_split.engines.tensorrt._engine import TensorRTEngine
from dsc_split.engines.tensorrt._library import TrtLogger
from dsc_split.errors import BackendError, OutOfMemoryError

ALIGNMENT = 256


def at(address: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """View memory as an array."""
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    memory = (ctypes.c_uint8 * size_bytes).from_address(address)
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)  # type: ignore[call-overload,no-any-return]


class FakeCuda:
    """The layer, with host memory as GPU memory; work is done when it is enqueued, or when its graph is launched.

    ``fail_at`` makes the n-th call fail, counted from 1; freeing never fails.
    """

    name = "Pretended GPU"
    compute_capability = "7.5"

    def __init__(self, fail_at: int = 0, device: int = 0) -> None:
        self.device = device
        self.calls: list[str] = []
        self.live: dict[int, tuple[Kind, Any]] = {}
        self.entered = 0
        self.wrong_context: dict[int, str] = {}
        self.no_capture = ""
        self._fail_at = fail_at
        self._count = 0
        self._recording: list[Callable[[], None]] | None = None
        self._next = 1000

    # ---- for tests

    def submit(self, work: Callable[[], None]) -> None:
        """Do the work of a kernel, or put it into the graph that is captured."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def array(self, values: np.ndarray) -> Handle:
        """Put an array into GPU memory."""
        handle = self._memory("device memory", max(1, values.nbytes))
        at(handle.value, values.dtype, values.shape)[...] = values
        return handle

    def kinds(self) -> list[Kind]:
        """Name what is held."""
        return sorted(kind for kind, _ in self.live.values())

    def allow(self, count: int) -> None:
        """Let the call fail that comes after so many others."""
        self._fail_at = self._count + count + 1

    # ---- the layer

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.entered -= 1

    def create_stream(self) -> Handle:
        return self._make("stream", None)

    def create_event(self) -> Handle:
        return self._make("event", [0.0])

    def allocate(self, size_bytes: int) -> Handle:
        self._note(f"allocate {size_bytes}", OutOfMemoryError)
        return self._memory("device memory", size_bytes)

    def allocate_host(self, size_bytes: int, *, mapped: bool) -> Handle:
        self._note(f"allocate host {size_bytes}{' mapped' if mapped else ''}", OutOfMemoryError)
        return self._memory("page-locked memory", size_bytes)

    def device_address(self, host: Handle) -> int:
        self._note("map")
        return host.value

    def free(self, handle: Handle) -> None:
        assert self.entered, f"{handle} is freed outside of the context"
        kind, _ = self.live.pop(handle.value)
        assert kind == handle.kind
        self.calls.append(f"free {kind}")

    def copy(self, destination: int, source: int, size_bytes: int, stream: int) -> None:
        self._note(f"copy {size_bytes} in {self._stream(stream)}")
        ctypes.memmove(destination, source, size_bytes)

    def record(self, event: Handle, stream: int) -> None:
        self._note(f"record in {self._stream(stream)}")
        self.live[event.value][1][0] = float(len(self.calls))

    def wait(self, stream: int, event: Handle) -> None:
        self._note(f"wait in {self._stream(stream)}")
        assert event.value in self.live

    def elapsed_ms(self, start: Handle, end: Handle) -> float:
        return float(self.live[end.value][1][0] - self.live[start.value][1][0])

    def capture(self, stream: int, work: Callable[[], None]) -> Handle:
        self._note("capture")
        if self.no_capture:
            raise BackendError(self.no_capture)
        self._recording = []
        try:
            work()
            return self._make("graph", self._recording)
        finally:
            self._recording = None

    def launch(self, graph: Handle, stream: int) -> None:
        self._note(f"launch in {self._stream(stream)}")
        for work in self.live[graph.value][1]:
            work()

    def synchronise(self, stream: int) -> None:
        assert self._recording is None
        self._note(f"synchronise {self._stream(stream)}")

    def foreign(self, address: int) -> str:
        assert self.entered
        return self.wrong_context.get(address, "")

    def _note(self, call: str, error: type[BackendError] = BackendError) -> None:
        assert self.entered, f"{call} outside of the context"
        self._count += 1
        if self._count == self._fail_at:
            raise error(f"CUDA cannot {call} (pretended)")
        self.calls.append(call)

    def _stream(self, stream: int) -> str:
        known = self.live.get(stream)
        return "own" if known is not None and known[0] == "stream" else str(stream)

    def _make(self, kind: Kind, content: Any) -> Handle:
        self._note(f"make {kind}")
        self._next += 1
        self.live[self._next] = (kind, content)
        return Handle(kind=kind, value=self._next)

    def _memory(self, kind: Kind, size_bytes: int) -> Handle:
        memory = np.full(size_bytes + ALIGNMENT, 0xEE, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.live[address] = (kind, memory)
        return Handle(kind=kind, value=address)


class PretendedBackend(Backend):
    """A back-end that does nothing; engines want one."""

    def __init__(self, target: str = "tensorrt-rtx:sm75") -> None:
        super().__init__(Target.parse(target), extra="rtx")

    def _require(self) -> None:
        """Need nothing."""

    def _build_facts(self) -> dict[str, Any]:
        return {}

    def _load(self, path: Any, sha256: str | None, digest: str | None) -> Any:
        raise AssertionError("the engines of these tests are made by hand")


DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 INT64 UINT8 BOOL BF16")
TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST")
EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
AllocationStrategy = enum.Enum("AllocationStrategy", "STATIC USER_MANAGED")
Strategy = enum.Enum("Strategy", "LAZY EAGER NONE")
Diagnostics = enum.IntFlag(
    "Diagnostics",
    "VERSION_MISMATCH UNSUPPORTED_CC OLD_CUDA_DRIVER OLD_CUDA_RUNTIME INSUFFICIENT_GPU_MEMORY MALFORMED_ENGINE "
    "CUDA_ERROR",
)
NUMPY = {
    DataType.FLOAT: "float32",
    DataType.HALF: "float16",
    DataType.INT8: "int8",
    DataType.INT32: "int32",
    DataType.INT64: "int64",
    DataType.UINT8: "uint8",
    DataType.BOOL: "bool",
}


class OutputAllocator:
    """What the library lets one derive from."""


@dataclass
class FakeTrt:
    """The module: its engines compute ``compute(inputs)`` for whatever plan they are given."""

    cuda: FakeCuda
    compute: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda inputs: {"y": inputs["x"] * 2}
    inputs: Mapping[str, DataType] = field(default_factory=lambda: {"x": DataType.FLOAT})
    outputs: Mapping[str, DataType] = field(default_factory=lambda: {"y": DataType.FLOAT})
    deferred: tuple[str, ...] = ()
    """Outputs whose shape is not known before they are computed."""
    on_host: tuple[str, ...] = ()
    rtx: bool = True
    has_config: bool = True
    capturable: bool = True
    validity: tuple[Any, int] = (EngineValidity.VALID, 0)
    refuse: str = ""
    """What is refused: ``plan``, ``context``, ``run``, ``shape``, ``address``, ``infer``."""
    says: str = ""
    """What is logged then."""
    logger: TrtLogger = field(default_factory=TrtLogger)
    released: list[str] = field(default_factory=list)
    caches: list[bytes] = field(default_factory=list)
    """What runtime caches were given."""
    cache_content: bytes = b"compiled"
    takes_cache: bool = True
    strategy: Any = None
    executions: int = 0

    DataType = DataType
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    EngineValidity = EngineValidity
    EngineInvalidityDiagnostics = Diagnostics
    DynamicShapesKernelSpecializationStrategy = Strategy
    ExecutionContextAllocationStrategy = AllocationStrategy
    IOutputAllocator = OutputAllocator

    def refuses(self, what: str) -> bool:
        if self.refuse == what:
            self.logger.note(self.says, is_error=True)
        return self.refuse == what

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 - the library's name
        assert logger is self.logger.native
        return _Runtime(self)


class _Part:
    """Something of the library that says when it goes."""

    def __init__(self, part: str, trt: FakeTrt) -> None:
        self._part = part
        self._released = trt.released

    def __del__(self) -> None:
        self._released.append(self._part)


class _Runtime(_Part):
    def __init__(self, trt: FakeTrt) -> None:
        super().__init__("runtime", trt)
        self.trt = trt

    def deserialize_cuda_engine(self, plan: memoryview) -> Any:
        return None if self.trt.refuses("plan") else _Engine(self.trt, bytes(plan))

    def __getattr__(self, name: str) -> Any:
        if name == "get_engine_validity" and self.trt.rtx:
            return lambda plan: self.trt.validity
        raise AttributeError(name)


class _Engine(_Part):
    def __init__(self, trt: FakeTrt, plan: bytes) -> None:
        super().__init__("engine", trt)
        self.trt = trt
        self.plan = plan
        self.types = {**trt.inputs, **trt.outputs}
        self.num_io_tensors = len(self.types)
        self.strategies: list[AllocationStrategy] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.types[name]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.trt.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.trt.on_host else TensorLocation.DEVICE

    def create_execution_context(self, config: Any = None) -> Any:
        if config is not None:
            self.trt.strategy = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
        user_managed = self.strategies == [AllocationStrategy.USER_MANAGED]
        return None if self.trt.refuses("context") else _Context(self, user_managed)

    def __getattr__(self, name: str) -> Any:
        if name == "create_runtime_config" and self.trt.has_config:
            return self._config
        raise AttributeError(name)

    def _config(self) -> Any:
        if not self.trt.rtx:
            return SimpleNamespace()
        return SimpleNamespace(
            create_runtime_cache=lambda: _Cache(self.trt),
            set_runtime_cache=lambda cache: True,
            set_execution_context_allocation_strategy=self.strategies.append,
            dynamic_shapes_kernel_specialization_strategy=Strategy.LAZY,
        )


class _Cache(_Part):
    def __init__(self, trt: FakeTrt) -> None:
        super().__init__("cache", trt)
        self.trt = trt

    def deserialize(self, blob: bytes) -> bool:
        self.trt.caches.append(bytes(blob))
        return self.trt.takes_cache

    def serialize(self) -> Any:
        return np.frombuffer(self.trt.cache_content, np.uint8)


class _Context(_Part):
    def __init__(self, engine: _Engine, user_managed: bool) -> None:
        super().__init__("context", engine.trt)
        self.memory_bytes = 0 if user_managed else 1 << 30
        self.trt = engine.trt
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.allocators: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "is_stream_capturable" and self.trt.rtx:
            return lambda stream: self.trt.capturable
        raise AttributeError(name)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert all(type(dim) is int for dim in shape)
        self.shapes[name] = shape
        return not self.trt.refuses("shape")

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        self.addresses[name] = address
        return not self.trt.refuses("address")

    def infer_shapes(self) -> list[str]:
        return ["x"] if self.trt.refuses("infer") else []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        shape = self._results(zeros=True)[name].shape
        return (-1, *shape[1:]) if name in self.trt.deferred else shape

    def update_device_memory_size_for_shapes(self) -> int:
        return 1000 * self.shapes["x"][0]

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        assert self.trt.cuda.live[address][0] == "device memory"
        self.memory_bytes = size_bytes

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        assert isinstance(allocator, OutputAllocator)
        self.allocators[name] = allocator
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert type(stream) is int
        assert self.memory_bytes >= self.update_device_memory_size_for_shapes()
        if self.trt.refuses("run"):
            return False
        self.trt.executions += 1
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        for name in self.trt.deferred:
            result = self._results()[name]
            allocator = self.allocators[name]
            address = allocator.reallocate_output_async(name, addresses.get(name, 0), result.nbytes, ALIGNMENT, stream)
            if not address:
                self.trt.logger.note("out of memory", is_error=True)
                return False
            allocator.notify_shape(name, result.shape)
            addresses[name] = address

        def kernel() -> None:
            for name, result in self._results(addresses, shapes).items():
                at(addresses[name], result.dtype, result.shape)[...] = result

        self.trt.cuda.calls.append("enqueue")
        self.trt.cuda.submit(kernel)
        return True

    def _results(
        self,
        addresses: dict[str, int] | None = None,
        shapes: dict[str, tuple[int, ...]] | None = None,
        zeros: bool = False,
    ) -> dict[str, np.ndarray]:
        addresses, shapes = addresses or self.addresses, shapes or self.shapes
        inputs = {}
        for name, kind in self.trt.inputs.items():
            dtype = np.dtype(NUMPY[kind])
            readable = not zeros or name in self.trt.on_host
            inputs[name] = at(addresses[name], dtype, shapes[name]) if readable else np.zeros(shapes[name], dtype)
        return self.trt.compute(inputs)


# ---- engines and arrays for tests ----------------------------------------------------------------------------

X = np.arange(6, dtype=np.float32).reshape(2, 3)
PLAN = memoryview(b"the plan")


def header(dtype: Any = "float32", **profile: Any) -> EngineDescription:
    from tests.support.engine_header import HEADER  # here, for a process without the tests loads this file, too

    bounds = ShapeBounds(min=(1, 3), opt=(4, 3), max=(8, 3))
    x, y = (PlanTensor(name=name, dtype=dtype, shape=("batch", 3)) for name in "xy")
    found = PlanProfile(**{"min": 1, "opt": 4, "max": 8, "shapes": {"x": bounds}, **profile})
    return replace(HEADER, profile=found, inputs=(x,), outputs=(y,))


def load(trt: Any, *, described: EngineDescription | None = None, **options: Any) -> TensorRTEngine:
    backend = PretendedBackend()
    return TensorRTEngine(
        backend, "model.plan", described or header(), PLAN, trt=trt, logger=trt.logger, cuda=trt.cuda, **options
    )


def pretended(**options: Any) -> Any:
    return FakeTrt(cuda=FakeCuda(), **options)


class OnGpu:
    """Somebody else's array in GPU memory, with the CUDA array interface alone."""

    def __init__(self, cuda: Any, values: np.ndarray, **changes: Any) -> None:
        self.handle = cuda.array(values)
        self.values = values
        self.changes = changes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.values.shape,
            "typestr": self.values.dtype.str,
            "data": (self.handle.value, False),
            **self.changes,
        }


class Shared:
    """Somebody else's array in GPU memory, with DLPack."""

    def __init__(self, cuda: Any, values: np.ndarray, device: tuple[int, int] = (CUDA, 0)) -> None:
        self.handle = cuda.array(values)
        self.values = values
        self.device = device
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int) -> Any:
        self.streams.append(stream)
        values = self.values
        return write_dlpack(address=self.handle.value, dtype=values.dtype, shape=values.shape, device=0)
