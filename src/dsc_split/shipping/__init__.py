"""Sign, verify, pack and unpack bundles, to send them to other machines."""

__all__: list[str] = []
