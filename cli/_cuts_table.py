"""The table of a model's cuts for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dsc_split.partitioner import Cut, CutList, CutTensor

__all__ = ["cuts_table"]

WIDTH_FOR_REASONS = 120
"""A narrower terminal shows no reasons, so that names and sizes fit on one line."""


def cuts_table(found: CutList, ratio: str, *, width: int) -> Iterator[RenderableType]:
    """Yield a heading, the table, and a summary."""
    yield Text(
        f"{found.model}: input {found.input_bytes:,} bytes, {found.input_elements:,} elements per sample; "
        f"ratios in {ratio}"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["cut", "ratio", ratio, "tensor", "kind"]
    if width >= WIDTH_FOR_REASONS:
        headings.append("why not")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("ratio", ratio) else "left", overflow="fold")
    for cut in found.cuts:
        kind, style = _kind_and_style(cut)
        size = cut.size_bytes if ratio == "bytes" else cut.elements
        cells = (
            Text(cut.name),
            "" if cut.refused else f"{cut.ratio:.4f}",
            "" if cut.refused else f"{size:,}",
            Text("; ".join(_tensor_text(tensor) for tensor in cut.tensors)),
            kind,
            Text(cut.reason),
        )
        table.add_row(*cells[: len(headings)], style=style)
    yield table
    counts = {kind: sum(getattr(cut, kind) for cut in found.cuts) for kind in ("natural", "compressive", "frontier")}
    refused = sum(cut.refused for cut in found.cuts)
    yield Text(
        f"{len(found.cuts)} cuts: {counts['natural']} natural, {counts['compressive']} compressive, "
        f"{counts['frontier']} frontier, {refused} refused"
    )
    if width < WIDTH_FOR_REASONS:
        yield Text(f"why each is no bottleneck: in a terminal of {WIDTH_FOR_REASONS} columns, or with --json")


def _kind_and_style(cut: Cut) -> tuple[str, str]:
    if cut.refused:
        return "refused", "red"
    if cut.compressive:
        return "compressive", "bold green"
    if cut.frontier:
        return "frontier", "cyan"
    return ("natural", "") if cut.natural else ("", "dim")


def _tensor_text(tensor: CutTensor) -> str:
    if tensor.info is None:
        return "?"
    return f"{tensor.info.dtype}[{','.join(map(str, tensor.info.shape))}]"
