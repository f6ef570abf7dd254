"""ONNX Runtime on the processor or on CUDA. It loads the graph itself; no engine files are built."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.optional import require
from dsc_split._support.records import Facts
from dsc_split.engines._base import Backend, Engine, TensorSpec
from dsc_split.engines._fingerprint import gpu
from dsc_split.engines._source import EngineSource, Weights
from dsc_split.engines.gpu._cuda import CudaLayer, hold, open_cuda
from dsc_split.engines.gpu._io_tensors import IoTensor, Place
from dsc_split.errors import BackendError, BackendUnavailable

if TYPE_CHECKING:
    import numpy as np

__all__ = ["OnnxRuntimeBackend"]

Ort = Any
"""The module ``onnxruntime``, or an object of it: it has no types."""

CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0"}
"""TF32 is off: float32 graphs compute in float32."""

SESSION_CONFIG = {"session.force_spinning_stop": "1"}
"""Idle threads do not spin: they would slow down other engines in the process."""

SHARED_WEIGHTS = ("session.use_external_initializer_file_buffers_directly", "1")
"""Sessions of a process share the weights in memory, except weights that a session repacks."""

NO_WAIT = ("disable_synchronize_execution_providers", "1")
"""Run option: do not wait for the stream; the caller waits, after the copies that follow."""

DTYPES = {"float": "float32", "double": "float64"}
"""ONNX names of element types, where ONNX Runtime has other names."""

MISSING_OP = re.compile(
    r"[Ff]ind an? implementation for (?P<op>[\w.:]+)\(|error: (?P<custom>[\w.]+:\w+)\(-?\d+\) is not a reg"
)


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime with one execution provider, named explicitly."""

    def _require(self) -> None:
        ort = require("onnxruntime", extra=self.extra, purpose=f"run on target {str(self.target)!r}")
        if self._provider not in ort.get_available_providers():
            raise self._unavailable(
                f"this onnxruntime has no {self._provider}, only {', '.join(ort.get_available_providers())}. "
                f"Install the one that has: pip uninstall onnxruntime; pip install 'dsc-split[{self.extra}]'"
            )
        self._ort = ort

    def require_device(self) -> None:
        """Check that the target's device can be used.

        Raises:
            BackendUnavailable: The target needs CUDA, and there is no GPU or no driver.
        """
        if self.target.architecture == "cuda":
            self._open_cuda()

    def _open_cuda(self) -> CudaLayer:
        try:
            return open_cuda(extra=self.extra, primary=True)  # ONNX Runtime uses no other context
        except BackendUnavailable as e:
            raise self._unavailable(str(e)) from e

    @property
    def _provider(self) -> str:
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.target.architecture]

    @property
    def _provider_options(self) -> dict[str, str]:
        return CUDA_OPTIONS if self.target.architecture == "cuda" else {}

    def _build_facts(self) -> Facts:
        options = {**SESSION_CONFIG, **self._provider_options}
        return {"library": "onnxruntime", "version": self._ort.__version__, "options": options}

    def _device_facts(self) -> Facts:
        return {"gpu": gpu()} if self.target.architecture == "cuda" else {}

    def _load(self, source: Path | EngineSource, sha256: str | None, digest: str | None) -> Engine:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised; print nothing
        if self.target.threads is not None:
            options.intra_op_num_threads = self.target.threads
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        if self.target.architecture == "cpu":
            return OnnxRuntimeEngine(self, source.name, self._session(source, options, {}))
        cuda = self._open_cuda()
        with cuda.active(), contextlib.ExitStack() as held:
            stream = hold(held, cuda, cuda.create_stream())
            session = self._session(source, options, {"user_compute_stream": str(stream.value)})
            return CudaEngine(self, source.name, session, ort=self._ort, cuda=cuda, stream=stream.value, held=held)

    def _session(self, source: Path | EngineSource, options: Ort, extra_options: dict[str, str]) -> Ort:
        provider = (self._provider, {**self._provider_options, **extra_options})
        with contextlib.ExitStack() as held:
            model, weights = _session_graph(source, options, held)
            session = self._ort.InferenceSession(model, options, providers=[provider])
        session.weights = weights  # the session uses this memory, so it must keep it
        if session.get_providers()[0] != self._provider:
            raise self._unavailable(
                f"onnxruntime could not start {self._provider}, only {session.get_providers()[0]}. "
                f"Check the driver, CUDA and cuDNN: dsc-split doctor"
            )
        return session

    def _explain(self, text: str) -> str:
        if match := MISSING_OP.search(text):
            op = match["op"] or match["custom"]
            return f"there is no operator {op!r}. Replace it in the model, or choose another target. ({text})"
        return text


def _session_graph(
    source: Path | EngineSource, options: Ort, held: contextlib.ExitStack
) -> tuple[str | bytes, Weights | None]:
    """Return the graph for a session, and the weights in memory that the session uses.

    Args:
        source: A graph.
        options: Options of the session; the weights are added to them.
        held: Close it when the session is made.
    """
    if isinstance(source, Path):
        return str(source), None
    if not hasattr(options, "add_external_initializers_from_files_in_memory"):
        return str(held.enter_context(source.written())), None
    weights = source.read_weights()
    if weights is not None:
        names, buffers, sizes_bytes = [weights.name], [weights.data], [weights.size_bytes]
        options.add_external_initializers_from_files_in_memory(names, buffers, sizes_bytes)
        options.add_session_config_entry(*SHARED_WEIGHTS)
    return source.data, weights


class OnnxRuntimeEngine(Engine):
    """A session of ONNX Runtime."""

    def __init__(self, backend: Backend, name: str, session: Ort) -> None:
        super().__init__(
            backend,
            name,
            tuple(_tensor_spec(item, name) for item in session.get_inputs()),
            tuple(_tensor_spec(item, name) for item in session.get_outputs()),
        )
        self._session = session
        self._output_names = [spec.name for spec in self.outputs]

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._output_names, self._session.run(self._output_names, dict(inputs)), strict=True))

    def _bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        return functools.partial(self._session.run, self._output_names, dict(inputs))

    def _close(self) -> None:
        self._session = None


class CudaEngine(OnnxRuntimeEngine):
    """A session on CUDA; its work and the copies of inputs and outputs are enqueued in one stream."""

    def __init__(
        self,
        backend: Backend,
        name: str,
        session: Ort,
        *,
        ort: Ort,
        cuda: CudaLayer,
        stream: int,
        held: contextlib.ExitStack,
    ) -> None:
        """Take over a session, and all that ``held`` frees; ``held`` is empty afterwards.

        Raises:
            BackendError: An input or output has elements of a type that NumPy lacks.
        """
        super().__init__(backend, name, session)
        place: Place = "mapped" if backend.target.io == "mapped" else "pinned"
        why_no_graph = "ONNX Runtime captures a graph only where every operator runs on the GPU; it is not asked to"
        self.facts = {"io": place, "cuda_graph": why_no_graph, "file": name}
        self._ort = ort
        self._cuda = cuda
        self._stream = stream
        self._place = place
        for spec in (*self.inputs, *self.outputs):
            _numpy_dtype(spec, name)
        self._owned = held.pop_all()

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._cuda.active():
            return super()._run(inputs)

    def _bind(self, inputs: Mapping[str, np.ndarray]) -> BoundSession:
        options = self._ort.RunOptions()
        options.add_run_config_entry(*NO_WAIT)
        with self._cuda.active(), contextlib.ExitStack() as held:
            call = BoundSession(self._session, options, self._cuda, self._stream, held)
            for spec in self.inputs:
                call.add_input(spec.name, inputs[spec.name], self._new_tensor(held, spec))
            results = self._run(inputs)
            for spec in self.outputs:
                call.add_output(spec.name, results[spec.name].shape, self._new_tensor(held, spec))
            held.callback(call.forget)
            self._owned.push(held.pop_all())
        return call

    def _new_tensor(self, held: contextlib.ExitStack, spec: TensorSpec) -> IoTensor:
        tensor = IoTensor(self._cuda, _numpy_dtype(spec, self._name), self._place)
        held.callback(tensor.close)
        return tensor

    def _close(self) -> None:
        with self._cuda.active(), self._owned:
            super()._close()


class BoundSession:
    """A call without arguments; its inputs and outputs are in page-locked memory.

    Attributes:
        outputs: By name; their ``host`` arrays hold the results until the next call.
    """

    def __init__(self, session: Ort, options: Ort, cuda: CudaLayer, stream: int, held: contextlib.ExitStack) -> None:
        self.outputs: dict[str, IoTensor] = {}
        self._inputs: dict[str, IoTensor] = {}
        self._binding = session.io_binding()
        self._session = session
        self._options = options
        self._cuda = cuda
        self._stream = stream
        self._start = hold(held, cuda, cuda.create_event())
        self._end = hold(held, cuda, cuda.create_event())

    def add_input(self, name: str, array: np.ndarray, tensor: IoTensor) -> None:
        """Copy an input into page-locked memory, and bind its GPU memory."""
        tensor.resize(array.shape)
        tensor.host[...] = array
        self._inputs[name] = tensor
        self._binding.bind_input(name, "cuda", self._cuda.device, tensor.dtype.type, tensor.shape, tensor.address)

    def add_output(self, name: str, shape: tuple[int, ...], tensor: IoTensor) -> None:
        """Allocate memory for an output, and bind it."""
        tensor.resize(shape)
        self.outputs[name] = tensor
        self._binding.bind_output(name, "cuda", self._cuda.device, tensor.dtype.type, tensor.shape, tensor.address)

    def __call__(self) -> None:
        """Copy the inputs, compute, copy the outputs, and wait."""
        cuda, stream = self._cuda, self._stream
        with cuda.active():
            for tensor in self._inputs.values():
                tensor.to_device(stream)
            cuda.record(self._start, stream)
            self._session.run_with_iobinding(self._binding, self._options)
            cuda.record(self._end, stream)
            for tensor in self.outputs.values():
                tensor.to_host(stream)
            cuda.synchronise(stream)

    def compute_ms(self) -> float:
        """Return the milliseconds that the last call took on the GPU, without copies."""
        with self._cuda.active():
            return self._cuda.elapsed_ms(self._start, self._end)

    def forget(self) -> None:
        """Drop the session, which keeps GPU memory."""
        self._binding = self._session = None


def _numpy_dtype(spec: TensorSpec, name: str) -> np.dtype:
    import numpy as np

    with contextlib.suppress(TypeError):
        dtype = np.dtype(spec.dtype)
        if dtype.isbuiltin == 1:  # not added by another package
            return dtype
    raise BackendError(
        f"{spec.name!r} of {name!r} has elements of type {spec.dtype}, which NumPy lacks; it cannot be on a GPU."
    )


def _tensor_spec(item: Ort, name: str) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", item.type)
    if match is None:
        raise BackendError(f"{name!r} has {item.name!r} of type {item.type!r}; only tensors can be given and taken.")
    return TensorSpec(name=item.name, dtype=DTYPES.get(match[1], match[1]), shape=tuple(item.shape))
