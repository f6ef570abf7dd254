"""``dsc-split pick``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsc_split.cli._options import number


def pick(
    source: Annotated[Path, typer.Argument(metavar="BUNDLE|table.json", help="A bundle, or a table.")],
    batch: Annotated[int, typer.Option(metavar="N", help="Batch size.")],
    rate: Annotated[
        float,
        typer.Option(
            parser=number(at_least=0, infinite=True), metavar="R", help="Uplink data rate in MB/s; 0: no link; inf."
        ),
    ],
    downlink_rate: Annotated[
        float | None,
        typer.Option(
            parser=number(at_least=0, infinite=True),
            metavar="R",
            help="Downlink rate in MB/s; default: the link's, or else the uplink's. It counts only where the table's "
            'link counts the way back ("count_downlink": true in the file of table --link).',
        ),
    ] = None,
    rtt: Annotated[
        float | None,
        typer.Option(parser=number(at_least=0), metavar="MS", help="Round-trip time in ms; default: the table's."),
    ] = None,
    server_load: Annotated[
        float | None,
        typer.Option(
            parser=number(at_least=0),
            metavar="X",
            help="The tail's time now over its time when measured; default: 1.",
        ),
    ] = None,
    queue: Annotated[
        float | None,
        typer.Option(parser=number(at_least=0), metavar="MS", help="Wait in ms before the tail starts; default: 0."),
    ] = None,
    percentile: Annotated[
        int | None,
        typer.Option(
            metavar="50|95",
            help="Compare by the medians of head and tail (50, the default) or by the sum of their 95th percentiles.",
        ),
    ] = None,
    no_full_offload: Annotated[
        bool, typer.Option("--no-full-offload", help="Leave out every choice that sends the inputs as they are.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Name the best choice for a batch size and a data rate.

    The first line is the choice. Then follow the margin to the next one and its uncertainty, the terms of every choice,
    and the data rates at which the answer changes.
    """
    from dsc_split.benchmarks.report._table_text import render_pick
    from dsc_split.bundles._tables import load_table
    from dsc_split.cli._console import err, out, print_json

    table = load_table(source)
    if downlink_rate is not None and not table.link.count_downlink:
        err.print(
            "warning: the table's link does not count the way back; --downlink-rate changes nothing. To count it, "
            'put "count_downlink": true into a JSON file: dsc-split table BUNDLE --link FILE'
        )
    answer = table.pick(
        batch,
        rate,
        downlink_rate_mb_s=downlink_rate,
        rtt_ms=rtt,
        server_load=server_load,
        queue_ms=queue,
        allow=table.without_inputs_sent() if no_full_offload else None,
        percentile=percentile,
    )
    if json:
        print_json(answer.to_json())
    else:
        out.print(render_pick(answer))
