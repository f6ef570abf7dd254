"""Helpers for all parts of the package, independent of models, bundles and tables."""

__all__: list[str] = []
