"""Engine files of full TensorRT, as bundles have them; what the library built is pretended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.support.engine_header import HEADER

from dsc_split.bundle import Bundle, TensorInfo
from dsc_split.engines import target_id
from dsc_split.engines._engine_file import write_plan

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
    with bundle.lock():
        for capability, version in versions.items():
            fingerprint = {
                "architecture": "cuda",
                "library": "tensorrt",
                "version": version,
                "gpu": gpu,
                "compute_capability": capability,
            }
            entry: dict[str, Any] = {
                "target": "tensorrt:cuda",
                "fingerprint": fingerprint,
                "id": target_id(fingerprint),
                "engines": [],
                "failed": [{"graph": graph, "reason": "no kernel"} for graph in without],
            }
            for graph, inputs, outputs in server_graphs(bundle):
                for each in profiles if graph not in without else []:
                    record_one(bundle, entry, graph, (inputs, outputs), each, header)
            bundle.manifest["targets"]["server"].append(entry)
        bundle.save()
    return Bundle.open(bundle.path)


def server_graphs(bundle: Bundle) -> list[tuple[str, tuple[TensorInfo, ...], tuple[TensorInfo, ...]]]:
    tails = [
        (split.tail, split.tensors, tuple(info for info in bundle.outputs if info.name not in split.early_outputs))
        for split in bundle.splits
    ]
    return [(bundle.manifest["model"]["path"], bundle.inputs, bundle.outputs), *tails]


def record_one(
    bundle: Bundle,
    entry: dict[str, Any],
    graph: str,
    border: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]],
    profile: tuple[int, int, int],
    changes: Mapping[str, Any],
) -> None:
    fingerprint = entry["fingerprint"]
    inputs, outputs = border
    bounds = dict(zip(("min", "opt", "max"), profile, strict=True))
    stem = graph.removeprefix("onnx/").removesuffix(".onnx")
    relative = f"engines/{entry['id']}/{stem}.b{profile[2]}.plan"
    path = bundle.path / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {
        **HEADER,
        "library": "tensorrt",
        "library_version": fingerprint["version"],
        "target": entry["target"],
        "architecture": "cuda",
        "build_fingerprint": fingerprint,
        "graph": graph,
        "graph_digest": bundle.graph_digest(graph),
        "profile": {
            **bounds,
            "shapes": {
                info.name: {bound: list(info.shape_at(batch)) for bound, batch in bounds.items()} for info in inputs
            },
        },
        "inputs": [{"name": info.name, "dtype": info.dtype, "shape": list(info.shape)} for info in inputs],
        "outputs": [{"name": info.name, "dtype": info.dtype, "shape": list(info.shape)} for info in outputs],
        **changes,
    }
    sha256, size_bytes = write_plan(path, header, plan_bytes(graph, fingerprint["compute_capability"]))
    bundle.manifest["files"][relative] = {"sha256": sha256, "size": size_bytes, "role": "engine"}
    entry["engines"].append(
        {
            "graph": graph,
            "graph_digest": bundle.graph_digest(graph),
            "path": relative,
            "profile": list(profile),
            "memory": {},
            "rewritten": None,
            "lowered": None,
        }
    )
