"""ONNX Runtime, on the processor or on CUDA: loads a graph as it is, compiles nothing ahead of time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._optional import require
from dsc_split.engines._base import Backend, Engine, TensorSpec
from dsc_split.engines._fingerprint import gpu
from dsc_split.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["OnnxRuntimeBackend"]

CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0"}
"""TF32 is off: the precision of a graph is what the graph says."""

SESSION_CONFIG = {"session.force_spinning_stop": "1"}
"""Threads of an engine that is not running do not spin: engines in one process would slow each other down."""

DTYPES = {"float": "float32", "double": "float64"}
"""Element types that ONNX Runtime calls otherwise than ONNX."""

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

    @property
    def _provider(self) -> str:
        return {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[self.target.architecture]

    @property
    def _provider_options(self) -> dict[str, str]:
        return CUDA_OPTIONS if self.target.architecture == "cuda" else {}

    def _build_facts(self) -> dict[str, Any]:
        options = {**SESSION_CONFIG, **self._provider_options}
        return {"library": "onnxruntime", "version": self._ort.__version__, "options": options}

    def _device_facts(self) -> dict[str, Any]:
        return {"gpu": gpu()} if self.target.architecture == "cuda" else {}

    def _load(self, path: Path) -> Engine:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4  # errors come as exceptions; nothing is to be printed
        if self.target.threads is not None:
            options.intra_op_num_threads = self.target.threads
        for key, value in SESSION_CONFIG.items():
            options.add_session_config_entry(key, value)
        provider = (self._provider, self._provider_options)
        session = self._ort.InferenceSession(str(path), options, providers=[provider])
        if session.get_providers()[0] != self._provider:
            raise self._unavailable(
                f"onnxruntime could not start {self._provider}, only {session.get_providers()[0]}. "
                f"Check the driver, CUDA and cuDNN: dsc-split doctor"
            )
        return OnnxRuntimeEngine(self, path.name, session)

    def _explain(self, text: str) -> str:
        if match := MISSING_OP.search(text):
            op = match["op"] or match["custom"]
            return f"there is no operator {op!r}. Replace it in the model, or choose another target. ({text})"
        return text


class OnnxRuntimeEngine(Engine):
    """A session."""

    def __init__(self, backend: Backend, name: str, session: Any) -> None:
        super().__init__(
            backend,
            name,
            tuple(_spec(item, name) for item in session.get_inputs()),
            tuple(_spec(item, name) for item in session.get_outputs()),
        )
        self._session = session
        self._output_names = [spec.name for spec in self.outputs]

    def _run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self._output_names, self._session.run(self._output_names, dict(inputs)), strict=True))

    def _bind(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
        return functools.partial(self._session.run, self._output_names, dict(inputs))

    def _close(self) -> None:
        self._session = None


def _spec(item: Any, name: str) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", item.type)
    if match is None:
        raise BackendError(f"{name!r} has {item.name!r} of type {item.type!r}; only tensors can be given and taken.")
    return TensorSpec(name=item.name, dtype=DTYPES.get(match[1], match[1]), shape=tuple(item.shape))
