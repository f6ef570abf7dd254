"""Build a TensorRT plan from a parsed network."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc_split.engines._engine_file import ShapeBounds
from dsc_split.engines.tensorrt._library import TrtLibrary, interruptible
from dsc_split.errors import BackendError, OutOfMemoryError

if TYPE_CHECKING:
    from dsc_split.bundle import TensorInfo
    from dsc_split.engines._options import BuildOptions
    from dsc_split.engines.tensorrt._network import ParsedNetwork

__all__ = ["BuiltPlan", "Shapes", "build_plan", "profile_shapes"]

NO_MEMORY = re.compile(r"OutOfMemory|out of memory|insufficient memory on workspace", re.I)
NO_TACTIC = "Tactic Selection: no tactics"
"""What is said where no implementation of a layer gets by with the workspace."""
REQUESTED = re.compile(r"Requested size was (\d+)")
REFUSED_OPERATION = re.compile(r"Cannot compile operation '([^']+)' for ([^:]+): ([^.]+)\.")
REFUSED_TYPE = re.compile(
    r"Cannot compile for target\(s\) ([^,]+), because the model contains HW-specific datatypes: (\w+)"
)

MAX_ELEMENTS = 2**31 - 1
"""Most elements that an input or output may have: beyond, the library no longer counts reliably."""

Shapes = dict[str, ShapeBounds]


@dataclass(frozen=True, kw_only=True)
class BuiltPlan:
    """A plan, and what the builder says of it."""

    plan: bytes
    """What the library takes."""
    tf32: bool
    """Whether float32 layers may compute in TF32."""
    activation_bytes: int
    """Memory for activations, scratch included, at the largest shapes of the profile."""
    scratch_bytes: int
    """Scratch memory of the greediest layer."""
    weights_bytes: int
    """Memory for weights."""


def profile_shapes(parsed: ParsedNetwork, tensors: Mapping[str, TensorInfo], profile: tuple[int, int, int]) -> Shapes:
    """Return smallest, best and largest shape of every input, by name.

    Raises:
        BackendError: The bundle does not know an input, an input's values shape other tensors, or an input or output
            is too large at the largest batch.
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
    configure: Callable[[Any], None],
    after: Callable[[Any], None],
    tell: Callable[[str], None],
) -> BuiltPlan:
    """Build a plan.

    Args:
        library: TensorRT or TensorRT for RTX.
        parsed: The network.
        shapes: From :func:`profile_shapes`.
        options: How to build.
        configure: Sets what the target needs on the builder's configuration.
        after: Takes from the configuration what the build has learnt.
        tell: Told the name of the phase that the library is in.

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
    """Turn what the library logged into an error of ours."""
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


def _monitor(trt: Any, tell: Callable[[str], None], interrupted: Callable[[], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is known at run time alone
        """Tells the phase, and stops the build when it is interrupted.

        The library swallows what these methods raise, so it is kept, and raised when the build has ended.
        """

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            """Tell of a phase; ``num_steps`` says little, for nearly all the time goes into one of them."""
            try:
                tell(phase_name)
            except BaseException as e:  # kept for the end of the build
                self.stopped = self.stopped or e

        def step_complete(self, phase_name: str, step: int) -> bool:
            """Tell the library whether to go on."""
            return self.stopped is None and not interrupted()

        def phase_finish(self, phase_name: str) -> None:
            """Nothing is to be done."""

    return Monitor()
