"""Build, load and check the engines of one side of a bundle, and compare them with this machine."""

__all__: list[str] = []
