"""Cells: one measurement each, in one file each."""

__all__: list[str] = []
