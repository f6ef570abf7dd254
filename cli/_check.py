"""``dsc-split check``: run one side's engines against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["check"]


def check(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    side: Annotated[str, typer.Option("--side", metavar="device|server", help="The side to check.")],
    target: Annotated[
        str | None, typer.Option("--target", help="What to run on. Default: the target recorded last.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="FILE",
            help="An .npz of input:NAME and output:NAME arrays, or what --save-tensors wrote on the device. "
            "Default: the golden samples.",
        ),
    ] = None,
    save_tensors: Annotated[
        Path | None,
        typer.Option(
            "--save-tensors",
            metavar="FILE",
            help="Write what this device's heads give, to check a server's tails against.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check the engines of one side against the golden samples, or against a file of your own."""
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import err, out, print_json, progress
    from dsc_split.engines import check_engines
    from dsc_split.errors import BackendError

    with progress() as listener:
        result = check_engines(
            Bundle.open(bundle), side, target, against=against, save_tensors=save_tensors, progress=listener
        )
    if json:
        print_json(result.to_json())
    elif not result.rows:
        err.print(f"{result.side}: no graph of this bundle runs there, so nothing was checked.")
    else:
        for row in result.rows:
            error = "" if row.max_rel_error is None else f" (largest relative error {row.max_rel_error:.2g})"
            out.print(f"{row.label}: {row.reason or 'passed'}{error}")
        tolerance = max(row.tolerance for row in result.rows)
        err.print(f"{result.side}: {result.target} against {result.against}, tolerance {tolerance:g}")
    failed = sum(not row.passed for row in result.rows)
    if failed:
        raise BackendError(f"{failed} of {len(result.rows)} engines did not pass; see above.")
