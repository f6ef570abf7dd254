"""``dsc-split check``: run one side's engines against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._trust import AllowUnsigned, RequireSignature, TrustKeys, make_trust

__all__ = ["check"]


def check(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle: a folder, or a packed file.")],
    side: Annotated[str, typer.Option("--side", metavar="device|server", help="The side to check.")],
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", help="What to run on. Default: the target recorded last."),
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
    fallback: Annotated[
        bool,
        typer.Option("--fallback", help="Run the graphs on ONNX Runtime where the engines cannot be used here."),
    ] = False,
    trust: TrustKeys = None,
    require_signature: RequireSignature = False,
    allow_unsigned: AllowUnsigned = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check the engines of one side against the golden samples, or against a file of your own.

    Then print whether the engines, and the times in the bundle's table, are for this machine.
    """
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import err, out, print_json, progress
    from dsc_split.cli._fit import print_fit
    from dsc_split.engines import check_engines, fit_here
    from dsc_split.errors import BackendError

    keys = make_trust(trust, require_signature=require_signature, allow_unsigned=allow_unsigned)
    opened = Bundle.open(bundle, trust=keys)
    with progress() as listener:
        result = check_engines(
            opened, side, target, against=against, save_tensors=save_tensors, fallback=fallback, progress=listener
        )
    fit = fit_here(opened, side, target)
    if json:
        print_json({**result.to_json(), "fit": fit.to_json()})
    elif not result.rows:
        err.print(f"{result.side}: no graph of this bundle runs there, so nothing was checked.")
    else:
        for row in result.rows:
            error = "" if row.max_rel_error is None else f" (largest relative error {row.max_rel_error:.2g})"
            out.print(f"{row.label}: {row.reason or 'passed'}{error}")
        tolerance = max(row.tolerance for row in result.rows)
        err.print(f"{result.side}: {result.target} against {result.against}, tolerance {tolerance:g}")
        print_fit(fit)
    failed = sum(not row.passed for row in result.rows)
    if failed:
        raise BackendError(f"{failed} of {len(result.rows)} engines did not pass; see above.")
