"""Prove that head then tail computes the same as the whole model, with ONNX Runtime on the CPU as the reference."""

__all__: list[str] = []
