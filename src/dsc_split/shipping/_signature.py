"""Signatures over a bundle's manifest: Ed25519 in a DSSE envelope, by keys that are named, never found.

The envelope is the one of DSSE 1.0 (https://github.com/secure-systems-lab/dsse): what signs is
``DSSEv1 <type's length> <type> <manifest's length> <manifest>``, and the manifest itself is inside in base64. A key's
id is the SHA-256 of its public half in DER form. What is written here has a digest of itself in addition, by which a
flipped bit is found without any key; envelopes of other programs may lack it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType, field

from dsc_split._support.checks import shown
from dsc_split._support.files import make_folder
from dsc_split._support.optional import require
from dsc_split._support.records import Record, Text, read_record, to_document
from dsc_split._support.strict_json import read_json
from dsc_split.bundles._manifest import DIGEST, encode_document
from dsc_split.errors import DamagedError, DscError, SignatureError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["PAYLOAD_TYPE", "PUBLIC_SUFFIX", "Trust", "generate_key", "key_name", "sign_manifest"]

logger = logging.getLogger(__name__)

PAYLOAD_TYPE: Literal["application/vnd.dsc-split.manifest+json"] = "application/vnd.dsc-split.manifest+json"
"""What an envelope says that it holds."""
PUBLIC_SUFFIX = ".pub"
"""What the file name of a public key adds to that of its private one."""
MAX_SIGNATURES = 64
MAX_KEY_BYTES = 64 * 1024
SIGNATURE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Whose signature is asked for, and whether anything passes without one.

    Raises:
        UsageError: A signature is required and unsigned bundles are allowed at once.
    """

    keys: tuple[Path, ...] = ()
    """PEM files of the public keys that are trusted; each of them is enough."""
    allow_unsigned: bool = False
    """Whether a bundle without any envelope passes."""
    require: bool = False
    """Whether a bundle must be signed by one of ``keys``, even where there are none."""

    def __post_init__(self) -> None:
        if self.require and self.allow_unsigned:
            raise UsageError(
                "--require-signature and --allow-unsigned exclude each other: give one of them, or neither."
            )

    def check(self, manifest: bytes, envelope: bytes | None, what: str) -> tuple[str, ...]:
        """Find out which trusted keys signed a manifest.

        Args:
            manifest: The manifest's bytes.
            envelope: The envelope's bytes; ``None`` where there is none.
            what: What is signed, in words, for messages.

        Returns:
            Names of the keys, in the order of ``keys``; none where it is not signed, or no key is trusted.

        Raises:
            UsageError: A key's file cannot be read, or holds something else.
            SignatureError: There is no envelope, and one is asked for; it is damaged, or of another manifest; none of
                the keys signed it; or a signature is said to be of one of them, and is not.
        """
        keys: dict[str, _PublicKey] = {}
        for path in self.keys:
            key_id, key = _load_public(path)
            keys.setdefault(key_id, key)
        if envelope is None:
            if (keys or self.require) and not self.allow_unsigned:
                raise SignatureError(
                    f"{what} is not signed; a signature by {_either(keys)} was expected. "
                    "Ask who made it for the signed one, or give --allow-unsigned."
                )
            return ()
        message = _authenticated(manifest)
        signed_by = set()
        for signature in _read_envelope(envelope, manifest, what):
            claimed = signature.key_id in keys
            candidates = [signature.key_id] if claimed else list(keys)
            found = [key_id for key_id in candidates if keys[key_id].signed(signature.data, message)]
            if claimed and not found:
                raise SignatureError(
                    f"{what} has a signature that is said to be by {keys[signature.key_id].name}, and is not: it was "
                    "changed or damaged. Do not use it; ask who made it for another copy."
                )
            signed_by.update(found)
        if (keys or self.require) and not signed_by:
            raise SignatureError(
                f"{what} is signed, but not by {_either(keys)}. Give the public key of who signed it with --trust, "
                "if you trust it."
            )
        return tuple(key.name for key_id, key in keys.items() if key_id in signed_by)


def sign_manifest(manifest: bytes, keys: Sequence[Path], envelope: bytes | None = None) -> bytes:
    """Sign a manifest.

    Args:
        manifest: The manifest's bytes.
        keys: PEM files of private keys.
        envelope: An envelope there is already; the signatures in it are kept where they are of this very manifest.

    Returns:
        The envelope's bytes.

    Raises:
        UsageError: A key's file cannot be read, or holds something else; or there would be too many signatures.
        SignatureError: The envelope there is already is damaged.
    """
    message = _authenticated(manifest)
    made = {}
    for path in keys:
        private = _load_private(path)
        made[_key_id(private.public_key())] = private.sign(message)
    signatures = [_Signature(key_id=key_id, sig=base64.b64encode(data).decode()) for key_id, data in made.items()]
    if envelope is not None and _payload(envelope) == manifest:
        for signature in _read_envelope(envelope, manifest, "what is signed already"):
            if signature.key_id not in made and signature.data not in made.values():
                signatures.append(signature)
    if not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise UsageError(
            f"{len(signatures)} signatures: between 1 and {MAX_SIGNATURES} were expected. Sign with fewer."
        )
    return encode_document(
        {
            "payloadType": PAYLOAD_TYPE,
            "payload": base64.b64encode(manifest).decode(),
            "signatures": [to_document(each) for each in sorted(signatures, key=lambda each: (each.key_id, each.data))],
        }
    )


def generate_key(path: Path) -> Path:
    """Make a pair of keys: the private one at ``path``, for its owner alone, the public one beside it.

    Returns:
        The public key's file: that of the private one with ``.pub`` behind.

    Raises:
        UsageError: One of the files is there already; no key is ever overwritten.
        DscError: One of the files cannot be written.
    """
    serialization = _serialization()
    private = _ed25519().Ed25519PrivateKey.generate()
    private_pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    public_path = path.with_name(path.name + PUBLIC_SUFFIX)
    make_folder(path.parent)
    _write_new(public_path, public_pem, 0o644)
    try:
        _write_new(path, private_pem, 0o600)
    except DscError:
        public_path.unlink()
        raise
    return public_path


def key_name(path: Path) -> str:
    """Name a public key by its file and the first digits of its id, as messages and results do.

    Raises:
        UsageError: The file cannot be read, or holds something else.
    """
    return _load_public(path)[1].name


# ---- envelopes ---------------------------------------------------------------------------------------------


class _Signature(Record, forbid_unknown_fields=True):
    """One signature of an envelope."""

    key_id: str = field(default="", name="keyid")
    """Which key is said to have made it; other programs may say nothing, or something of their own."""
    sig: str
    """The signature itself, in base64."""

    def __post_init__(self) -> None:
        """Refuse what is no Ed25519 signature."""
        if len(_base64(self.sig, "sig")) != SIGNATURE_BYTES:
            expected = f"base64 of the {SIGNATURE_BYTES} bytes of an Ed25519 signature"
            raise ValueError(f"sig: got {shown(self.sig)}; expected {expected}.")

    @property
    def data(self) -> bytes:
        """The signature's bytes."""
        return base64.b64decode(self.sig)


class _Envelope(Record, forbid_unknown_fields=True):
    """A DSSE envelope. An unknown key is refused, so that a known one with a damaged name is not taken for one."""

    payload_type: Literal["application/vnd.dsc-split.manifest+json"] = field(name="payloadType")
    """What it holds."""
    payload: Text
    """The manifest, in base64."""
    signatures: Annotated[tuple[_Signature, ...], Meta(min_length=1, max_length=MAX_SIGNATURES)]
    """Who signed it."""
    body_sha256: Text | UnsetType = UNSET
    """Digest of all the rest; other programs write none."""


def _authenticated(manifest: bytes) -> bytes:
    """Return what is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(manifest), manifest)


def _base64(text: str, where: str) -> bytes:
    """Decode base64 that is written in the one way that bytes are written.

    Raises:
        ValueError: It is something else; the message says where.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise ValueError(f"{where}: got {shown(text)}; expected base64.") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError(f"{where}: got {shown(text)}; expected base64 in its one form.")
    return data


def _read_envelope(envelope: bytes, manifest: bytes, what: str) -> tuple[_Signature, ...]:
    """Read an envelope of ``manifest``; no key is needed for this.

    Raises:
        SignatureError: It is damaged, or of something else.
    """
    document = read_json(envelope, f"the envelope of {what}", SignatureError)
    try:
        read = read_record(document, _Envelope)
        payload = _base64(read.payload, "payload")
    except (DamagedError, ValueError) as e:
        raise SignatureError(f"the envelope of {what}: {e} Sign it again, or ask for another copy.") from e
    if DIGEST in document and encode_document(document) != envelope:
        raise SignatureError(
            f"the envelope of {what} is not what its own SHA-256 says: it was changed or damaged. "
            "Sign it again, or ask for another copy."
        )
    if payload != manifest:
        raise SignatureError(
            f"the envelope of {what} signs another manifest than the one that is there. The bundle was changed after "
            "it was signed, or files of two bundles were mixed. Pack and sign it again."
        )
    if len({signature.data for signature in read.signatures}) < len(read.signatures):
        raise SignatureError(f"the envelope of {what} has one signature twice. Sign it again.")
    return read.signatures


def _payload(envelope: bytes) -> bytes:
    """Return the manifest that an envelope holds; it may be of another bundle than the one at hand."""
    document = read_json(envelope, "the envelope to add signatures to", SignatureError)
    try:
        return _base64(str(document.get("payload")), "payload")
    except ValueError as e:
        raise SignatureError(f"the envelope to add signatures to: {e} Remove it, and sign again.") from e


# ---- keys --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _PublicKey:
    """A public key that is trusted."""

    name: str
    """Its file's name, and the first digits of its id."""
    key: Ed25519PublicKey
    """The key itself."""

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Return whether the key made a signature."""
        from cryptography.exceptions import InvalidSignature

        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


def _crypto(module: str) -> Any:
    return require(f"cryptography.{module}", extra="sign", purpose="sign bundles and to check who signed them")


def _serialization() -> Any:
    return _crypto("hazmat.primitives.serialization")


def _ed25519() -> Any:
    return _crypto("hazmat.primitives.asymmetric.ed25519")


def _key_id(key: Ed25519PublicKey) -> str:
    serialization = _serialization()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _either(keys: dict[str, _PublicKey]) -> str:
    return " or ".join(key.name for key in keys.values()) or "a trusted key (none is given: --trust)"


def _load_public(path: Path) -> tuple[str, _PublicKey]:
    """Read a public key; returns its id and itself."""
    pem = _read_pem(path, wanted="public")
    key = _parse(path, "public", lambda: _serialization().load_pem_public_key(pem))
    if not isinstance(key, _ed25519().Ed25519PublicKey):
        raise _no_key(path, "public", _other_kind(key))
    key_id = _key_id(key)
    return key_id, _PublicKey(name=f"{path.name} ({key_id[:12]})", key=key)


def _load_private(path: Path) -> Ed25519PrivateKey:
    pem = _read_pem(path, wanted="private")
    key = _parse(path, "private", lambda: _serialization().load_pem_private_key(pem, password=None))
    if not isinstance(key, _ed25519().Ed25519PrivateKey):
        raise _no_key(path, "private", _other_kind(key))
    private: Ed25519PrivateKey = key
    return private


def _parse(path: Path, wanted: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (TypeError, ValueError, _crypto("exceptions").UnsupportedAlgorithm) as e:
        raise _no_key(path, wanted, str(e).partition(". ")[0]) from e


def _read_pem(path: Path, *, wanted: str) -> bytes:
    """Read a key's file, which may be a pipe; a private key that others may read is warned of."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as e:
        raise UsageError(f"{wanted} key {str(path)!r} cannot be read: {e.strerror or e}.") from e
    if len(data) > MAX_KEY_BYTES or data.count(b"-----BEGIN ") != 1:
        raise _no_key(path, wanted, "it holds no PEM block, or more than one")
    is_private = b"PRIVATE KEY-----" in data
    if wanted == "public" and is_private:
        raise UsageError(
            f"{str(path)!r} is a private key; a public one was expected, such as {str(path) + PUBLIC_SUFFIX!r}. "
            "Keep the private key where bundles are signed, and nowhere else."
        )
    if wanted == "private" and b"PUBLIC KEY-----" in data:
        raise UsageError(
            f"{str(path)!r} is a public key; bundles are signed with the private one, such as "
            f"{str(path).removesuffix(PUBLIC_SUFFIX)!r}."
        )
    if wanted == "private" and b"ENCRYPTED" in data:
        raise UsageError(
            f"private key {str(path)!r} is encrypted, and no passwords are asked for here. Decrypt it into a pipe: "
            f"openssl pkey -in {path} | dsc-split ... --sign /dev/stdin"
        )
    if is_private and stat.S_ISREG(state.st_mode) and state.st_mode & 0o077:
        logger.warning("private key %r may be read by others than its owner; chmod 600 it.", str(path))
    return data


def _no_key(path: Path, wanted: str, reason: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} is no {wanted} Ed25519 key in PEM form: {reason}. Make a pair: dsc-split keygen NAME"
    )


def _other_kind(key: object) -> str:
    return f"the key in it is of another kind ({type(key).__name__})"


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet; what cannot be written whole is removed again."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as e:
        raise UsageError(f"{str(path)!r} is there already, and no key is overwritten. Choose another name.") from e
    except OSError as e:
        raise DscError(f"cannot write {str(path)!r}: {e.strerror or e}.") from e
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
    except OSError as e:
        path.unlink()
        raise DscError(f"cannot write {str(path)!r}: {e.strerror or e}. No key was made.") from e
