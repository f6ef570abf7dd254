"""Options of the commands that sign bundles or check signatures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dsc_split.shipping._signature import Trust

__all__ = ["AllowUnsigned", "RequireSignature", "SignKeys", "TrustKeys", "make_trust"]

SignKeys = Annotated[
    list[Path] | None,
    typer.Option("--sign", metavar="KEY", help="Sign with this private key (PEM file of keygen). May be repeated."),
]
TrustKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--trust",
        metavar="PUBLIC_KEY",
        help="A public key (PEM file) that is trusted; one of them must have signed the bundle. May be repeated.",
    ),
]
RequireSignature = Annotated[
    bool, typer.Option("--require-signature", help="Refuse what no trusted key signed, even where none is given.")
]
AllowUnsigned = Annotated[
    bool, typer.Option("--allow-unsigned", help="Take a bundle without any signature, its engines included.")
]


def make_trust(trust: Sequence[Path] | None, *, require_signature: bool = False, allow_unsigned: bool = False) -> Trust:
    """Make the trust from the options.

    Raises:
        UsageError: A signature is required, and unsigned bundles are allowed.
    """
    from dsc_split.shipping._signature import Trust

    return Trust(keys=tuple(trust or ()), allow_unsigned=allow_unsigned, require=require_signature)
