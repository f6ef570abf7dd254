"""The proof that head then tail computes what the whole model computes, and the reference that runs it."""

__all__: list[str] = []
