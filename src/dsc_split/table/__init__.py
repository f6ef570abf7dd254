"""The split lookup table: records, arithmetic, file format and answers. It needs only the standard library."""

__all__: list[str] = []
