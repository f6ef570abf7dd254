"""The split lookup table: returns the fastest choice for a batch size and a data rate.

::

    table = LookupTable.load("b4/table.json")
    pick = table.pick(8, 12.0)
    print(pick.choice.name, pick.latency_ms)

This module needs only the standard library.
"""

from dsc_split.table._pick import Pick
from dsc_split.table._state import State
from dsc_split.table._table import LookupTable
from dsc_split.table._types import BatchTable, Choice, Link, Row, Segment, Side, TableContent, Terms

__all__ = [
    "BatchTable",
    "Choice",
    "Link",
    "LookupTable",
    "Pick",
    "Row",
    "Segment",
    "Side",
    "State",
    "TableContent",
    "Terms",
]
