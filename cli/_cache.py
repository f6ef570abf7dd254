"""``dsc-split cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsc_split.engines._cache import EngineCache

__all__ = ["cache"]

MEGABYTE = 10**6


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every engine from it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the built engines that are kept for later, or remove them.

    The folder is $DSC_SPLIT_CACHE where that is set. What was used least recently goes once they are larger than
    $DSC_SPLIT_CACHE_LIMIT together, such as 20GiB; 10GiB where that is not set.
    """
    from dsc_split.cli._console import err, print_json
    from dsc_split.engines._cache import EngineCache

    found = EngineCache()
    freed_bytes = found.clear() if clear else 0
    if json:
        entries = found.entries()
        print_json(
            {
                "folder": str(found.folder),
                "limit_bytes": found.limit_bytes,
                "size_bytes": sum(entry.size_bytes for entry in entries),
                "freed_bytes": freed_bytes,
                "entries": [entry.to_json() for entry in entries],
            }
        )
    elif clear:
        err.print(f"{found.folder}: {_megabytes(freed_bytes)} freed")
    else:
        _show(found)


def _show(found: EngineCache) -> None:
    from datetime import datetime

    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dsc_split.cli._console import err, out

    entries = found.entries()
    if entries:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("engine", "target", "library", "size", "last used"):
            table.add_column(heading, justify="right" if heading == "size" else "left", overflow="fold")
        for entry in entries:
            used = datetime.fromtimestamp(entry.used_s).astimezone().isoformat(" ", "minutes")
            size = _megabytes(entry.size_bytes)
            table.add_row(Text(entry.label), Text(entry.target), Text(entry.library_version), size, used)
        out.print(table)
    total, limit = (_megabytes(size) for size in (sum(entry.size_bytes for entry in entries), found.limit_bytes))
    err.print(f"{found.folder}: {len(entries)} engines, {total} of at most {limit}")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / MEGABYTE:,.1f} MB"
