"""The ONNX Runtime back-end."""

__all__: list[str] = []
