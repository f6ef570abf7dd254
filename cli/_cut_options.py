"""Options of the commands with a SOURCE, and options of cutting; several commands share them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Cuts",
    "InputBytes",
    "InputShapes",
    "MaxBatch",
    "MaxTensors",
    "Modules",
    "RatioOf",
    "Sample",
    "Seed",
    "Weights",
    "channel_values",
]

InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="[NAME=]N,...",
        help="Shape of an input per sample, 3,224,224. The batch goes in front unless the word `batch` stands "
        "for it: x=16,batch,8. Once for each input.",
    ),
]
Sample = Annotated[
    Path | None,
    typer.Option(metavar="FILE.npz", help="Real inputs by name, for the proof, golden samples and timings."),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|pretrained|random",
        help="A .safetensors or .pth file (loaded with weights only), or `pretrained` to fetch the library's. "
        "By default the library's where they are on this machine, else a seeded initialisation.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the initialisation and of made-up inputs.")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Largest batch size the graph is proven to take.")]
InputBytes = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Bytes that full offload really sends per sample (a JPEG, say)."),
]
Cuts = Annotated[
    str | None,
    typer.Option(
        metavar="SET|NAME,...",
        help="compressive, natural, frontier, all, or names of cuts, modules or tensors. By default compressive; "
        "frontier where full offload is excluded or --input-bytes is given.",
    ),
]
Modules = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERN",
        help="Only outputs of modules whose path matches, such as 'blocks.*.*'; * does not cross a dot.",
    ),
]
RatioOf = Annotated[str, typer.Option("--ratio", metavar="bytes|elements", help="What sizes are compared in.")]
MaxTensors = Annotated[int, typer.Option(min=1, help="Tensors that may cross a cut at once.")]


def channel_values(text: str) -> tuple[float, ...]:
    """Parse ``0.485,0.456,0.406``: one finite number per channel, in the channels' order.

    Raises:
        typer.BadParameter: The text is not such a list.
    """
    try:
        values = tuple(float(item) for item in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(map(math.isfinite, values)):
        raise typer.BadParameter(f"{text!r} is no list of numbers, one per channel, such as 0.485,0.456,0.406.")
    return values
