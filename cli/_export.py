"""``dsc-split export``: a model in, a bundle out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._build_options import (
    Batches,
    DeviceMemory,
    EnginePerBatch,
    Gemm,
    MemoryPerBatch,
    OptBatch,
    Workspace,
)
from dsc_split.cli._cut_options import (
    Cuts,
    InputBytes,
    InputShapes,
    MaxBatch,
    MaxTensors,
    Modules,
    RatioOf,
    Sample,
    Seed,
    Weights,
    channel_values,
)
from dsc_split.cli._options import Parsed

__all__ = ["export"]


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="torchvision:NAME, timm:NAME, FILE.py:FUNCTION, package.module:FUNCTION, MODEL.pt2 or MODEL.onnx.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="BUNDLE", help="Folder to make; a bundle there is replaced."),
    ],
    input_shape: InputShapes = None,
    sample: Sample = None,
    weights: Weights = None,
    seed: Seed = 0,
    max_batch: MaxBatch = 64,
    uint8_input: Annotated[
        bool,
        typer.Option("--uint8-input", help="Take 8-bit images: scaling and normalisation go into the graph."),
    ] = False,
    mean: Annotated[
        Parsed, typer.Option(parser=channel_values, metavar="M,...", help="Mean per channel of inputs in 0..1.")
    ] = None,
    std: Annotated[
        Parsed,
        typer.Option(parser=channel_values, metavar="S,...", help="Standard deviation per channel, likewise."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|fp16",
            help="fp16 converts the whole graph before it is cut; by default a graph stays what it is.",
        ),
    ] = None,
    io_precision: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|fp16", help="With --precision fp16: fp32 keeps inputs and outputs float32, with casts inside."
        ),
    ] = None,
    input_bytes: InputBytes = None,
    no_full_offload: Annotated[
        bool, typer.Option("--no-full-offload", help="Inputs must not be sent to the server.")
    ] = False,
    cuts: Cuts = None,
    modules: Modules = None,
    ratio: RatioOf = "bytes",
    max_tensors: MaxTensors = 1,
    device: Annotated[
        str | None, typer.Option(metavar="TARGET", help="What the device's engines are built for.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(metavar="TARGET", help="What the server's engines are built for.")
    ] = None,
    batches: Batches = None,
    opt_batch: OptBatch = None,
    engine_per_batch: EnginePerBatch = False,
    gemm: Gemm = "sum",
    workspace: Workspace = None,
    device_memory: DeviceMemory = None,
    memory_per_batch: MemoryPerBatch = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as one JSON document.")] = False,
) -> None:
    """Export a model into a bundle: its graph, the head / tail pairs of its best cuts, each proven, and engines."""
    import sys

    from dsc_split.cli._build_options import make_build_options, print_builds, refuse_build_options
    from dsc_split.cli._bundle_summary import print_bundle
    from dsc_split.cli._console import progress
    from dsc_split.engines import DEFAULT_BATCHES, BuildOptions, Target, build_engines, get_backend, opset_limits
    from dsc_split.engines._cache import EngineCache
    from dsc_split.errors import BackendError, UsageError
    from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, export_bundle

    targets = {side: Target.parse(text) for side, text in (("device", device), ("server", server)) if text}
    # Errors in the engines' options, and missing libraries, are reported before the work begins.
    building: dict[str, Parsed] = {
        "opt_batch": opt_batch,
        "per_batch": engine_per_batch,
        "gemm": gemm,
        "workspace_bytes": workspace,
        "memory_per_batch": memory_per_batch,
    }
    if targets:
        if batches and batches[-1] > max_batch:
            raise UsageError(f"--batches {batches[-1]} is more than --max-batch {max_batch}.")
        build_options = BuildOptions(batches=batches or DEFAULT_BATCHES, **building)
        for target in targets.values():
            get_backend(target, build_options).build_fingerprint()
        EngineCache()
    else:
        names = ("--batches", "--opt-batch", "--engine-per-batch", "--workspace", "--device-memory")
        values = (batches, opt_batch, engine_per_batch, workspace, device_memory)
        refuse_build_options(
            {
                **dict(zip(names, values, strict=True)),
                "--gemm": gemm if gemm != "sum" else None,
                "--memory-per-batch": memory_per_batch,
            }
        )
    options = ExportOptions(
        source=SourceOptions(
            input_shapes=tuple(input_shape or ()),
            sample=sample,
            weights=weights,
            max_batch=max_batch,
            seed=seed,
        ),
        cut=CutOptions.checked(cuts=cuts, modules=modules, ratio=ratio, max_tensors=max_tensors),
        uint8_input=uint8_input,
        mean=mean,
        std=std,
        input_bytes=input_bytes,
        full_offload=not no_full_offload,
        precision=precision,
        io_precision=io_precision,
        opset_limits=opset_limits(targets.values()),
        command=tuple(sys.argv[1:]),
    )
    with progress() as listener:
        bundle = export_bundle(source, output, options, progress=listener)
        results = [
            build_engines(
                bundle,
                side,
                target,
                make_build_options(
                    bundle,
                    batches,
                    device_memory_bytes=device_memory if side == "device" else None,
                    **building,
                ),
                progress=listener,
            )
            for side, target in targets.items()
        ]
    print_bundle(bundle, as_json=json)
    worth_showing = [result for result in results if result.failed or any(row.profile for row in result.rows)]
    print_builds(worth_showing, tables=not json)
    failed = [row for result in results for row in result.failed]
    if failed:
        total = sum(len(result.rows) for result in results)
        raise BackendError(f"{len(failed)} of {total} engines cannot be built; see above. The rest is ready.")
