"""A bundle's tails as a model repository for NVIDIA Triton."""

__all__: list[str] = []
