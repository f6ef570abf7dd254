"""A bundle: a folder or one packed file with a model's graphs, cells, tables and manifest.

::

    bundle = Bundle.open("b4")
    for split in bundle.splits:
        print(split.name, split.size_bytes(batch=1))
"""

from dsc_split.bundles._bundle import Bundle, Draft
from dsc_split.bundles._records import FORMAT, VERSION, Manifest, Split, TensorInfo

__all__ = ["FORMAT", "VERSION", "Bundle", "Draft", "Manifest", "Split", "TensorInfo"]
