"""``dsc-split unpack``: verify a packed bundle, and unpack it into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._trust import AllowUnsigned, RequireSignature, TrustKeys

__all__ = ["unpack"]


def unpack(
    source: Annotated[Path, typer.Argument(metavar="NAME.dscb", help="The packed bundle.")],
    output: Annotated[
        Path,
        typer.Option("--output", metavar="FOLDER", help="The folder to make; a bundle that is there is replaced."),
    ],
    trust: TrustKeys = None,
    require_signature: RequireSignature = False,
    allow_unsigned: AllowUnsigned = False,
    allow_older: Annotated[
        bool, typer.Option("--allow-older", help="Replace a newer bundle by an older one, too.")
    ] = False,
) -> None:
    """Verify a packed bundle, and unpack it.

    If anything is wrong, nothing is written. Engines are unpacked only when a trusted key signed them, or with
    --allow-unsigned.
    """
    from dsc_split.cli._console import out, progress
    from dsc_split.cli._trust import make_trust
    from dsc_split.packing import unpack_bundle

    asked = make_trust(trust, require_signature=require_signature, allow_unsigned=allow_unsigned)
    with progress() as listener:
        bundle = unpack_bundle(source, output, trust=asked, allow_older=allow_older, progress=listener)
    manifest = bundle.manifest
    what = f"the {manifest.side}'s part" if manifest.side else "whole bundle"
    out.print(f"{output}: {what}, revision {manifest.revision}, {len(manifest.files)} files verified")
