"""Pack, sign, verify and unpack bundles: a packed bundle is one file for other machines.

::

    pack_bundle(Bundle.open("b4"), "b4.dscb", sign=[Path("release.key")])
    verify_bundle("b4.dscb").ok
    unpack_bundle("b4.dscb", "b4", trust=Trust(keys=(Path("release.key.pub"),)))
"""

from __future__ import annotations

from dsc_split.shipping._pack import PackResult, RoleSize, pack_bundle
from dsc_split.shipping._signature import Trust, generate_key
from dsc_split.shipping._unpack import unpack_bundle
from dsc_split.shipping._verify import VerifyResult, VerifyRow, verify_bundle

__all__ = [
    "PackResult",
    "RoleSize",
    "Trust",
    "VerifyResult",
    "VerifyRow",
    "generate_key",
    "pack_bundle",
    "unpack_bundle",
    "verify_bundle",
]
