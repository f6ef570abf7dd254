"""``dsc-split table --check``: read a table strictly, and print a summary."""

from __future__ import annotations

from pathlib import Path

from dsc_split.benchmarks.report._phrases import emulation_text, link_text
from dsc_split.bundles._tables import load_table
from dsc_split.cli._console import out, print_json

__all__ = ["check_table"]


def check_table(source: Path, *, as_json: bool) -> None:
    """Read the table of a file or a bundle, and print a summary.

    Raises:
        TableError: It is damaged, contradicts itself, or is of a newer version; the message names the place.
    """
    table = load_table(source)
    rows = [row for item in table.batches for row in item.rows]
    stale = sum(not row.timing_valid for row in rows)
    if as_json:
        document = table.to_json()
        kept = ("format", "version", "pair_id", "precision", "count", "emulated", "device", "server", "link", "choices")
        print_json(
            {
                "ok": True,
                **{key: document[key] for key in kept},
                "batches": [item.batch for item in table.batches],
                "rows": len(rows),
                "rows_with_stale_timing": stale,
            }
        )
        return
    batches = ", ".join(str(item.batch) for item in table.batches)
    out.print(f"{source}: ok")
    out.print(f"{len(rows)} rows: batches {batches}; choices {', '.join(choice.name for choice in table.choices)}")
    out.print(f"pairs     {table.pair_id}, {table.precision}, {table.count} counted")
    out.print(f"device    {table.device.target}, fingerprint {table.device.fingerprint}")
    out.print(f"server    {table.server.target}, fingerprint {table.server.fingerprint}")
    out.print(f"link      {link_text(table)}")
    if table.emulated is not None:
        out.print(f"emulated  {emulation_text(table)}")
    if stale:
        out.print(f"timing    {stale} of {len(rows)} rows hold times of another machine: measure them again")
