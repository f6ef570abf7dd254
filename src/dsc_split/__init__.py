"""Dynamic split computing: cut a model into head / tail pairs, time them, pick the cut at run time.

The rooms are imported by name: ``dsc_split.partitioner`` (a model in, pairs out), ``dsc_split.engines``
(one subgraph on one target), ``dsc_split.benchmarks`` (cells and the table). What all of them share is here.

The table needs Python's standard library alone; what reads bundles is imported when it is used.
"""

import typing

from dsc_split import errors
from dsc_split.lookup_table import LookupTable

if typing.TYPE_CHECKING:
    from dsc_split.bundle import Bundle

__all__ = ["Bundle", "LookupTable", "__version__", "errors"]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Bundle":
        from dsc_split.bundle import Bundle

        return Bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
