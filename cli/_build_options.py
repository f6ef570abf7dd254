"""Options of building engines, which ``export`` and ``build`` share, and the output of builds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsc_split._support.sizes import size_text
from dsc_split.cli._options import Parsed, positive_integers, size_bytes
from dsc_split.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.table import Table

    from dsc_split.bundle import Bundle
    from dsc_split.engines import BuildOptions, BuildResult, BuildRow

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
    "refuse_build_options",
]

Batches = Annotated[
    Parsed,
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
    int | None,
    typer.Option(parser=size_bytes, metavar="SIZE", help="Scratch memory that one layer may take, such as 2GiB."),
]
DeviceMemory = Annotated[
    int | None,
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


def refuse_build_options(options: Mapping[str, object]) -> None:
    """Refuse options of building if nothing is built.

    Args:
        options: By their names on the command line; ``None`` and false mean that the option is not given.

    Raises:
        UsageError: An option is given.
    """
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise UsageError(f"{', '.join(given)}: no engines are built without --device or --server TARGET.")


def make_build_options(bundle: Bundle, batches: Sequence[int] | None, **options: Any) -> BuildOptions:
    """Make the options of a build; without ``batches``, for those that the bundle can run.

    Raises:
        UsageError: Options do not fit together, or a batch is more than the model takes.
    """
    from dsc_split.engines import BuildOptions, choose_batches

    return BuildOptions(batches=choose_batches(bundle, batches), **options)


def print_builds(results: Sequence[BuildResult], *, tables: bool) -> None:
    """Print all engines to stdout if ``tables`` is true, and warnings, notes and failures to stderr."""
    from dsc_split.cli._console import err, out

    shown = results if tables else ()
    compiled = [(result, row) for result in shown for row in result.rows if row.profile is not None]
    for result in shown:
        for row in result.rows:
            if row.profile is None and not row.reason:
                out.print(f"{row.label}: ready in {row.build_s:.2f} s" if row.path is None else row.label)
    if compiled:
        out.print(_engine_table(compiled))
    if any(not row.lowered and row.memory is not None and len(row.memory.activations) > 1 for _, row in compiled):
        out.print(_memory_table(compiled))
    for result in results:
        ready = len(result.rows) - len(result.failed)
        err.print(f"{result.side}: {result.target} ({result.id}), {ready} of {len(result.rows)} ready")
        _print_lowered(result)
        for note, labels in _group_by_text((note, row.label) for row in result.rows for note in row.notes):
            err.print(f"note: {result.side}: {_shorten(labels)}: of the float32 operations that SM75 lacks, {note}.")
        for reason, labels in _group_by_text((row.reason, row.label) for row in result.failed):
            err.print(f"failed: {result.side}: {_shorten(labels)}: {reason}", style="red")


def _engine_table(rows: Sequence[tuple[BuildResult, BuildRow]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dsc_split.bundles._records import BuilderMemory

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("side", "engine", "batches", "size", "activations", "weights", "built"):
        right = heading in ("size", "activations", "weights", "built")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for result, row in rows:
        low, _, high = row.profile or (0, 0, 0)
        memory = row.memory or BuilderMemory()
        sizes = (row.size_bytes, memory.activations.get(high), memory.weights_bytes)
        table.add_row(
            result.side,
            Text(row.label),
            f"{low} to {high}",
            *(size_text(size) if isinstance(size, int) else "" for size in sizes),
            "cached" if row.cached else f"{row.build_s:.1f} s",
        )
    return table


def _memory_table(rows: Sequence[tuple[BuildResult, BuildRow]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = [(result, row, row.memory.activations if row.memory is not None else {}) for result, row in rows]
    batches = sorted({batch for _, _, sizes in found for batch in sizes})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="activations in MB by batch size", title_justify="left")
    table.add_column("side")
    table.add_column("engine", overflow="fold")
    for batch in batches:
        table.add_column(str(batch), justify="right")
    for result, row, sizes in found:
        numbers = (f"{sizes[batch] / 1e6:,.0f}" if batch in sizes else "" for batch in batches)
        table.add_row(result.side, Text(row.label), *numbers)
    return table


def _print_lowered(result: BuildResult) -> None:
    """Print which engines were built for smaller batches than asked for, with a reason for each batch size."""
    from dsc_split.cli._console import err

    lowered = [(row.profile[2], row) for row in result.rows if row.lowered and row.profile]
    for largest in sorted({size for size, _ in lowered}):
        rows = [row for size, row in lowered if size == largest]
        words = f"built for batches up to {largest} alone: {rows[0].lowered}"
        err.print(f"warning: {result.side}: {_shorten([row.label for row in rows])}: {words}.", style="yellow")


def _group_by_text(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Group labels by their text, in the order of the first occurrence."""
    groups: dict[str, list[str]] = {}
    for text, label in pairs:
        groups.setdefault(text, []).append(label)
    return list(groups.items())


def _shorten(labels: Sequence[str]) -> str:
    if len(labels) <= 2:
        return " and ".join(labels)
    return f"{labels[0]} and {len(labels) - 1} more"
