"""Merge copies and parts of a bundle that were changed elsewhere."""

__all__: list[str] = []
