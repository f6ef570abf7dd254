"""Engine files of full TensorRT, as bundles have them; what the library built is pretended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace
from tests.support.engine_header import HEADER
from tests.support.full_bundles import list_file

from dsc_split._support.records import Facts
from dsc_split.bundle import Bundle, TensorInfo
from dsc_split.bundles._records import EngineEntry, FailedEngine, TargetEntry
from dsc_split.engines import target_id
from dsc_split.engines._engine_file import PlanProfile, PlanTensor, ShapeBounds, write_plan

__all__ = ["plan_bytes", "record_plans"]


def plan_bytes(graph: str, capability: str) -> bytes:
    """Give what stands for a plan."""
    return f"plan of {graph} for {capability}".encode()


def record_plans(
    bundle: Bundle,
    versions: Mapping[str, str],
    *,
    gpu: str = "GPU",
    profile: tuple[int, int, int] = (1, 8, 32),
    per_batch: tuple[int, ...] = (),
    without: tuple[str, ...] = (),
    **header: Any,
) -> Bundle:
    """Record plans of every graph of the server, as if they were built on several GPUs.

    Args:
        bundle: The bundle.
        versions: Version of TensorRT by compute capability.
        gpu: Name of the GPUs.
        profile: Batch sizes of each engine.
        per_batch: Build an engine for each of these, instead.
        without: Graphs whose build failed.
        header: Other entries of the engine files' headers.
    """
    profiles = [(1, batch, batch) for batch in per_batch] or [profile]
    for capability, version in versions.items():
        fingerprint: Facts = {
            "architecture": "cuda",
            "library": "tensorrt",
            "version": version,
            "gpu": gpu,
            "compute_capability": capability,
        }
        failed = tuple(FailedEngine(graph=graph, reason="no kernel") for graph in without)
        entry = TargetEntry(
            target="tensorrt:cuda", fingerprint=fingerprint, id=target_id(fingerprint), engines=(), failed=failed
        )
        engines = tuple(
            write_one(bundle, entry, graph, (inputs, outputs), each, header)
            for graph, inputs, outputs in server_graphs(bundle)
            for each in (profiles if graph not in without else [])
        )
        with bundle.edit() as draft:
            draft.set_targets("server", (*draft.manifest.targets.server, replace(entry, engines=engines)))
    return Bundle.open(bundle.path)


def server_graphs(bundle: Bundle) -> list[tuple[str, tuple[TensorInfo, ...], tuple[TensorInfo, ...]]]:
    tails = [
        (split.tail, split.tensors, tuple(info for info in bundle.outputs if info.name not in split.early_outputs))
        for split in bundle.splits
    ]
    return [(bundle.manifest.model.path, bundle.inputs, bundle.outputs), *tails]


def write_one(
    bundle: Bundle,
    entry: TargetEntry,
    graph: str,
    border: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]],
    profile: tuple[int, int, int],
    changes: Mapping[str, Any],
) -> EngineEntry:
    """Write an engine file, and list it; return its entry."""
    low, best, high = profile
    inputs, outputs = (tuple(map(plan_tensor, infos)) for infos in border)
    stem = graph.removeprefix("onnx/").removesuffix(".onnx")
    relative = f"engines/{entry.id}/{stem}.b{high}.plan"
    path = bundle.path / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = {
        info.name: ShapeBounds(min=info.shape_at(low), opt=info.shape_at(best), max=info.shape_at(high))
        for info in border[0]
    }
    description = replace(
        HEADER,
        library="tensorrt",
        library_version=str(entry.fingerprint["version"]),
        target=entry.target,
        architecture="cuda",
        build_fingerprint=entry.fingerprint,
        graph=graph,
        graph_digest=bundle.graph_digest(graph),
        profile=PlanProfile(min=low, opt=best, max=high, shapes=shapes),
        inputs=inputs,
        outputs=outputs,
    )
    plan = plan_bytes(graph, str(entry.fingerprint["compute_capability"]))
    write_plan(path, replace(description, **changes), plan)
    list_file(bundle, relative, path.read_bytes(), "engine")
    return EngineEntry(graph=graph, graph_digest=bundle.graph_digest(graph), path=relative, profile=profile)


def plan_tensor(info: TensorInfo) -> PlanTensor:
    dtype: Any = info.dtype
    return PlanTensor(name=info.name, dtype=dtype, shape=info.shape)
