"""``dsc-split cuts``: list the places where a model can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._cut_options import (
    InputBytes,
    InputShapes,
    MaxTensors,
    Modules,
    RatioOf,
    Sample,
    Seed,
    Weights,
)

__all__ = ["cuts"]


def cuts(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE|BUNDLE", help="A model, as for export, or a bundle's folder.")
    ],
    input_shape: InputShapes = None,
    sample: Sample = None,
    weights: Weights = None,
    seed: Seed = 0,
    input_bytes: InputBytes = None,
    modules: Modules = None,
    ratio: RatioOf = "bytes",
    max_tensors: MaxTensors = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the places where a model can be cut, in graph order, with the reason for each that is no bottleneck."""
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import out, print_json, progress
    from dsc_split.cli._cuts_table import cuts_table
    from dsc_split.errors import UsageError
    from dsc_split.partitioner import CutOptions, SourceOptions, bundle_cuts, list_cuts

    options = CutOptions.checked(modules=modules, ratio=ratio, max_tensors=max_tensors)
    if Path(source).is_dir():
        given = {"--input-shape": input_shape, "--sample": sample, "--weights": weights}
        for option, value in given.items():
            if value:
                raise UsageError(f"{option} does not go with a bundle: {source!r} has its model's inputs and weights.")
        found = bundle_cuts(Bundle.open(source), options, input_bytes=input_bytes)
    else:
        with progress() as listener:
            found = list_cuts(
                source,
                SourceOptions(
                    input_shapes=tuple(input_shape or ()),
                    sample=sample,
                    weights=weights,
                    seed=seed,
                    calibrate=False,
                ),
                options,
                input_bytes=input_bytes,
                progress=listener,
            )
    if json:
        print_json(found.to_json())
    else:
        for part in cuts_table(found, ratio, width=out.width):
            out.print(part)
