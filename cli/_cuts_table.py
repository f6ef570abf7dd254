"""The cuts of a model as a table for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsc_split.partitioner import Cut, CutList

__all__ = ["cuts_table"]


def cuts_table(found: CutList, ratio: str) -> Iterator[RenderableType]:
    """Yield a heading, the table, and a line that sums it up."""
    yield Text(
        f"{found.model}: input {found.input_bytes:,} bytes, {found.input_elements:,} elements per sample; "
        f"ratios in {ratio}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("cut", "ratio", ratio, "shape", "type", "kind", "why not"):
        right = heading in ("ratio", ratio)
        table.add_column(
            heading,
            justify="right" if right else "left",
            no_wrap=heading not in ("why not", "cut"),
            overflow="fold",
        )
    for cut in found.cuts:
        kind, style = _kind(cut)
        table.add_row(
            Text(cut.name),
            "" if cut.refused else f"{cut.ratio:.4f}",
            "" if cut.refused else f"{cut.size_bytes if ratio == 'bytes' else cut.elements:,}",
            Text("; ".join(_shape(tensor.info.shape) if tensor.info else "?" for tensor in cut.tensors)),
            "; ".join(tensor.info.dtype if tensor.info else "?" for tensor in cut.tensors),
            kind,
            Text(cut.reason),
            style=style,
        )
    yield table
    counts = {kind: sum(getattr(cut, kind) for cut in found.cuts) for kind in ("natural", "compressive", "frontier")}
    refused = sum(cut.refused for cut in found.cuts)
    yield Text(
        f"{len(found.cuts)} cuts: {counts['natural']} natural, {counts['compressive']} compressive, "
        f"{counts['frontier']} frontier, {refused} refused"
    )


def _kind(cut: Cut) -> tuple[str, str]:
    if cut.refused:
        return "refused", "red"
    if cut.compressive:
        return "compressive", "bold green"
    if cut.frontier:
        return "frontier", "cyan"
    return ("natural", "") if cut.natural else ("", "dim")


def _shape(dims: tuple[int | str, ...]) -> str:
    return "[" + ",".join(map(str, dims)) + "]"
