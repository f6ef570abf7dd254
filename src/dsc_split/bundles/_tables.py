"""Read a lookup table by path, for commands that accept a bundle or a table's file."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from dsc_split._support.checks import shown
from dsc_split.bundles._bundle import TABLE, Bundle
from dsc_split.bundles._storage import SUFFIX
from dsc_split.errors import UsageError
from dsc_split.table._table import LookupTable

__all__ = ["load_table"]


def load_table(source: str | os.PathLike[str]) -> LookupTable:
    """Read the table of a bundle or a packed bundle, a table's file, or ``table.json`` in another folder.

    Raises:
        UsageError: There is no such file or folder, or it has no table.
        DamagedError: The bundle or the table is damaged.
    """
    path = Path(source)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError as e:
        raise UsageError(f"no bundle and no lookup table {str(path)!r}: there is no such file or folder.") from e
    except (OSError, ValueError) as e:
        raise UsageError(f"no bundle and no lookup table {shown(str(path))}: {getattr(e, 'strerror', e)}.") from e
    if path.suffix == SUFFIX:
        return Bundle.open(path).table()
    if not is_folder:
        return LookupTable.load(path)
    if Bundle.is_bundle(path):
        return Bundle.open(path).table()
    if not (path / TABLE).exists():
        raise UsageError(f"{str(path)!r} has no {TABLE}. Make it: dsc-split bench {path}")
    return LookupTable.load(path / TABLE)
