"""Float16: which values become float16, the conversion of the whole graph, and what it costs."""

__all__: list[str] = []
