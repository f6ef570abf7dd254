"""``dsc-split bench``: time the engines, and write the table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._options import Parsed, number, positive_integers, size_bytes

__all__ = ["bench"]


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    side: Annotated[
        str | None,
        typer.Option(
            "--side",
            metavar="both|device|server",
            help="Which side to time here. Default: both, of a device's or a server's part that one.",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="TARGET", help="Target of the device. Default: the one recorded last."),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="TARGET", help="Target of the server. Default: the one recorded last."),
    ] = None,
    batches: Annotated[
        Parsed,
        typer.Option(
            "--batches",
            parser=positive_integers,
            metavar="N,...",
            help="Batch sizes. Default: 1,2,4 ... 64, as far as the model takes them.",
        ),
    ] = None,
    precision_goal: Annotated[
        float,
        typer.Option(
            "--precision-goal",
            parser=number(above=0),
            metavar="SHARE",
            help="Stop when the 95 % confidence interval is within this share of the median.",
        ),
    ] = 0.02,
    time_limit: Annotated[
        float,
        typer.Option("--time-limit", parser=number(above=0), metavar="S", help="Seconds per cell at most."),
    ] = 10.0,
    period: Annotated[
        float | None,
        typer.Option(
            "--period", parser=number(above=0), metavar="MS", help="Start a call every so often, as a camera would."
        ),
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(
            "--memory-limit",
            parser=size_bytes,
            metavar="SIZE",
            help="What engines that are timed together may hold, such as 8GiB. Default: 80 % of what is free.",
        ),
    ] = None,
    lock_clocks: Annotated[
        int | None,
        typer.Option(
            "--lock-clocks",
            min=1,
            metavar="MHZ",
            help="Hold the GPU's SM clock meanwhile; it needs the right to, and is unlocked whatever happens.",
        ),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what is measured already.")] = False,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale",
            help="Time just what the table has times of that do not hold here: of another kind of machine, or under "
            "another driver, version or power mode.",
        ),
    ] = False,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Where engines do not fit here, time the ONNX pair on ONNX Runtime.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Time every head and tail at every batch; write the table.

    Precise measurements are reused, and a run that was stopped continues where it was.
    """
    from dsc_split.benchmarks import BenchSettings, bench_bundle, write_tables
    from dsc_split.benchmarks.cells._caveats import describe_marks
    from dsc_split.bundle import Bundle
    from dsc_split.cli._console import err, out, print_json, progress
    from dsc_split.errors import BackendError, UsageError

    opened = Bundle.open(bundle)
    settings = BenchSettings(
        precision_goal=precision_goal,
        time_limit_s=time_limit,
        period_ms=period,
        memory_limit_bytes=memory_limit,
        again=again,
        lock_clocks_mhz=lock_clocks,
    )
    if precision_goal >= 0.5:
        err.print(f"warning: --precision-goal {precision_goal:g} is a share of the median; 5 % is written 0.05.")
    with progress() as listener:
        result = bench_bundle(
            opened,
            sides=None if side is None else ("device", "server") if side == "both" else (side,),
            device=device,
            server=server,
            batches=batches,
            settings=settings,
            stale=stale,
            fallback=fallback,
            progress=listener,
        )
    if stale and not result.measured:
        err.print(f"nothing is stale: the times in the table of {str(bundle)!r} hold here.")
        if json:
            print_json({**result.to_json(), "table": str(opened.path / "table.json")})
        return
    for cell in result.cells:
        if cell.latency_ms is None:
            err.print(f"{cell.status}: {cell.graph} at batch {cell.batch} on {cell.target}: {cell.reason}")
    if result.counts["unstable"]:
        err.print(
            f"warning: {result.counts['unstable']} of {len(result.cells)} cells did not reach "
            f"{precision_goal * 100:g} % in their time; the loosest is at {result.loosest_interval:.1%}. "
            "Run the command again to continue them, on a quiet machine or with a longer --time-limit."
        )
    table = None
    try:
        write_tables(opened, device=result.measured.get("device"), server=result.measured.get("server"))
        table = str(opened.path / "table.json")
    except UsageError as e:
        err.print(f"no table yet: {e}")
        if result.marked:
            err.print(f"warning: {describe_marks(result.marked, len(result.cells))}. See environment in their files.")
    if json:
        print_json({**result.to_json(), "table": table})
    else:
        counts = ", ".join(f"{count} {status}" for status, count in result.counts.items() if count)
        targets = ", ".join(f"{name} {target}" for name, target in result.targets.items())
        out.print(f"{len(result.cells)} cells ({counts}; {result.reused} of them reused): {targets}")
        if table is not None:
            out.print(f"table: {table}. Show it: dsc-split table {opened.path}")
    if not any(cell.latency_ms for cell in result.cells):
        raise BackendError("nothing could be measured; the reasons are above.")
