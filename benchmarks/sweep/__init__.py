"""A sweep: every engine of a bundle, timed at every batch size."""

__all__: list[str] = []
