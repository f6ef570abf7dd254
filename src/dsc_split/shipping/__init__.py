"""Bundles on their way to other machines: sign, verify, pack, unpack."""

__all__: list[str] = []
