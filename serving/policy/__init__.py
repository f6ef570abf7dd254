"""The switching policy, and the rate estimate that it uses."""

__all__: list[str] = []
