"""``dsc-split merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._trust import AllowUnsigned, RequireSignature, TrustKeys, make_trust

__all__ = ["merge"]


def merge(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder that all goes into.")],
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHER", help="Copies and parts of it: folders, or NAME.dscb.")
    ],
    prefer: Annotated[
        str | None,
        typer.Option(
            metavar="ours|theirs|newer",
            help="Whose cells and engines win where they contradict each other. Default: nobody's; it is an error.",
        ),
    ] = None,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Pass over damaged cells of the others.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")] = False,
    trust: TrustKeys = None,
    require_signature: RequireSignature = False,
    allow_unsigned: AllowUnsigned = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Unite what was built and timed on other machines.

    BUNDLE gets the engines and cells of its copies and parts, and the files that it had left out; its tables are
    written. Everything is compared first. If there are contradictions, all are listed and nothing is written. The order
    of the others does not matter, and a second merge changes nothing.
    """
    from dsc_split.benchmarks import merge_bundles
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import err, out, print_json, progress

    opened = Bundle.open(bundle)
    with progress() as listener:
        result = merge_bundles(
            opened,
            others,
            prefer=prefer,
            trust=make_trust(trust, require_signature=require_signature, allow_unsigned=allow_unsigned),
            skip_damaged=skip_damaged,
            dry_run=dry_run,
            progress=listener,
        )
    for text in result.damaged:
        err.print(f"passed over: {text}")
    for note in result.notes:
        err.print(f"warning: {note}")
    if json:
        print_json(result.to_json())
        return
    for name in result.files:
        out.print(f"file    {name}")
    for name in result.removed:
        out.print(f"removed {name}")
    for side, targets in result.targets.items():
        for target in targets:
            out.print(f"target  {side} {target}")
    done = "would come" if dry_run else "came"
    out.print(
        f"{len(result.files)} files and {result.cells_added} cells {done}; {result.cells_replaced} cells replaced"
        if result.changed
        else "nothing new"
    )
    if result.tables:
        more = f", and {len(result.tables) - 1} more in tables/" if len(result.tables) > 1 else ""
        out.print(f"table: {opened.path / 'table.json'} ({result.tables[0]}{more}). Show it: dsc-split table {bundle}")
