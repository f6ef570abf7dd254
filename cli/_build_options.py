"""Options of building engines, which `export` and `build` share, and how builds are shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsc_split.cli._options import positive_integers, size_bytes

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle
    from dsc_split.engines import BuildOptions, BuildResult

__all__ = [
    "Batches",
    "DeviceMemory",
    "EnginePerBatch",
    "Gemm",
    "MemoryPerBatch",
    "OptBatch",
    "TimingCache",
    "TimingCacheDigest",
    "Workspace",
    "make_build_options",
    "print_builds",
]

Batches = Annotated[
    Any,
    typer.Option(
        parser=positive_integers,
        metavar="N,...",
        help="Batch sizes that the engines will run at. Default: 1,2,4 ... 64, as far as the model takes them.",
    ),
]
OptBatch = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Batch size to be fastest at. Default: the middle one.")
]
EnginePerBatch = Annotated[bool, typer.Option("--engine-per-batch", help="Build one engine for each batch size.")]
Gemm = Annotated[
    str,
    typer.Option(
        metavar="conv|sum|fp16",
        help="Float32 matrix products where the GPU has none (SM75): `conv` makes each an equal 1x1 convolution, or "
        "fails; `sum`, the default, makes the others an equal product and sum, `fp16` computes them in float16.",
    ),
]
Workspace = Annotated[
    Any, typer.Option(parser=size_bytes, metavar="SIZE", help="Scratch memory that one layer may take, such as 2GiB.")
]
DeviceMemory = Annotated[
    Any,
    typer.Option(
        parser=size_bytes,
        metavar="SIZE",
        help="Memory of the GPU, such as 4GiB: engines that need more are built for smaller batches, or fail.",
    ),
]
MemoryPerBatch = Annotated[
    bool,
    typer.Option(
        "--memory-per-batch", help="Also ask for the memory at every batch size: one more build each, thrown away."
    ),
]
TimingCache = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Kernel timings to read and extend (full TensorRT).")
]
TimingCacheDigest = Annotated[
    str | None,
    typer.Option(metavar="HEX", help="SHA-256 that --timing-cache must have; nothing is timed anew, or written."),
]


def make_build_options(bundle: Bundle, batches: Any, **options: Any) -> BuildOptions:
    """Make the options of a build; the batches are those that the bundle can run where none are given.

    Raises:
        UsageError: Options do not fit together, or a batch is more than the model takes.
    """
    from dsc_split.engines import BuildOptions, choose_batches

    return BuildOptions(batches=choose_batches(bundle, batches), **options)


def print_builds(results: list[BuildResult]) -> None:
    """Print a table of all engines to stdout, and notes and failures to stderr."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dsc_split.cli._console import err, out

    rows = [(result, row) for result in results for row in result.rows]
    if rows:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("side", "engine", "batches", "size", "activations", "weights", "built"):
            right = heading in ("size", "activations", "weights", "built")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for result, row in rows:
            memory = row.memory or {}
            table.add_row(
                result.side,
                Text(row.label),
                f"{row.profile[0]} to {row.profile[2]}" if row.profile else "",
                _megabytes(row.size_bytes),
                _megabytes(memory["activation_bytes"][str(row.profile[2])] if memory and row.profile else None),
                _megabytes(memory.get("weights_bytes")),
                "failed" if row.reason else "cached" if row.cached else f"{row.build_s:.1f} s",
            )
        out.print(table)
    for result in results:
        ready = len(result.rows) - len(result.failed)
        err.print(f"{result.side}: {result.target} ({result.id}), {ready} of {len(result.rows)} ready")
        for row in result.rows:
            if row.lowered and row.profile:
                words = f"built for batches up to {row.profile[2]} alone: {row.lowered}"
                err.print(f"warning: {result.side}: {row.label}: {words}.", style="yellow")
            for note in row.notes:
                err.print(f"note: {result.side}: {row.label}: {note}.")
            if row.reason:
                err.print(f"failed: {result.side}: {row.label}: {row.reason}", style="red")


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f} MB"
