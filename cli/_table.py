"""``dsc-split table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._options import Parsed, number, positive_numbers, size_bytes

__all__ = ["memory_budget", "table"]


def memory_budget(text: str) -> dict[str, int]:
    """Parse ``500MB`` or ``device=500MB,server=4GB`` into bytes by side; a plain size is for the device.

    Raises:
        typer.BadParameter: The text is not such a list.
    """
    from dsc_split.engines.side._sides import SIDES

    budget_bytes: dict[str, int] = {}
    for item in text.split(","):
        side, equals, size = item.strip().partition("=")
        if not equals:
            side, size = "device", side
        if side not in SIDES or side in budget_bytes:
            wrong = "stands twice" if side in budget_bytes else "is no side"
            raise typer.BadParameter(f"{side!r} in {text!r} {wrong}: device=500MB,server=4GB was expected, or 500MB.")
        if size.strip().isdigit():
            raise typer.BadParameter(f"{size!r} has no unit: a size such as 500MB was expected.")
        budget_bytes[side] = size_bytes(size)
    return budget_bytes


def table(
    source: Annotated[Path, typer.Argument(metavar="BUNDLE|table.json", help="A bundle, or a table.")],
    link: Annotated[
        str | None,
        typer.Option(
            metavar="paper|FILE",
            help="Cost of the network apart from the rate; a JSON object with any of c0_ms, c1_ms_per_mb, rtt_ms, "
            "round_trips, count_downlink, downlink_rate_mb_s, source. Default: that of the table before, else paper.",
        ),
    ] = None,
    count: Annotated[
        str | None,
        typer.Option(
            metavar="bytes|elements",
            help="Elements: one byte each, as in the paper. Default: as in the table before, or else bytes.",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(metavar="TARGET", help="Default: the one timed last.")] = None,
    server: Annotated[str | None, typer.Option(metavar="TARGET", help="Default: the one timed last.")] = None,
    memory: Annotated[
        Parsed,
        typer.Option(
            "--memory-budget",
            parser=memory_budget,
            metavar="[device=]SIZE,[server=SIZE]",
            help="Keep the choices that lose least while all their engines stay loaded, such as 500MB, or "
            "device=500MB,server=4GB. The table is written for these; without this option, for all again.",
        ),
    ] = None,
    rates: Annotated[
        Parsed, typer.Option(parser=positive_numbers, metavar="R,...", help="Data rates to show, in MB/s.")
    ] = "1,2,4,8,16,32,64,128",
    json: Annotated[bool, typer.Option("--json", help="Print the table's JSON document.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read the table, and say that it is right, or where it is wrong.")
    ] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print every choice's terms as CSV.")] = False,
    header: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the table as a C++ header of constants.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="With --header; fleet::b4 is in a namespace. Default: the file's name."),
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw the pictures into this folder.")] = None,
    plot_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Batch size of the pictures of one batch size.")
    ] = None,
    plot_rate: Annotated[
        float | None,
        typer.Option(parser=number(above=0.0), metavar="R", help="Data rate of the terms' picture, in MB/s."),
    ] = None,
) -> None:
    """Write and show the split lookup table.

    For a bundle, the table is made from its measurements, written to table.json and to tables/, and shown. A table.json
    is shown as it is. With --check, an existing table is read and nothing is made.
    """
    from dsc_split._support.files import write_bytes
    from dsc_split.benchmarks.memory._budget import write_table_within
    from dsc_split.benchmarks.report._memory_text import render_loss
    from dsc_split.benchmarks.report._table_pictures import draw_plots
    from dsc_split.benchmarks.report._table_text import render_table, table_csv
    from dsc_split.benchmarks.tables._table import write_table
    from dsc_split.bundle import Bundle
    from dsc_split.bundles._tables import load_table
    from dsc_split.cli._console import err, out, print_json
    from dsc_split.cli._table_check import check_table
    from dsc_split.errors import UsageError
    from dsc_split.table._header import header_name, table_header

    if json and csv:
        raise UsageError("--json and --csv exclude each other: stdout takes one document.")
    if name is not None and header is None:
        raise UsageError("--name names the variable of a C++ header. Give --header FILE with it.")
    if check:
        if csv or any(option is not None for option in (header, plots, device, server, link, count, memory)):
            raise UsageError("--check reads a table that is there and makes nothing; it goes with --json alone.")
        check_table(source, as_json=json)
        return
    loss = None
    if source.is_dir():
        bundle = Bundle.open(source)
        shown = write_table(bundle, device=device, server=server, link=link, count=count)
        if memory is not None:
            shown, loss = write_table_within(bundle, shown, memory)
    elif any(option is not None for option in (device, server, link, count, memory)):
        raise UsageError(
            f"--device, --server, --link, --count and --memory-budget make a table from a bundle's measurements; "
            f"{str(source)!r} is no bundle. Give the bundle."
        )
    else:
        shown = load_table(source)
    if header is not None:
        write_bytes(header, table_header(shown, header_name(header) if name is None else name).encode())
        err.print(f"header: {header}")
    if plots is not None:
        for path in draw_plots(shown, plots, batch=plot_batch, rate_mb_s=plot_rate):
            err.print(f"picture: {path}")
    if json:
        print_json({**shown.to_json(), **({} if loss is None else {"residency": loss.to_json()})})
    elif csv:
        out.file.write(table_csv(shown))
    elif header is None:
        out.print(render_table(shown, rates_mb_s=rates, width=out.width))
    if loss is not None:
        (err if json or csv else out).print(render_loss(loss))
