"""The memory of engines that stay loaded, and which of them to keep within a budget."""

__all__: list[str] = []
