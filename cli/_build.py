"""``dsc-split build``: build one side's engines for a target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["build"]


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    side: Annotated[str, typer.Option("--side", metavar="device|server", help="The side to build for.")],
    target: Annotated[str, typer.Option("--target", help="What to build for: onnxruntime:cpu,threads=1.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Build the engines of one side for a target, load each once, and record the target in the bundle."""
    import dataclasses

    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import err, out, print_json, progress
    from dsc_split.engines import build_engines
    from dsc_split.errors import BackendError

    with progress() as listener:
        result = build_engines(Bundle.open(bundle), side, target, progress=listener)
    if json:
        print_json(dataclasses.asdict(result))
    else:
        for row in result.rows:
            out.print(f"{row.label}: {row.reason or f'ready in {row.build_s:.2f} s'}")
        err.print(f"{result.side}: {result.target} ({result.id})")
    if result.failed:
        raise BackendError(f"{len(result.failed)} of {len(result.rows)} engines cannot be built; see above.")
