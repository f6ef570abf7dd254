"""``dsc-split keygen``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["keygen"]


def keygen(
    name: Annotated[Path, typer.Argument(metavar="NAME", help="File of the private key; the public one is NAME.pub.")],
) -> None:
    """Make a pair of keys to sign bundles with.

    NAME signs bundles (pack --sign NAME). Keep it secret: it is not encrypted, but only its owner can read it. Give
    NAME.pub to those who check signatures (--trust NAME.pub). Both are Ed25519 keys in PEM form.
    """
    from dsc_split.cli._console import err, out
    from dsc_split.shipping._signature import generate_key, key_name

    public_path = generate_key(name)
    out.print(key_name(public_path), soft_wrap=True)
    err.print(f"private key {name}: keep it secret; public key {public_path}", soft_wrap=True)
