"""Load a plan with TensorRT's runtime, and turn its errors into errors of dsc-split."""

from __future__ import annotations

import logging
from pathlib import Path

from dsc_split._support.files import write_bytes
from dsc_split._support.memory import says_out_of_memory
from dsc_split._support.records import Facts
from dsc_split.engines.tensorrt._library import Trt, TrtLogger
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
"""Lower-case parts of TensorRT's messages about a plan that was built for something else."""

DIAGNOSTICS: tuple[tuple[str, type[DscError], str], ...] = (
    ("MALFORMED_ENGINE", EngineFileError, "its plan is damaged"),
    ("VERSION_MISMATCH", EngineMismatch, "it was built by another version of the library"),
    ("UNSUPPORTED_CC", EngineMismatch, "it was built for other GPUs than this one"),
    ("OLD_CUDA_DRIVER", BackendUnavailable, "the NVIDIA driver is too old for it"),
    ("OLD_CUDA_RUNTIME", BackendUnavailable, "the CUDA runtime is too old for it"),
    ("INSUFFICIENT_GPU_MEMORY", OutOfMemoryError, "the GPU has too little memory for it"),
    ("CUDA_ERROR", BackendUnavailable, "CUDA failed when the GPU was asked"),
)
"""Reasons of TensorRT for RTX not to load a plan, the most serious first."""


class LoadedPlan:
    """A plan in GPU memory, ready to be run.

    Attributes:
        engine: TensorRT's engine.
        context: Its execution context.
        needs_memory: Whether the caller must give the context memory for activations, for its current shapes.
        facts: Facts to record with a timing.
    """

    def __init__(
        self,
        plan: memoryview,
        *,
        trt: Trt,
        logger: TrtLogger,
        name: str,
        target: str,
        runtime_cache: Path | None = None,
    ) -> None:
        """Load a plan; the GPU's context must be current.

        Args:
            plan: The bytes; not needed afterwards.
            trt: The module ``tensorrt`` or ``tensorrt_rtx``.
            logger: The process's logger for it.
            name: Name of the engine, for messages.
            target: Target of the engine, for messages.
            runtime_cache: File for code that TensorRT for RTX compiles on this machine.

        Raises:
            EngineMismatch: It was built for another version or GPU.
            EngineFileError: It is damaged.
            OutOfMemoryError: There is too little memory.
            BackendUnavailable: The driver or CUDA is too old for it.
            BackendError: TensorRT cannot load it for another reason.
        """
        self.facts: Facts = {}
        self.needs_memory = False
        self._logger = logger
        self._name = name
        self._rebuild = f"Build it again: dsc-split build BUNDLE --side SIDE --target {target}"
        self._cache_path = runtime_cache
        self._cache: Trt = None
        self._cache_bytes = 0
        self._runtime: Trt = None
        self.engine: Trt = None
        self.context: Trt = None
        logger.errors()  # drop errors that are not about this plan
        try:
            self._load(plan, trt)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Save the runtime cache if it grew, and free everything, the newest object first."""
        self._save_cache()
        self.context = None
        self._cache = None
        self.engine = None
        self._runtime = None

    def _load(self, plan: memoryview, trt: Trt) -> None:
        self._runtime = trt.Runtime(self._logger.native)
        if hasattr(self._runtime, "get_engine_validity"):
            self._require_valid(trt, plan)
        self.engine = self._runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise self._load_failure("the plan cannot be loaded")
        self.context = self._create_context(trt)
        if self.context is None:
            raise self._load_failure("no execution context can be made")

    def _require_valid(self, trt: Trt, plan: memoryview) -> None:
        validity, found = self._runtime.get_engine_validity(plan)
        if validity == trt.EngineValidity.SUBOPTIMAL:
            self.facts["validity"] = "suboptimal: it runs on this GPU, but was not built for it"
        if validity != trt.EngineValidity.INVALID:
            return
        for diagnostic, error, words in DIAGNOSTICS:
            if int(found) & int(getattr(trt.EngineInvalidityDiagnostics, diagnostic)):
                raise error(f"engine {self._name!r} cannot be loaded: {words}. {self._rebuild}")
        raise self._load_failure("TensorRT says it is not valid here")

    def _create_context(self, trt: Trt) -> Trt:
        if not hasattr(self.engine, "create_runtime_config"):
            return self.engine.create_execution_context()
        config = self.engine.create_runtime_config()
        if hasattr(config, "create_runtime_cache"):
            self.facts["jit"] = True
            # Every plan accepts this strategy; plans for CUDA graphs accept no other.
            config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            self.needs_memory = True
            self._cache = config.create_runtime_cache()
            self._load_cache()
            config.set_runtime_cache(self._cache)
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # Compile kernels for the current shapes during the first call, not some calls later.
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
        text = _read_errors(self._logger)
        if any(piece in text.lower() for piece in MISMATCH_TEXTS):
            return EngineMismatch(
                f"engine {self._name!r} was built for another version or GPU than is here: {text} {self._rebuild}"
            )
        return failure(f"engine {self._name!r}: {what}", text)


def failure(what: str, said: str | TrtLogger) -> BackendError:
    """Return the error for a failure of TensorRT.

    Args:
        what: What failed, without a full stop.
        said: The library's message, or its logger.
    """
    text = said if isinstance(said, str) else _read_errors(said)
    if says_out_of_memory(text):
        return OutOfMemoryError(f"{what}: out of memory ({text})")
    return BackendError(f"{what}: {text}")


def _read_errors(logger: TrtLogger) -> str:
    return " ".join(" ".join(text.split()) for text in logger.errors()) or "the library gives no reason."


def numpy_dtypes(trt: Trt) -> dict[Trt, str]:
    """Return the names of TensorRT's element types that NumPy has, too."""
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
