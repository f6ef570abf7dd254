"""Replay a scenario through a lookup table."""

__all__: list[str] = []
