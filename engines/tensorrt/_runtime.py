"""A plan, loaded: TensorRT's runtime, engine and execution context, and what each refuses put into words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dsc_split._support.files import write_bytes
from dsc_split._support.memory import says_out_of_memory
from dsc_split.engines.tensorrt._library import TrtLogger
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    DscError,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
)

__all__ = ["LoadedPlan", "failure", "numpy_dtypes"]

log = logging.getLogger(__name__)

MISMATCH_TEXTS = ("version tag does not match", "incompatible device", "not compatible with this version")
"""Lower-case pieces of what TensorRT says of a plan that was built for something else."""

DIAGNOSTICS: tuple[tuple[str, type[DscError], str], ...] = (
    ("MALFORMED_ENGINE", EngineFileError, "its plan is damaged"),
    ("VERSION_MISMATCH", EngineMismatch, "it was built by another version of the library"),
    ("UNSUPPORTED_CC", EngineMismatch, "it was built for other GPUs than this one"),
    ("OLD_CUDA_DRIVER", BackendUnavailable, "the NVIDIA driver is too old for it"),
    ("OLD_CUDA_RUNTIME", BackendUnavailable, "the CUDA runtime is too old for it"),
    ("INSUFFICIENT_GPU_MEMORY", OutOfMemoryError, "the GPU has too little memory for it"),
    ("CUDA_ERROR", BackendUnavailable, "CUDA failed when the GPU was asked"),
)
"""What TensorRT for RTX finds wrong with a plan before it is loaded, the gravest first."""


class LoadedPlan:
    """A plan in GPU memory, ready to be run.

    Attributes:
        engine: TensorRT's engine.
        context: Its execution context.
        needs_memory: Whether the context has to be given memory for activations, for the shapes that it is set to.
        facts: What is worth recording with a timing.
    """

    def __init__(
        self,
        plan: memoryview,
        *,
        trt: Any,
        logger: TrtLogger,
        name: str,
        target: str,
        runtime_cache: Path | None = None,
    ) -> None:
        """Load a plan; the GPU's context must be current.

        Args:
            plan: The bytes; free to go afterwards.
            trt: The module ``tensorrt`` or ``tensorrt_rtx``.
            logger: The process's logger for it.
            name: Of the engine, for messages.
            target: That the engine is for, for messages.
            runtime_cache: File that keeps what TensorRT for RTX compiles on this machine.

        Raises:
            EngineMismatch: It was built for another version or GPU.
            EngineFileError: It is damaged.
            OutOfMemoryError: It does not fit.
            BackendUnavailable: Driver or CUDA are too old for it.
            BackendError: TensorRT refuses it for another reason.
        """
        self.facts: dict[str, Any] = {}
        self.needs_memory = False
        self._logger = logger
        self._name = name
        self._rebuild = f"Build it again: dsc-split build BUNDLE --side SIDE --target {target}"
        self._cache_path = runtime_cache
        self._cache: Any = None
        self._cache_bytes = 0
        self._runtime: Any = None
        self.engine: Any = None
        self.context: Any = None
        logger.errors()  # what was said before is not about this plan
        try:
            self._load(plan, trt)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Save the runtime cache where it grew, and free everything, the youngest first."""
        self._save_cache()
        self.context = None
        self._cache = None
        self.engine = None
        self._runtime = None

    def _load(self, plan: memoryview, trt: Any) -> None:
        self._runtime = trt.Runtime(self._logger.native)
        if hasattr(self._runtime, "get_engine_validity"):
            self._require_valid(trt, plan)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise self._load_failure("the plan cannot be loaded")
        self.context = self._create_context(trt)
        if self.context is None:
            raise self._load_failure("no execution context can be made")

    def _require_valid(self, trt: Any, plan: memoryview) -> None:
        validity, found = self._runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.SUBOPTIMAL:
            self.facts["validity"] = "suboptimal: it runs on this GPU, but was not built for it"
        if validity != trt.EngineValidity.INVALID:
            return
        for diagnostic, error, words in DIAGNOSTICS:
            if int(found) & int(getattr(trt.EngineInvalidityDiagnostics, diagnostic)):
                raise error(f"engine {self._name!r} cannot be loaded: {words}. {self._rebuild}")
        raise self._load_failure("TensorRT says it is not valid here")

    def _create_context(self, trt: Any) -> Any:
        if not hasattr(self.engine, "create_runtime_config"):
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self.facts["jit"] = True
            # Plans that can be captured in a CUDA graph accept no other strategy, and all accept this one.
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            self.needs_memory = True
            self._cache = config.create_runtime_cache()
            self._load_cache()
            config.set_runtime_cache(self._cache)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # Kernels made for the shapes at hand are there before the first call ends, not some calls later.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return self.engine.create_execution_context(config)

    def _load_cache(self) -> None:
        if self._cache_path is None or not self._cache_path.is_file():
            return
        try:
            saved = self._cache_path.read_bytes()
        except OSError as e:
            log.warning("runtime cache %s cannot be read: %s", self._cache_path, e)
            return
        if self._cache.deserialize(saved):
            self._cache_bytes = len(saved)
        else:
            log.info("runtime cache %s is of another GPU, driver or version; it is made anew", self._cache_path)
            self._logger.errors()

    def _save_cache(self) -> None:
        if self._cache_path is None or self._cache is None or self.context is None:
            return
        serialized = self._cache.serialize()
        if serialized is None or serialized.nbytes <= self._cache_bytes:
            return
        try:
            write_bytes(self._cache_path, bytes(memoryview(serialized)))
        except DscError as e:
            log.warning("runtime cache %s is not kept: %s", self._cache_path, e)

    def _load_failure(self, what: str) -> DscError:
        text = _said(self._logger)
        if any(piece in text.lower() for piece in MISMATCH_TEXTS):
            return EngineMismatch(
                f"engine {self._name!r} was built for another version or GPU than is here: {text} {self._rebuild}"
            )
        return failure(f"engine {self._name!r}: {what}", text)


def failure(what: str, said: str | TrtLogger) -> BackendError:
    """Make the error for something that TensorRT refused.

    Args:
        what: What failed, in words, without a full stop.
        said: The library's own words, or its logger.
    """
    text = said if isinstance(said, str) else _said(said)
    if says_out_of_memory(text):
        return OutOfMemoryError(f"{what}: out of memory ({text})")
    return BackendError(f"{what}: {text}")


def _said(logger: TrtLogger) -> str:
    return " ".join(" ".join(text.split()) for text in logger.errors()) or "the library gives no reason."


def numpy_dtypes(trt: Any) -> dict[Any, str]:
    """Give the names of those of TensorRT's element types that NumPy has, too."""
    names = {
        "FLOAT": "float32",
        "HALF": "float16",
        "INT8": "int8",
        "INT32": "int32",
        "INT64": "int64",
        "UINT8": "uint8",
        "BOOL": "bool",
    }
    return {getattr(trt.DataType, name): dtype for name, dtype in names.items()}
