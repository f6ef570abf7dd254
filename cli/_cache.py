"""``dsc-split cache``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsc_split._support.sizes import size_text

if TYPE_CHECKING:
    from dsc_split.engines._cache import CacheEntry, EngineCache

__all__ = ["cache"]


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every engine from it.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Show the built engines kept for later, or remove them.

    The folder is $DSC_SPLIT_CACHE if that is set. When all engines together are larger than $DSC_SPLIT_CACHE_LIMIT
    (20GiB, say; by default 10GiB), those that were not used for the longest time are removed.
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
        err.print(f"{found.folder}: {size_text(freed_bytes)} freed")
    else:
        _print_cache(found)


def _print_cache(found: EngineCache) -> None:
    """Print one line for each model, target and library; ``--json`` has every engine."""
    from datetime import datetime

    from rich import box
    from rich.table import Table
    from rich.text import Text

    from dsc_split.cli._console import err, out

    entries = found.entries()
    groups: dict[tuple[str, str, str], list[CacheEntry]] = {}
    for entry in entries:
        groups.setdefault((entry.model, entry.target, entry.library_version), []).append(entry)
    if groups:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("model", "target", "library", "count", "size", "last used"):
            right = heading in ("count", "size")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for (model, target, library), members in groups.items():
            used = datetime.fromtimestamp(max(entry.used_s for entry in members)).date()
            size = size_text(sum(entry.size_bytes for entry in members))
            table.add_row(Text(model), Text(target), Text(library), str(len(members)), size, str(used))
        out.print(table)
    total, limit = (size_text(size) for size in (sum(entry.size_bytes for entry in entries), found.limit_bytes))
    err.print(f"{found.folder}: {len(entries)} engines, {total} of at most {limit}")
