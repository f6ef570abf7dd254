"""Results for people and programs: text, CSV, JSON and pictures."""

__all__: list[str] = []
