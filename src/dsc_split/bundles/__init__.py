"""Bundles on disk: the manifest, the storage (a folder or one packed file), and the samples."""

__all__: list[str] = []
