"""A short summary of a bundle, printed by the commands that make or change one."""

from __future__ import annotations

from msgspec import UNSET
from rich import box
from rich.table import Table
from rich.text import Text

from dsc_split._support.records import to_document
from dsc_split.bundle import Bundle
from dsc_split.cli._console import err, out, print_json

__all__ = ["print_bundle"]


def print_bundle(bundle: Bundle, *, as_json: bool) -> None:
    """Print a bundle's pairs with their errors to stdout, and its warnings to stderr."""
    manifest = bundle.manifest
    for note in () if manifest.notes is UNSET else manifest.notes:
        err.print(f"note: {note}.")
    for failed in manifest.failed_splits:
        err.print(f"warning: pair {failed.name!r} is left out: {failed.reason}.")
    if not bundle.splits:
        err.print(
            "warning: no cut is useful here, so there is full and no offload alone to choose from. "
            f"See why: dsc-split cuts {bundle.path}"
        )
    if as_json:
        print_json(to_document(manifest))
        return
    pairs = "1 pair" if len(bundle.splits) == 1 else f"{len(bundle.splits)} pairs"
    batch = f"batch {bundle.fixed_batch} only" if bundle.fixed_batch else f"batches 1 to {bundle.max_batch}"
    out.print(f"{bundle.path}: {manifest.model.title}, {manifest.precision}, {batch}, {pairs}")
    out.print(f"weights: {manifest.model.weights.origin or 'not said'}")
    conversion = manifest.conversion
    if conversion is not UNSET:
        error = conversion.max_rel_error
        off = "not compared with float32" if error is None else f"off by {error:.1e} of the largest output in float32"
        vanished = conversion.weights_vanished
        gone = f", {vanished:,} of {conversion.weights_converted:,} weights became 0" if vanished else ""
        out.print(f"float16: {off}{gone}")
    if not bundle.splits:
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("pair", "ratio", "bytes at batch 1", "largest error", "early outputs"):
        table.add_column(
            heading,
            justify="right" if heading in ("ratio", "bytes at batch 1", "largest error") else "left",
            overflow="fold",
        )
    for split in bundle.splits:
        error = split.max_rel_error
        table.add_row(
            Text(split.name),
            "" if split.ratio is None else f"{split.ratio:.4f}",
            f"{split.size_bytes(bundle.fixed_batch or 1):,}",
            "not proven" if error is None else f"{error:.1e}" if error else "0",
            Text(", ".join(split.early_outputs)),
        )
    out.print(table)
