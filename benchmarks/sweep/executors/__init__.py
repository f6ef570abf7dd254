"""Who runs the jobs of a sweep: this machine, and what else is put into the table."""

__all__: list[str] = []
