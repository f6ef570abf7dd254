"""The GPU: its driver, arrays in its memory, and its state."""

__all__: list[str] = []
