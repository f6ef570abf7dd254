"""From cells to lookup tables: rows, tables, and what differs between two of them."""

__all__: list[str] = []
