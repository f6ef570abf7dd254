"""The split lookup table: records, arithmetic, file format and answers. It needs the standard library alone."""

__all__: list[str] = []
