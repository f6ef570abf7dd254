"""``dsc-split pack``: a bundle, or one side of it, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._trust import AllowUnsigned, RequireSignature, SignKeys, TrustKeys, make_trust

__all__ = ["pack"]


def pack(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, or a packed bundle.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="NAME.dscb", help="The file to write. Default: beside the bundle, BUNDLE[.SIDE].dscb."
        ),
    ] = None,
    side: Annotated[
        str | None,
        typer.Option("--side", metavar="device|server", help="Hold what this side needs, and no more. Default: all."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="TARGET", help="Hold this device's engines and table alone, by target or id."),
    ] = None,
    server: Annotated[str | None, typer.Option("--server", metavar="TARGET", help="The same for the server.")] = None,
    with_onnx: Annotated[
        bool, typer.Option("--with-onnx", help="Hold the graphs, too, for --fallback, where there are engines.")
    ] = False,
    with_cells: Annotated[
        bool | None,
        typer.Option(
            "--with-cells/--without-cells",
            show_default=False,
            help="Hold the measurements. Default: yes, unless --side is given.",
        ),
    ] = None,
    revision: Annotated[
        int | None,
        typer.Option(
            "--revision", min=0, metavar="N", help="Number that tells new from old. Default: time of the newest change."
        ),
    ] = None,
    sign: SignKeys = None,
    trust: TrustKeys = None,
    require_signature: RequireSignature = False,
    allow_unsigned: AllowUnsigned = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Pack a bundle, or one side of it, into one file.

    The same bundle gives the same file, byte for byte. Signatures are kept if nothing has changed. Engines of a packed
    bundle are signed again only if it is trusted.
    """
    from dsc_split._support.sizes import size_text
    from dsc_split.bundle import Bundle
    from dsc_split.bundles._storage import SUFFIX
    from dsc_split.cli._console import err, out, print_json, progress
    from dsc_split.packing import pack_bundle

    opened = Bundle.open(
        bundle, trust=make_trust(trust, require_signature=require_signature, allow_unsigned=allow_unsigned)
    )
    if output is None:
        place = bundle.resolve()
        name = place.stem if opened.is_packed else place.name
        output = place.with_name(f"{name}{f'.{side}' if side else ''}{SUFFIX}")
    with progress() as listener:
        result = pack_bundle(
            opened,
            output,
            side=side,
            device=device,
            server=server,
            with_onnx=with_onnx,
            with_cells=with_cells,
            revision=revision,
            sign=sign or (),
            progress=listener,
        )
    for note in result.notes:
        err.print(f"note: {note}.")
    if json:
        print_json(result.to_json())
        return
    what = f"the {result.side}'s part" if result.side else "whole bundle"
    signed = f"{result.signatures} signatures" if result.signatures else "not signed"
    out.print(f"{result.path}: {what}, revision {result.revision}, {size_text(result.size_bytes)} on disk, {signed}")
    for item in result.roles:
        out.print(f"  {item.role}: {item.files} files, {size_text(item.size_bytes)}")
    if result.left_out_bytes:
        out.print(f"  left out: {size_text(result.left_out_bytes)}")
