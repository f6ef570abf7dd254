"""Build a TensorRT plan from a parsed network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.engines._engine_file import ShapeBounds
from dsc_split.engines.tensorrt._library import Trt, TrtLibrary, interruptible
from dsc_split.errors import BackendError, OutOfMemoryError

if TYPE_CHECKING:
    from dsc_split.bundle import TensorInfo
    from dsc_split.engines._options import BuildOptions
    from dsc_split.engines.tensorrt._network import ParsedNetwork

__all__ = ["BuiltPlan", "Shapes", "build_plan", "profile_shapes"]

NO_MEMORY = re.compile(r"OutOfMemory|out of memory|insufficient memory on workspace", re.I)
NO_TACTIC = "Tactic Selection: no tactics"
"""Message if the workspace is too small for all implementations of a layer."""
REQUESTED = re.compile(r"Requested size was (\d+)")
REFUSED_OPERATION = re.compile(r"Cannot compile operation '([^']+)' for ([^:]+): ([^.]+)\.")
REFUSED_TYPE = re.compile(
    r"Cannot compile for target\(s\) ([^,]+), because the model contains HW-specific datatypes: (\w+)"
)

MAX_ELEMENTS = 2**31 - 1
"""Largest number of elements of an input or output: the library miscounts larger ones."""

Shapes = dict[str, ShapeBounds]


@dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A plan, and what the builder reports about it."""

    plan: bytes
    """The bytes of the plan."""
    tf32: bool
    """Whether float32 layers may compute in TF32."""
    activation_bytes: int
    """Memory for activations and scratch at the largest shapes of the profile."""
    scratch_bytes: int
    """Largest scratch memory of a layer."""
    weights_bytes: int
    """Memory for weights."""


def profile_shapes(parsed: ParsedNetwork, tensors: Mapping[str, TensorInfo], profile: tuple[int, int, int]) -> Shapes:
    """Return the smallest, best and largest shape of every input, by name.

    Raises:
        BackendError: The bundle does not know an input, an input's values determine shapes, or an input or output is
            too large at the largest batch.
    """
    shapes: Shapes = {}
    largest = profile[2]
    for tensor in (*parsed.inputs, *parsed.outputs):
        known = tensors.get(tensor.name)
        if known is not None and known.elements(largest) > MAX_ELEMENTS:
            raise BackendError(
                f"tensor {tensor.name!r} has {known.elements(largest)} elements at batch {largest}; "
                f"at most {MAX_ELEMENTS} can be had. Choose smaller --batches."
            )
    for tensor in parsed.inputs:
        known = tensors.get(tensor.name)
        if known is None:
            raise BackendError(f"input {tensor.name!r} is not in the bundle's manifest. Export it again.")
        if getattr(tensor, "is_shape_tensor", False):
            raise BackendError(
                f"the values of input {tensor.name!r} decide the shapes of other tensors, which no profile can "
                "describe. Make it a constant of the model, or choose another target."
            )
        low, best, high = map(known.shape_at, profile)
        shapes[tensor.name] = ShapeBounds(min=low, opt=best, max=high)
    return shapes


def build_plan(
    library: TrtLibrary,
    parsed: ParsedNetwork,
    shapes: Shapes,
    options: BuildOptions,
    configure: Callable[[Trt], None],
    after: Callable[[Trt], None],
    tell: Callable[[str], None],
) -> BuiltPlan:
    """Build a plan.

    Args:
        library: TensorRT or TensorRT for RTX.
        parsed: The network.
        shapes: From :func:`profile_shapes`.
        options: How to build.
        configure: Sets the builder's configuration for the target.
        after: Saves the kernel timings in the configuration.
        tell: Called with the name of each phase of the library.

    Raises:
        BackendError: It cannot be built; the message names the operation where the library does.
        OutOfMemoryError: The workspace is too small.
        KeyboardInterrupt: It was interrupted.
    """
    builder, network = parsed.builder, parsed.network
    config = builder.create_builder_config()
    config.clear_flag(library.trt.BuilderFlag.TF32)  # a float32 graph computes in float32
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(library.trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if any(size < 0 for tensor in parsed.inputs for size in tensor.shape):
        profile = builder.create_optimization_profile()
        for name, bounds in shapes.items():
            profile.set_shape(name, bounds.min, bounds.opt, bounds.max)
        if config.add_optimization_profile(profile) < 0:
            raise BackendError(f"the shapes {shapes} are refused: {'; '.join(library.logger.errors())}")
    configure(config)
    library.logger.errors()
    library.logger.memory()
    with interruptible() as interrupted:
        monitor = _monitor(library.trt, tell, interrupted)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    errors = library.logger.errors()
    if plan is None:
        raise _failure(errors, options)
    after(config)
    memory = library.logger.memory()
    return BuiltPlan(
        plan=bytes(plan),
        tf32=config.get_flag(library.trt.BuilderFlag.TF32),
        **{name: memory.get(name, 0) for name in ("activation_bytes", "scratch_bytes", "weights_bytes")},
    )


def _failure(errors: list[str], options: BuildOptions) -> BackendError:
    """Return the error for what the library logged."""
    text = "; ".join(errors) or "the library gives no reason"
    if match := REFUSED_OPERATION.search(text):
        ways = "Choose another target, or export with --precision fp16"
        ways += ", or let this operation alone compute in float16: --gemm fp16." if "GEMM" in match[3] else "."
        return BackendError(f"{match[2]} cannot compute operation {match[1]!r}: {match[3]}. {ways}")
    if match := REFUSED_TYPE.search(text):
        name = {"b16": "bfloat16"}.get(match[2], match[2])
        return BackendError(f"{match[1]} has no {name}. Choose another target, or export with --precision fp16.")
    if NO_MEMORY.search(text) or (options.workspace_bytes is not None and NO_TACTIC in text):
        limit = "" if options.workspace_bytes is None else f" of {options.workspace_bytes} bytes"
        match = REQUESTED.search(text)
        needs = f": one step needs {match[1]} bytes" if match else ""
        return OutOfMemoryError(f"the workspace{limit} is too small{needs}. Raise --workspace. ({text[:300]})")
    return BackendError(text[:1000])


def _monitor(trt: Trt, tell: Callable[[str], None], interrupted: Callable[[], bool]) -> Trt:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is known only at run time
        """Reports phases, and stops the build after an interrupt.

        The library ignores exceptions of these methods, so they are kept in ``stopped`` and raised after the build.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Report a phase, without ``num_steps``: one step takes nearly all the time."""
            try:
                tell(phase_name)
            except BaseException as e:  # raised after the build
                self.stopped = self.stopped or e

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Return whether the library continues."""
            return self.stopped is None and not interrupted()

        def phase_finish(self, phase_name: str) -> None:
            """Do nothing."""

    return Monitor()
