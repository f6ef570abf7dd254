"""``dsc-split memory``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["memory"]


def memory(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    side: Annotated[str, typer.Option(metavar="device|server", help="The side whose engines are measured.")] = "device",
    target: Annotated[
        str | None, typer.Option(metavar="TARGET", help="What to run on. Default: the target recorded last.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Batch size of the run. Default: the largest one of the table."),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(metavar="CHOICE,...", help="Measure the engines of these choices together, too."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure what engines take that are kept loaded.

    Each engine is loaded and run alone in a new process, then all of them in one. If nothing can run here, the numbers
    are those of the engines' builder. They are written into the bundle, for dsc-split table --memory-budget.
    """
    from dsc_split.benchmarks.memory._measure import measure_memory
    from dsc_split.benchmarks.report._memory_text import render_memory
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import out, print_json, progress

    with progress() as listener:
        report = measure_memory(
            Bundle.open(bundle),
            side,
            target=target,
            batch=batch,
            sets=[] if choices is None else [[name.strip() for name in choices.split(",")]],
            progress=listener,
        )
    if json:
        print_json(report.to_json())
    else:
        out.print(render_memory(report))
