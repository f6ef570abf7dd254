"""``dsc-split verify``: what is wrong with a bundle, file by file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsc_split.cli._trust import AllowUnsigned, RequireSignature, TrustKeys

if TYPE_CHECKING:
    from dsc_split.engines import Fit
    from dsc_split.packing import VerifyResult

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, or a packed bundle.")],
    trust: TrustKeys = None,
    require_signature: RequireSignature = False,
    allow_unsigned: AllowUnsigned = False,
    min_revision: Annotated[
        int | None, typer.Option("--min-revision", min=0, metavar="N", help="An older bundle is a fault.")
    ] = None,
    here: Annotated[
        str | None,
        typer.Option(
            "--here",
            metavar="device|server",
            help="Say also whether this side's engines load on this machine, and whether their times hold here.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Verify every file of a bundle, and who signed it.

    Exit code 6: something is wrong; every fault is printed with its file.
    """
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import progress
    from dsc_split.cli._trust import make_trust
    from dsc_split.engines import fit_here
    from dsc_split.errors import BundleError
    from dsc_split.packing import verify_bundle

    asked = make_trust(trust, require_signature=require_signature, allow_unsigned=allow_unsigned)
    with progress() as listener:
        result = verify_bundle(bundle, trust=asked, min_revision=min_revision, progress=listener)
    fit = fit_here(Bundle.open(bundle, trust=asked), here) if here is not None and result.ok else None
    _print_result(result, fit, as_json=json)
    if not result.ok:
        faults = "1 fault" if len(result.rows) == 1 else f"{len(result.rows)} faults"
        raise BundleError(f"bundle {str(bundle)!r} has {faults}; see above.")


def _print_result(result: VerifyResult, fit: Fit | None, *, as_json: bool) -> None:
    from dsc_split._support.sizes import size_text
    from dsc_split.cli._console import err, out, print_json
    from dsc_split.cli._fit import print_fit

    for note in result.notes:
        err.print(f"note: {note}.")
    if as_json:
        print_json({**result.to_json(), "here": None if fit is None else fit.to_json()})
        return
    for row in result.rows:
        out.print(f"{row.path}: {row.fault}")
    if result.ok:
        what = f"the {result.side}'s part" if result.side else "whole bundle"
        state = "sealed" if result.sealed else "open"
        signed = f"signed by {', '.join(result.signed_by)}" if result.signed_by else "by whom is not known"
        signed = signed if result.signed_by or result.is_signed else "not signed"
        out.print(
            f"{result.path}: {what}, {state}, revision {result.revision}, {result.files} files, "
            f"{size_text(result.size_bytes)}, all as the manifest says; {signed}"
        )
    if fit is not None:
        print_fit(fit)
