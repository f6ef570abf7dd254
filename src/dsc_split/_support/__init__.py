"""What every room uses, and that knows nothing of models, bundles or tables."""

__all__: list[str] = []
