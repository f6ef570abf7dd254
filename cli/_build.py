"""``dsc-split build``: build one side's engines for a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split._support.files import make_folder
from dsc_split.cli._build_options import (
    Batches,
    DeviceMemory,
    EnginePerBatch,
    Gemm,
    MemoryPerBatch,
    OptBatch,
    TimingCache,
    TimingCacheDigest,
    Workspace,
)

__all__ = ["build"]


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    side: Annotated[str, typer.Option("--side", metavar="device|server", help="The side to build for.")],
    target: Annotated[str, typer.Option("--target", help="What to build for: tensorrt-rtx:sm86, onnxruntime:cpu.")],
    batches: Batches = None,
    opt_batch: OptBatch = None,
    engine_per_batch: EnginePerBatch = False,
    gemm: Gemm = "sum",
    workspace: Workspace = None,
    device_memory: DeviceMemory = None,
    memory_per_batch: MemoryPerBatch = False,
    timing_cache: TimingCache = None,
    timing_cache_sha256: TimingCacheDigest = None,
    raw: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write the bare plans there, too, for trtexec or tensorrt_rtx."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Build the engines of one side for a target, and record the target in the bundle.

    Engines that were built before, from the same graph with the same library and options, come from the cache.
    """
    from dsc_split._support.records import to_document
    from dsc_split.bundle import Bundle
    from dsc_split.cli._build_options import make_build_options, print_builds
    from dsc_split.cli._console import print_json, progress
    from dsc_split.engines import build_engines, export_raw
    from dsc_split.errors import BackendError, UsageError

    if raw is not None and raw.exists() and not raw.is_dir():
        raise UsageError(f"--raw {str(raw)!r} is a file; the name of a folder was expected.")
    opened = Bundle.open(bundle)
    options = make_build_options(
        opened,
        batches,
        opt_batch=opt_batch,
        per_batch=engine_per_batch,
        gemm=gemm,
        workspace_bytes=workspace,
        device_memory_bytes=device_memory,
        memory_per_batch=memory_per_batch,
        timing_cache=timing_cache,
        timing_cache_sha256=timing_cache_sha256,
    )
    with progress() as listener:
        result = build_engines(opened, side, target, options, progress=listener)
    if raw is not None and not any(row.profile for row in result.rows):
        raise UsageError(f"--raw: nothing is compiled for target {result.target!r}, so there are no plans to write.")
    if raw is not None:
        make_folder(raw)
        for row in result.rows:
            if row.path is not None:
                export_raw(opened.file(row.path), raw / Path(row.path).name)
    print_builds([result], tables=not json)
    if json:
        print_json(to_document(result))
    if result.failed:
        raise BackendError(f"{len(result.failed)} of {len(result.rows)} engines cannot be built; see above.")
