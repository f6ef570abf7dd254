"""All engines of one side of a bundle: build, load, check, and whether they fit this machine."""

__all__: list[str] = []
