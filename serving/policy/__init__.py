"""The switching policy and the rate estimate that it stands on."""

__all__: list[str] = []
