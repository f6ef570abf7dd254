"""The memory of engines, and the loss within a memory budget, for the terminal (Rich)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from dsc_split._support.sizes import size_text
from dsc_split.benchmarks.memory._reports import BUILDER, ESTIMATED
from dsc_split.benchmarks.report._phrases import number_text, percent_text
from dsc_split.benchmarks.report._table_text import columns
from dsc_split.engines import Target
from dsc_split.table._types import NO_OFFLOAD

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsc_split.benchmarks.memory._budget import Loss
    from dsc_split.benchmarks.memory._reports import EngineMemory, MemoryReport, SetMemory

__all__ = ["render_loss", "render_memory"]


def render_memory(report: MemoryReport) -> RenderableType:
    """Show the memory of each engine alone, and of sets of engines together."""
    on_gpu = any(engine.gpu_bytes is not None for engine in report.engines)
    heads = ("choice", "batch", *(["GPU MB"] if on_gpu else []), "MB", "load ms", "first run ms", "source")
    lines = [[Text(head, style="bold") for head in heads]]
    for engine in report.engines:
        numbers = [engine.load_ms, engine.first_run_ms]
        fields = [
            engine.choice,
            str(engine.batch),
            *_size_texts(engine, on_gpu),
            *("-" if number is None else number_text(number) for number in numbers),
            engine.reason or engine.source,
        ]
        lines.append([Text(field) for field in fields])
    everything = [engine.choice for engine in report.engines if engine.memory_bytes is not None]
    sets = {frozenset(everything): report.hold(everything)}
    sets |= {frozenset(item.choices): item for item in report.sets}
    together = [
        [
            Text(f"all {len(item.choices)}" if len(item.choices) == len(everything) else ", ".join(item.choices)),
            *map(Text, _size_texts(item, on_gpu)),
            Text(item.source),
        ]
        for item in sets.values()
    ]
    set_heads = ("together", *(["GPU MB"] if on_gpu else []), "MB", "source")
    return Group(
        Text(f"{report.side}  {report.target}" + (f" [{report.fingerprint[:12]}]" if report.fingerprint else "")),
        Text(),
        *columns(lines, right=range(1, len(heads) - 1)),
        Text(),
        *columns([[Text(head, style="bold") for head in set_heads], *together], right=range(1, len(set_heads) - 1)),
        Text(),
        Text(_remark(report)),
    )


def _size_texts(item: EngineMemory | SetMemory, on_gpu: bool) -> list[str]:
    sizes = [*([item.gpu_bytes] if on_gpu else []), item.resident_bytes]
    return ["-" if size is None else f"{size / 1e6:,.1f}" for size in sizes]


def _remark(report: MemoryReport) -> str:
    if report.fingerprint is None:
        return (
            "Nothing runs here: these are the builder's numbers, weights and activations of each engine, without what "
            "the library takes itself."
        )
    slowdown = Target.parse(report.target).slowdown
    emulated = f" Times are multiplied by {slowdown:g} (emulated)." if slowdown > 1 else ""
    return (
        f"Each alone in a process, after one run; {size_text(report.shared_bytes)} of that are shared: one process "
        f"holds them once.{emulated}"
    )


def render_loss(loss: Loss) -> RenderableType:
    """Show what is kept within a budget, what is left out, and the loss."""
    lines = [_budget_line(loss, side) for side in loss.budget_bytes]
    if not loss.left_out:
        return Group(*map(Text, [*lines, "Every choice fits, and is kept."]))
    lines += [f"Kept: {', '.join(loss.kept)}", f"Left out: {', '.join(loss.left_out)}"]
    if loss.unanswered_batches:
        sizes = ", ".join(map(str, loss.unanswered_batches))
        lines.append(f"No longer in the table, since no choice that is kept has times there: batch {sizes}")
    else:
        lines.append(
            f"Lost: {percent_text(loss.mean_share)} in the mean over all batch sizes and data rates, at worst "
            f"{percent_text(loss.worst_share)} (batch {loss.worst_batch} at {number_text(loss.worst_rate_mb_s)} MB/s)"
        )
    lines.append(
        "No other set that fits loses less." if loss.exact else "Found step by step: another set may lose less."
    )
    for side, item in loss.memory.items():
        if item.source == ESTIMATED:
            names = ",".join(item.choices)
            lines.append(f"Measure what they take together: dsc-split memory BUNDLE --side {side} --choices {names}")
    parts = [Text(line) for line in lines]
    if NO_OFFLOAD in loss.left_out:
        warning = f"{NO_OFFLOAD!r} does not fit: while the link is dead, nothing runs."
        parts.append(Text(warning, style="yellow"))
    return Group(*parts)


def _budget_line(loss: Loss, side: str) -> str:
    budget = size_text(loss.budget_bytes[side])
    item = loss.memory.get(side)
    if item is None:
        return f"Memory of the {side}: nothing is kept there; the budget is {budget}"
    how = {ESTIMATED: " (estimated)", BUILDER: " (the builder's numbers)"}.get(item.source, "")
    return f"Memory of the {side}: {size_text(item.memory_bytes or 0)} of {budget}{how}"
