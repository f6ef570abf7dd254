"""Unite copies and parts of a bundle that were worked on elsewhere."""

__all__: list[str] = []
