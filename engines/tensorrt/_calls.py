"""Calls of a TensorRT plan: set shapes and memory for the inputs, capture a CUDA graph, and measure the time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from dsc_split.engines.gpu._cuda import hold
from dsc_split.engines.gpu._device_arrays import DeviceView
from dsc_split.engines.gpu._io_tensors import IoTensor, Place
from dsc_split.engines.tensorrt._library import Trt, TrtLogger
from dsc_split.engines.tensorrt._runtime import LoadedPlan, failure
from dsc_split.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

    from dsc_split._support.records import Facts
    from dsc_split.engines._base import TensorSpec
    from dsc_split.engines._engine_file import PlanProfile
    from dsc_split.engines.gpu._cuda import CudaLayer, Handle

__all__ = ["BoundCall", "Runner"]


class Runner:
    """A loaded plan with its stream, shared by all calls of an engine.

    The execution context has the shapes and addresses of one call at a time, the armed one.

    Attributes:
        name: Name of the engine, for messages.
        inputs: Inputs by name.
        outputs: Outputs by name.
        cuda: The layer over CUDA.
        facts: Facts to record with a timing.
    """

    def __init__(
        self,
        plan: LoadedPlan,
        *,
        trt: Trt,
        logger: TrtLogger,
        cuda: CudaLayer,
        name: str,
        target: str,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        profile: PlanProfile,
        io: Place,
    ) -> None:
        self.name = name
        self.inputs = {spec.name: spec for spec in inputs}
        self.outputs = {spec.name: spec for spec in outputs}
        self.cuda = cuda
        self.facts: Facts = {"io": io, "cuda_graph": "nothing was run yet"}
        self._plan = plan
        self._trt = trt
        self._logger = logger
        self._target = target
        self._profile = profile
        self._io = io
        self._armed: BoundCall | None = None
        self._allocators: dict[str, Trt] = {}
        self._pending = False
        self._memory: Handle | None = None
        self._memory_bytes = 0
        with contextlib.ExitStack() as held:
            self._stream = hold(held, cuda, cuda.create_stream())
            self._done = hold(held, cuda, cuda.create_event())
            self._owned = held.pop_all()

    @property
    def stream(self) -> int:
        """The engine's own stream."""
        return self._stream.value

    @property
    def deferred(self) -> bool:
        """Whether the armed call has outputs whose shape is known only after the computation."""
        return bool(self._allocators)

    def close(self) -> None:
        """Free the stream and the memory for activations."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._owned.close)
            self._drop_memory()

    def new_tensor(self, spec: TensorSpec) -> IoTensor:
        """Make an input or output without memory."""
        import numpy as np

        return IoTensor(self.cuda, np.dtype(spec.dtype), "host" if self.is_on_host(spec.name) else self._io)

    def is_on_host(self, name: str) -> bool:
        """Return whether TensorRT uses a tensor on the host, because its values determine shapes."""
        return bool(self._plan.engine.get_tensor_location(name) == self._trt.TensorLocation.HOST)

    def require_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that an input's shape is in the profile."""
        spec = self.inputs[name]
        fixed = [dim if isinstance(dim, int) else None for dim in spec.shape]
        bounds = self._profile.shapes.get(name)
        low, high = (bounds.min, bounds.max) if bounds is not None else (fixed, fixed)
        for axis, (dim, least, most) in enumerate(zip(shape, low, high, strict=True)):
            if least is None or most is None or least <= dim <= most:
                continue
            if spec.shape[axis] == "batch":
                batches = sorted({dim, *self._profile.batches})
                raise BackendError(
                    f"{self.name!r} takes batches from {least} to {most}; {dim} was given. Build it again with that "
                    f"batch: dsc-split build BUNDLE --side SIDE --target {self._target} "
                    f"--batches {','.join(map(str, batches))}"
                )
            expected = str(least) if least == most else f"{least} to {most}"
            raise BackendError(
                f"input {name!r} of {self.name!r} has shape {shape}; {expected} was expected in dimension {axis}."
            )

    def is_armed(self, call: BoundCall) -> bool:
        """Return whether the execution context has a call's shapes and addresses."""
        return self._armed is call

    def disarm(self, call: BoundCall) -> None:
        """Mark a call as not armed."""
        if self._armed is call:
            self._armed = None

    def arm(self, call: BoundCall, addresses: Mapping[str, int]) -> None:
        """Set the execution context to a call's shapes and addresses, and allocate memory for its outputs.

        Args:
            call: The call; the shapes of its inputs are set.
            addresses: Addresses of the inputs that are not in the call's memory.
        """
        plan = self._plan  # not the context: a traceback would keep a local variable, and its memory, after close
        self._armed = None
        self.drain()
        self._logger.errors()  # drop errors that are not about this call
        for name, tensor in call.inputs.items():
            self._accept(plan.context.set_input_shape(name, tensor.shape), f"shape {tensor.shape} of input {name!r}")
            self._accept(plan.context.set_tensor_address(name, addresses.get(name, tensor.address)), f"input {name!r}")
        if missing := plan.context.infer_shapes():
            raise failure(f"{self.name!r}: the shapes of {list(missing)} cannot be inferred", self._logger)
        if plan.needs_memory:
            self._give_memory(plan.context.update_device_memory_size_for_shapes())
        self._allocators = {}
        for name, tensor in call.outputs.items():
            shape = tuple(plan.context.get_tensor_shape(name))
            if any(dim < 0 for dim in shape):
                self._allocators[name] = _allocator(self._trt, tensor)
                accepted = plan.context.set_output_allocator(name, self._allocators[name])
                self._accept(accepted, f"an allocator for output {name!r}")
            else:
                tensor.resize(shape)
                self._accept(plan.context.set_tensor_address(name, tensor.address), f"output {name!r}")

    def arm_for_repetition(self, call: BoundCall) -> Handle | None:
        """Arm a call, run it once, and capture it as a CUDA graph; return the graph, or ``None`` where that fails."""
        self.arm(call, {})
        for tensor in call.inputs.values():
            tensor.to_device(self.stream)
        self.enqueue(self.stream)
        self.cuda.synchronise(self.stream)
        graph, why_not = None, self._why_no_graph()
        if not why_not:
            try:
                graph = self.cuda.capture(self.stream, lambda: self.enqueue(self.stream))
            except BackendError as e:
                why_not = str(e)
        self.facts["cuda_graph"] = why_not or True
        self._armed = call
        return graph

    def enqueue(self, stream: int) -> None:
        """Enqueue the work of the execution context."""
        if self._plan.context.execute_async_v3(stream):
            return
        for allocator in self._allocators.values():
            allocator.raise_error()
        raise failure(f"{self.name!r} cannot be run", self._logger)

    def settle(self) -> None:
        """Set the shapes of outputs that were known only after the computation."""
        for allocator in self._allocators.values():
            allocator.tensor.shape = allocator.shape

    def order(self, stream: int, after: int) -> None:
        """Let later work in ``stream`` wait for the work that is now in the stream ``after``."""
        self.cuda.record(self._done, after)
        self.cuda.wait(stream, self._done)

    def leave(self, stream: int) -> None:
        """Remember that work is still running in a stream of the caller."""
        self.cuda.record(self._done, stream)
        self._pending = True

    def drain(self) -> None:
        """Wait for work in a stream of the caller."""
        if self._pending:
            self.cuda.wait(self.stream, self._done)
            self.cuda.synchronise(self.stream)
            self._pending = False

    def _give_memory(self, size_bytes: int) -> None:
        """Set the execution context's memory for activations, which grows and never shrinks."""
        if self._memory is None or size_bytes > self._memory_bytes:
            self._drop_memory()
            self._memory = self.cuda.allocate(max(1, size_bytes))
            self._memory_bytes = size_bytes
        self._plan.context.set_device_memory(self._memory.value, self._memory_bytes)

    def _drop_memory(self) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self.cuda.free(memory)

    def _why_no_graph(self) -> str:
        if self._allocators:
            return f"the shape of output {next(iter(self._allocators))!r} is known only when it is computed"
        for name in (*self.inputs, *self.outputs):
            if self.is_on_host(name):
                return f"{name!r} is read or written on the host"
        context = self._plan.context
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self.stream):
            return "TensorRT says that this plan cannot be captured: it allocates memory while it runs"
        return ""

    def _accept(self, accepted: bool, what: str) -> None:
        if not accepted:
            raise failure(f"{self.name!r} does not take {what}", self._logger)


class BoundCall:
    """A call without arguments; its inputs and outputs are in page-locked memory.

    Attributes:
        inputs: Inputs by name.
        outputs: Outputs by name; their ``host`` arrays hold the results until the next call.
    """

    def __init__(self, runner: Runner) -> None:
        cuda = runner.cuda
        self.inputs = {name: runner.new_tensor(spec) for name, spec in runner.inputs.items()}
        self.outputs = {name: runner.new_tensor(spec) for name, spec in runner.outputs.items()}
        self._runner = runner
        self._cuda = cuda
        self._graph: Handle | None = None
        with contextlib.ExitStack() as held:
            self._start = hold(held, cuda, cuda.create_event())
            self._end = hold(held, cuda, cuda.create_event())
            for tensor in (*self.inputs.values(), *self.outputs.values()):
                held.callback(tensor.close)
            self._owned = held.pop_all()

    def __call__(self) -> None:
        """Copy the inputs, compute, copy the outputs, and wait."""
        runner, cuda = self._runner, self._cuda
        stream = runner.stream
        with cuda.active():
            if not runner.is_armed(self):
                self._drop_graph()
                self._graph = runner.arm_for_repetition(self)
            for tensor in self.inputs.values():
                tensor.to_device(stream)
            cuda.record(self._start, stream)
            if self._graph is None:
                runner.enqueue(stream)
            else:
                cuda.launch(self._graph, stream)
            cuda.record(self._end, stream)
            if runner.deferred:
                cuda.synchronise(stream)
                runner.settle()
            for tensor in self.outputs.values():
                tensor.to_host(stream)
            cuda.synchronise(stream)

    def compute_ms(self) -> float:
        """Return the milliseconds that the last call took on the GPU, without copies."""
        with self._cuda.active():
            return self._cuda.elapsed_ms(self._start, self._end)

    def fill(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs into page-locked memory.

        Raises:
            BackendError: A shape is outside the profile.
        """
        for name, array in inputs.items():
            self._runner.require_shape(name, array.shape)
        with self._cuda.active():
            for name, array in inputs.items():
                self._fill(name, array)

    def place(self, inputs: Mapping[str, np.ndarray | DeviceView], stream: int) -> dict[str, int]:
        """Use inputs in GPU memory in place, and copy the others to the GPU; return the addresses of the former.

        Raises:
            BackendError: A shape is outside the profile, or an input must be on the host.
        """
        addresses = {}
        for name, array in inputs.items():
            self._runner.require_shape(name, array.shape)
            if isinstance(array, DeviceView) and self._runner.is_on_host(name):
                raise BackendError(f"input {name!r} decides about shapes and is read on the host; pass a NumPy array.")
        for name, array in inputs.items():
            tensor = self.inputs[name]
            if not isinstance(array, DeviceView):
                self._fill(name, array)
                tensor.to_device(stream)
            elif 0 in array.shape:  # it may have no address
                tensor.resize(array.shape)
            else:
                tensor.shape, addresses[name] = array.shape, array.address
                if array.stream is not None:
                    self._runner.order(stream, after=array.stream)
        return addresses

    def close(self) -> None:
        """Free the memory of the call."""
        with self._cuda.active(), contextlib.ExitStack() as stack:
            stack.callback(self._owned.close)
            stack.callback(self._drop_graph)

    def _fill(self, name: str, array: np.ndarray) -> None:
        tensor = self.inputs[name]
        before = tensor.shape, tensor.address
        tensor.resize(array.shape)
        if before != (tensor.shape, tensor.address) or self._runner.is_on_host(name):
            self._runner.disarm(self)
        tensor.host[...] = array

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            self._cuda.free(graph)


def _allocator(trt: Trt, tensor: IoTensor) -> Trt:
    """Make the object that TensorRT calls for an output's memory, and with its shape."""

    class OutputAllocator(trt.IOutputAllocator):  # type: ignore[misc]  # the module is known only at run time
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)
            self.tensor = tensor
            self.shape: tuple[int, ...] = ()
            self.error: BackendError | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            try:
                return tensor.reserve(size)
            except BackendError as e:  # it cannot pass through TensorRT
                self.error = e
                return 0

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def raise_error(self) -> None:
            error, self.error = self.error, None
            try:
                if error is not None:
                    raise error
            finally:
                del error  # it and this frame would keep each other and GPU memory

        def notify_shape(self, tensor_name: str, shape: Iterable[int]) -> None:
            self.shape = tuple(shape)

    return OutputAllocator()
