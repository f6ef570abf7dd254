"""Graphs in memory: index, shapes, names, opset, and the one normal form."""

__all__: list[str] = []
