"""Cuts: find them, select some, make their heads and tails."""

__all__: list[str] = []
