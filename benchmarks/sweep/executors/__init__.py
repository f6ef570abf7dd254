"""Executors, which run the jobs of a sweep: on this machine, or wherever an executor in the table does."""

__all__: list[str] = []
