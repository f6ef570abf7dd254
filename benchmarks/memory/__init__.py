"""What engines that stay loaded take, and which to keep within a budget."""

__all__: list[str] = []
