"""The TensorRT back-end, for full TensorRT and TensorRT for RTX."""

__all__: list[str] = []
