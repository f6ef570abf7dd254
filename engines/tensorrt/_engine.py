"""Run a TensorRT plan on a GPU, with NumPy arrays, or with arrays in GPU memory without copies."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsc_split.engines._base import Backend, Engine, TensorSpec
from dsc_split.engines.gpu._device_arrays import DeviceArray, DeviceView, Shared, as_input, stream_handle
from dsc_split.engines.tensorrt._calls import BoundCall, Runner
from dsc_split.engines.tensorrt._library import Trt, TrtLogger
from dsc_split.engines.tensorrt._runtime import LoadedPlan, numpy_dtypes
from dsc_split.errors import BackendError, EngineFileError

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.engines._engine_file import EngineDescription, PlanTensor
    from dsc_split.engines.gpu._cuda import CudaLayer

__all__ = ["TensorRTEngine"]


class TensorRTEngine(Engine):
    """A plan on the GPU. Like TensorRT itself, it is not thread-safe.

    Inputs are NumPy arrays, or arrays in GPU memory with DLPack or the CUDA array interface.

    Attributes:
        facts: Facts to record with a timing: ``io``, ``cuda_graph`` (``True``, or why there is none),
            ``profile``, ``file``, and ``jit`` where the library compiles while it runs.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        header: EngineDescription,
        plan: memoryview,
        *,
        trt: Trt,
        logger: TrtLogger,
        cuda: CudaLayer,
        io: str = "pinned",
        runtime_cache: Path | None = None,
    ) -> None:
        """Load a plan.

        Args:
            backend: The back-end of the engine.
            name: Name of the engine, for messages.
            header: Header of its file: inputs, outputs, profile.
            plan: Bytes of the plan; not needed afterwards.
            trt: The module ``tensorrt`` or ``tensorrt_rtx``.
            logger: The process's logger for it.
            cuda: The layer over CUDA; its context is used for everything.
            io: ``pinned`` or ``mapped``.
            runtime_cache: File for code that TensorRT for RTX compiles on this machine.

        Raises:
            EngineFileError: The plan is damaged, was built for something else, or is not what the header says.
            BackendUnavailable: The driver or CUDA is too old for it.
            BackendError: It cannot be loaded, or has elements of a type that NumPy lacks.
        """
        super().__init__(backend, name, _specs(header.inputs), _specs(header.outputs))
        profile = header.profile
        target = str(backend.target)
        self._cuda = cuda
        with cuda.active(), contextlib.ExitStack() as held:
            loaded = LoadedPlan(plan, trt=trt, logger=logger, name=name, target=target, runtime_cache=runtime_cache)
            held.callback(loaded.close)
            self._require_as_described(trt, loaded.engine)
            self._runner = Runner(
                loaded,
                trt=trt,
                logger=logger,
                cuda=cuda,
                name=name,
                target=target,
                inputs=self.inputs,
                outputs=self.outputs,
                profile=profile,
                io="mapped" if io == "mapped" else "pinned",
            )
            held.callback(self._runner.close)
            self._host_call = BoundCall(self._runner)
            held.callback(self._host_call.close)
            self._device_call = BoundCall(self._runner)
            held.callback(self._device_call.close)
            self._owned = held.pop_all()
        self.facts = self._runner.facts
        self.facts["profile"] = {"min": profile.min, "opt": profile.opt, "max": profile.max}
        self.facts["file"] = name
        self.facts |= loaded.facts

    def run(self, inputs: Mapping[str, Shared]) -> dict[str, np.ndarray]:
        """Compute the outputs as NumPy arrays, by name. On an emulated target, then sleep as in :meth:`Engine.run`.

        Args:
            inputs: NumPy arrays, or arrays in GPU memory, which are used without a copy.

        Raises:
            BackendError: An input is missing, unknown, of another type, rank or shape than the engine takes, or
                in memory that cannot be used; or TensorRT fails.
            OutOfMemoryError: There is too little memory.
        """
        return super().run(self._as_inputs(inputs, self._runner.stream))

    def run_on_device(self, inputs: Mapping[str, Shared], *, stream: object = None) -> dict[str, DeviceArray]:
        """Compute the outputs, by name, and leave them in GPU memory; at full speed, also on an emulated target.

        Args:
            inputs: Arrays in GPU memory, which are used without a copy, or NumPy arrays.
            stream: A CUDA stream to enqueue the work in, without waiting for it; do not change the inputs until it is
                done. Without a stream, the work is done when the call returns.

        Returns:
            Arrays of the engine, valid until its next call, or until it is closed.

        Raises:
            BackendError: As for :meth:`run`.
        """
        handle = self._runner.stream if stream is None else stream_handle(stream)
        views = self._as_inputs(inputs, handle)
        self._check(views)
        with self.errors():
            return self._run_on_device(views, handle, wait=stream is None)

    def bind(self, inputs: Mapping[str, Shared]) -> BoundCall:
        """Return a call without arguments, as in :meth:`Engine.bind`; its memory is freed when the engine is closed.

        Args:
            inputs: Arrays that are copied now, once, into memory of the call.

        Raises:
            BackendError: As for :meth:`run`.
        """
        views = self._as_inputs(inputs, self._runner.stream)
        self._check(views)
        return self._bind({name: self._on_host(view) for name, view in views.items()})

    def _run(self, inputs: Mapping[str, Shared]) -> dict[str, np.ndarray]:
        if any(isinstance(array, DeviceView) for array in inputs.values()):
            arrays = self._run_on_device(inputs, self._runner.stream, wait=True)
            return {name: array.copy_to_host() for name, array in arrays.items()}
        self._host_call.fill(inputs)
        self._host_call()
        return {name: tensor.host.copy() for name, tensor in self._host_call.outputs.items()}

    def _bind(self, inputs: Mapping[str, np.ndarray]) -> BoundCall:
        with self._cuda.active(), contextlib.ExitStack() as held:
            call = BoundCall(self._runner)
            held.callback(call.close)
            call.fill(inputs)
            self._owned.push(held.pop_all())
        return call

    def _close(self) -> None:
        with self._cuda.active(), self._owned:
            self._runner.drain()

    def _run_on_device(self, inputs: Mapping[str, Shared], stream: int, *, wait: bool) -> dict[str, DeviceArray]:
        runner, call = self._runner, self._device_call
        with self._cuda.active():
            runner.drain()
            runner.arm(call, call.place(inputs, stream))
            runner.enqueue(stream)
            if wait or runner.deferred:
                self._cuda.synchronise(stream)
                runner.settle()
            else:
                runner.leave(stream)
        ready = wait or runner.deferred
        return {
            name: DeviceArray(
                self._cuda,
                address=tensor.address,
                dtype=tensor.dtype,
                shape=tensor.shape,
                stream=None if ready else stream,
                owner=self,
            )
            for name, tensor in call.outputs.items()
        }

    def _as_inputs(self, inputs: Mapping[str, Shared], stream: int) -> dict[str, Shared]:
        return {name: as_input(name, array, self._cuda, stream) for name, array in inputs.items()}

    def _on_host(self, view: np.ndarray | DeviceView) -> np.ndarray:
        if not isinstance(view, DeviceView):
            return view
        stream = self._runner.stream if view.stream is None else view.stream
        array = DeviceArray(
            self._cuda, address=view.address, dtype=view.dtype, shape=view.shape, stream=stream, owner=view
        )
        return array.copy_to_host()

    def _require_as_described(self, trt: Trt, engine: Trt) -> None:
        """Check that the plan has the inputs and outputs of the header, with types that NumPy has."""
        dtypes = numpy_dtypes(trt)
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name)
            if dtype not in dtypes:
                raise BackendError(
                    f"{name!r} of {self._name!r} has elements of type {dtype.name}, which NumPy lacks. "
                    f"Let the model's inputs and outputs be float32 or float16."
                )
            side = "input" if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
            found[name] = f"{side} {dtypes[dtype]}"
        expected = {spec.name: f"input {spec.dtype}" for spec in self.inputs}
        expected |= {spec.name: f"output {spec.dtype}" for spec in self.outputs}
        if found != expected:
            raise EngineFileError(
                f"engine {self._name!r} holds {found}; its file says {expected}. Build it again: dsc-split build "
                f"BUNDLE --side SIDE --target {self._backend.target}"
            )


def _specs(tensors: tuple[PlanTensor, ...]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape) for tensor in tensors)
