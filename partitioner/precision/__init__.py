"""Float16: which values become float16, the conversion of the whole graph, and the error that it causes."""

__all__: list[str] = []
