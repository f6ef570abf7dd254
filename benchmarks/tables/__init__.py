"""Make lookup tables from cells, and compare two tables."""

__all__: list[str] = []
