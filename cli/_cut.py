"""``dsc-split cut``: cut a bundle's model anew."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._cut_options import Cuts, MaxTensors, Modules, RatioOf

__all__ = ["cut"]


def cut(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    cuts: Cuts = None,
    modules: Modules = None,
    ratio: RatioOf = "bytes",
    max_tensors: MaxTensors = 1,
    no_proof: Annotated[
        bool,
        typer.Option("--no-proof", help="Do not run the pairs against the whole model; no golden samples."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Cut a bundle's model anew, into other pairs. Pairs that are no longer asked for go; cells stay."""
    from dsc_split.bundle import Bundle
    from dsc_split.cli._bundle_summary import print_bundle
    from dsc_split.cli._console import progress
    from dsc_split.partitioner import CutOptions, cut_bundle

    options = CutOptions.checked(cuts=cuts, modules=modules, ratio=ratio, max_tensors=max_tensors, prove=not no_proof)
    with progress() as listener:
        done = cut_bundle(Bundle.open(bundle), options, progress=listener)
    print_bundle(done, as_json=json)
