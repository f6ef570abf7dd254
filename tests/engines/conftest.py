"""The tiny bundle, as the benchmarks' tests have it."""

from tests.support.tiny_bundles import bundle, make_bundle, replace_graph

__all__ = ["bundle", "make_bundle", "replace_graph"]
