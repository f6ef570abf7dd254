"""Find and read the TensorRT plans for Triton: one per compute capability of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsc_split.errors import BundleError, EngineFileError, EngineMismatch, UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle, TensorInfo
    from dsc_split.bundles._records import TargetEntry

__all__ = ["Plan", "choose_targets", "find_plans", "read_raw_plan", "refuse_rtx"]

_BUILD = "dsc-split build BUNDLE --side server --target tensorrt"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A TensorRT plan of the bundle that Triton can load."""

    capability: str
    """Compute capability of the GPU that it was built on: ``8.6``."""
    target_id: str
    """Name of its target's folder in the bundle."""
    path: str
    """Its file, relative to the bundle."""
    graph_digest: str
    """Digest of the graph that it was built from."""
    batches: tuple[int, int]
    """Smallest and largest batch size."""

    @property
    def file_name(self) -> str:
        """Its name in the model repository: never ``model.plan``, which Triton loads on any GPU."""
        return f"model_cc{self.capability.replace('.', '')}.plan"


def refuse_rtx(target: str) -> UsageError:
    """Return the error for a target that Triton does not serve."""
    return UsageError(
        f"target {target!r}: Triton does not load plans of TensorRT for RTX. Serve the ONNX graphs (--onnx), "
        f"or build with full TensorRT on the server: {_BUILD}"
    )


def choose_targets(bundle: Bundle, target: str | None) -> tuple[TargetEntry, ...]:
    """Choose which targets of the server to export.

    Args:
        bundle: The bundle.
        target: A target, or the name of its folder under ``engines/``; ``None`` for the one that was asked for last.

    Returns:
        Entries of the manifest, one per kind of GPU; none if the server runs the ONNX graphs.

    Raises:
        UsageError: There is no such target, or Triton does not load its engines.
    """
    recorded = bundle.manifest.targets.server
    if target is None:
        library = recorded[-1].library if recorded else None
        chosen = tuple(entry for entry in recorded if entry.library == library)
    else:
        chosen = tuple(entry for entry in recorded if entry.id == target) or _parse_target(bundle, target)
    names = {entry.library: entry.target for entry in chosen}
    if "tensorrt_rtx" in names:
        raise refuse_rtx(names["tensorrt_rtx"])
    return tuple(entry for entry in chosen if entry.library == "tensorrt")


def _parse_target(bundle: Bundle, target: str) -> tuple[TargetEntry, ...]:
    from dsc_split.engines import Target

    parsed = Target.parse(target)
    if parsed.backend == "tensorrt-rtx":
        raise refuse_rtx(str(parsed))
    targets = bundle.manifest.targets
    chosen = targets.named("server", str(parsed))
    if not chosen and parsed.backend == "tensorrt":
        known = ", ".join(f"{entry.target} ({entry.id})" for entry in targets.server) or "none"
        raise UsageError(f"nothing was built for target {str(parsed)!r}; recorded are: {known}. Build it: {_BUILD}")
    return chosen


def find_plans(bundle: Bundle, targets: Sequence[TargetEntry], graph: str) -> tuple[tuple[Plan, ...], list[str]]:
    """Find the plans of a graph, one per compute capability.

    If a target has an engine per batch size, that of the largest is taken, because it runs smaller batches too.

    Args:
        bundle: The bundle.
        targets: From :func:`choose_targets`.
        graph: Path of the graph, relative to the bundle.

    Returns:
        The plans by compute capability, and why targets have none.

    Raises:
        UsageError: Two plans are for one compute capability.
        BundleError: A target does not say which GPU it was built on.
    """
    plans: dict[str, Plan] = {}
    missing = []
    for entry in targets:
        engines = [engine for engine in entry.built if engine.graph == graph]
        if not engines:
            failed = [item.reason for item in entry.failures if item.graph == graph]
            missing.append(f"no plan in {entry.id}: {failed[0] if failed else 'it was not built'}")
            continue
        capability = entry.fingerprint.get("compute_capability")
        if not isinstance(capability, str):
            raise BundleError(f"target {entry.id!r} does not say which compute capability it is of. Build it again.")
        engine = max(engines, key=lambda engine: engine.profile[2])
        plan = Plan(
            capability=capability,
            target_id=entry.id,
            path=engine.path,
            graph_digest=engine.graph_digest,
            batches=(engine.profile[0], engine.profile[2]),
        )
        other = plans.setdefault(capability, plan)
        if other is not plan:
            raise UsageError(
                f"{other.path!r} and {plan.path!r} are both for compute capability {capability}, and Triton takes one "
                f"of each. Choose: --target {other.target_id} or --target {plan.target_id}"
            )
    return tuple(plan for _, plan in sorted(plans.items())), missing


def read_raw_plan(
    bundle: Bundle,
    plan: Plan,
    *,
    graph_digest: str,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    expect_trt: str | None,
) -> tuple[memoryview, str]:
    """Read the bytes of a plan as TensorRT takes them.

    Args:
        bundle: The bundle.
        plan: The plan.
        graph_digest: Digest of the graph that it must be built from.
        inputs: Inputs that it must have.
        outputs: Outputs that it must have.
        expect_trt: Version of TensorRT that must have built it; ``None`` for any.

    Returns:
        The bytes, and the version of TensorRT that built them.

    Raises:
        SignatureError: The bundle is packed and not trusted.
        BundleError: The file is missing or was changed.
        EngineFileError: It is damaged, or was built from another graph.
        EngineMismatch: Another version than ``expect_trt`` built it.
    """
    from dsc_split.engines._engine_file import read_plan
    from dsc_split.engines._source import EngineSource

    bundle.require_trust(f"plan {plan.path!r}")
    data, sha256 = bundle.read(plan.path), bundle.listed(plan.path).sha256
    file = read_plan(EngineSource(name=plan.path, data=data, sha256=sha256), sha256=sha256)
    header = file.header
    if header.library != "tensorrt":
        raise refuse_rtx(header.target)
    if {plan.graph_digest, header.graph_digest} != {graph_digest}:
        raise EngineFileError(f"plan {plan.path!r} was built from another graph than the bundle's. Build it: {_BUILD}")
    found = header.build_fingerprint.get("compute_capability")
    if found != plan.capability:
        raise EngineFileError(
            f"plan {plan.path!r} is of compute capability {found}; by the manifest {plan.capability} was expected. "
            f"Build it: {_BUILD}"
        )
    for kind, infos, tensors in (("inputs", inputs, header.inputs), ("outputs", outputs, header.outputs)):
        has = {tensor.name: tensor.dtype for tensor in tensors}
        wanted = {info.name: info.dtype for info in infos}
        if has != wanted:
            raise EngineFileError(
                f"plan {plan.path!r} has the {kind} {has}; {wanted} were expected. Build it: {_BUILD}"
            )
    if expect_trt is not None and header.library_version != expect_trt:
        raise EngineMismatch(
            f"plan {plan.path!r} was built by TensorRT {header.library_version}; {expect_trt} was expected, and a "
            f"plan runs on the very version that built it. Build it with that one: {_BUILD}"
        )
    return file.plan, header.library_version
