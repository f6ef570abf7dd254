"""The GPU: CUDA, arrays in GPU memory, and the state of the GPU."""

__all__: list[str] = []
