"""The kinds of source: PyTorch code, .pt2 files, ONNX files, torchvision and timm."""

__all__: list[str] = []
