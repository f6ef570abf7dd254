"""``dsc-split export-triton``: write a model repository for Triton."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsc_split.cli._trust import AllowUnsigned, RequireSignature, TrustKeys

if TYPE_CHECKING:
    from dsc_split.serving import TritonResult

__all__ = ["export_triton"]


def export_triton(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder, or a packed bundle.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The model repository's folder; other models stay.")],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="TARGET",
            help="Serve what was built for this target of the server, by its text or its folder in engines/. "
            "By default the one asked for last.",
        ),
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Serve the ONNX graphs, whatever was built.")] = False,
    expect_trt: Annotated[
        str | None,
        typer.Option(metavar="X.Y.Z.B", help="Refuse plans that another version of TensorRT built."),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(metavar="N", help="Largest batch size; by default what was proven, or built for.")
    ] = None,
    instances: Annotated[int, typer.Option(metavar="N", help="Copies of each model that run at once, per GPU.")] = 1,
    max_queue_delay: Annotated[
        int, typer.Option(metavar="US", help="Microseconds that a request may wait for others to make a batch with.")
    ] = 0,
    no_dynamic_batching: Annotated[
        bool, typer.Option("--no-dynamic-batching", help="Never join requests: the samples of a batch are not alone.")
    ] = False,
    trust: TrustKeys = None,
    require_signature: RequireSignature = False,
    allow_unsigned: AllowUnsigned = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write a model repository for Triton.

    It has one model per tail, and the whole model for full offload. The names contain the pair_id of the export, so a
    repository can hold the models of several exports until all devices use the newest.
    """
    import dataclasses

    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import err, print_json, progress
    from dsc_split.cli._trust import make_trust
    from dsc_split.serving import export_triton as run

    opened = Bundle.open(
        bundle, trust=make_trust(trust, require_signature=require_signature, allow_unsigned=allow_unsigned)
    )
    with progress() as listener:
        result = run(
            opened,
            output,
            target=target,
            backend="onnxruntime" if onnx else None,
            expect_trt=expect_trt,
            max_batch=max_batch,
            instances=instances,
            max_queue_delay_us=None if no_dynamic_batching else max_queue_delay,
            progress=listener,
        )
    for note in result.notes:
        err.print(f"note: {note}.")
    for choice, reason in result.left_out.items():
        err.print(f"warning: {choice!r} is left out, and requests for it will fail: {reason}.")
    if json:
        print_json({**dataclasses.asdict(result), "folder": str(result.folder), "index": str(result.index)})
    else:
        _print_repository(result)


def _print_repository(result: TritonResult) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dsc_split._support.sizes import size_text
    from dsc_split.cli._console import err, out

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("choice", "model", "largest batch", "size"):
        right = heading in ("largest batch", "size")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for model in result.models:
        batch = str(model.max_batch) if model.max_batch else "not stacked"
        table.add_row(Text(model.choice), Text(model.name), batch, size_text(model.size_bytes))
    out.print(table)
    library = " and ".join(f"TensorRT {version}" for version in result.tensorrt_versions) or "ONNX"
    err.print(f"{result.folder}: {len(result.models)} models, {library}; listed in {result.index.name}")
