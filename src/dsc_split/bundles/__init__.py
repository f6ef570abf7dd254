"""What a bundle is on disk: its manifest, its storage as a folder or one packed file, its samples."""

__all__: list[str] = []
