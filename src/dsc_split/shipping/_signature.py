"""Sign a bundle's manifest, and check signatures: Ed25519 in a DSSE envelope. The user names every key.

The envelope has the form of DSSE 1.0 (https://github.com/secure-systems-lab/dsse). The signed bytes are
``DSSEv1 <length of type> <type> <length of manifest> <manifest>``; the envelope also contains the manifest in base64. A
key's id is the SHA-256 of the public key in DER form. Envelopes of dsc-split also have a digest of themselves, so that
damage is found without a key; envelopes of other programs may have none.
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
"""Type of the signed document."""
PUBLIC_SUFFIX = ".pub"
"""Added to the file name of a private key for its public key."""
MAX_SIGNATURES = 64
MAX_KEY_BYTES = 64 * 1024
SIGNATURE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The trusted keys, and whether a bundle passes without a signature.

    Raises:
        UsageError: ``require`` and ``allow_unsigned`` are both set.
    """

    keys: tuple[Path, ...] = ()
    """PEM files of the trusted public keys; a signature by one of them is enough."""
    allow_unsigned: bool = False
    """Whether a bundle without an envelope passes."""
    require: bool = False
    """Whether one of ``keys`` must have signed a bundle; without keys, no bundle passes."""

    def __post_init__(self) -> None:
        if self.require and self.allow_unsigned:
            raise UsageError(
                "--require-signature and --allow-unsigned exclude each other: give one of them, or neither."
            )

    def check(self, manifest: bytes, envelope: bytes | None, what: str) -> tuple[str, ...]:
        """Check the signatures of a manifest, and return the names of the trusted keys that signed it.

        Args:
            manifest: The manifest's bytes.
            envelope: The envelope's bytes; ``None`` where there is none.
            what: Name of the signed bundle for messages: ``bundle 'b4'``.

        Returns:
            Names of the keys, in the order of ``keys``; empty where there is no envelope, or no key is trusted.

        Raises:
            UsageError: The file of a key cannot be read, or contains no public key.
            SignatureError: A signature is required and there is none; the envelope is damaged or of another manifest;
                no trusted key signed it; or a signature names a trusted key that did not make it.
        """
        keys: dict[str, _PublicKey] = {}
        for path in self.keys:
            key_id, key = _load_public(path)
            keys.setdefault(key_id, key)
        if envelope is None:
            if (keys or self.require) and not self.allow_unsigned:
                raise SignatureError(
                    f"{what} is not signed; a signature by {_names_of(keys)} was expected. "
                    "Ask who made it for the signed one, or give --allow-unsigned."
                )
            return ()
        message = _signed_bytes(manifest)
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
                f"{what} is signed, but not by {_names_of(keys)}. Give the public key of who signed it with --trust, "
                "if you trust it."
            )
        return tuple(key.name for key_id, key in keys.items() if key_id in signed_by)


def sign_manifest(manifest: bytes, keys: Sequence[Path], envelope: bytes | None = None) -> bytes:
    """Sign a manifest.

    Args:
        manifest: The manifest's bytes.
        keys: PEM files of private keys.
        envelope: An existing envelope; its signatures are kept if it is of the same manifest.

    Returns:
        The envelope's bytes.

    Raises:
        UsageError: The file of a key cannot be read, or contains no private key; or there are too many signatures.
        SignatureError: The existing envelope is damaged.
    """
    message = _signed_bytes(manifest)
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
    """Make a pair of keys: a private key at ``path``, which only its owner may read, and a public key beside it.

    Returns:
        Path of the public key: ``path`` with ``.pub`` added.

    Raises:
        UsageError: One of the files exists; a key is never overwritten.
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
    """Return the name of a public key in messages and results: its file and the first digits of its id.

    Raises:
        UsageError: The file cannot be read, or contains no public key.
    """
    return _load_public(path)[1].name


# ---- envelopes ---------------------------------------------------------------------------------------------


class _Signature(Record, forbid_unknown_fields=True):
    """One signature of an envelope."""

    key_id: str = field(default="", name="keyid")
    """Id of the key that made it, not yet checked; other programs may leave it out or have other ids."""
    sig: str
    """The signature in base64."""

    def __post_init__(self) -> None:
        """Refuse everything but an Ed25519 signature."""
        if len(_base64(self.sig, "sig")) != SIGNATURE_BYTES:
            expected = f"base64 of the {SIGNATURE_BYTES} bytes of an Ed25519 signature"
            raise ValueError(f"sig: got {shown(self.sig)}; expected {expected}.")

    @property
    def data(self) -> bytes:
        """The signature's bytes."""
        return base64.b64decode(self.sig)


class _Envelope(Record, forbid_unknown_fields=True):
    """A DSSE envelope. Unknown keys are refused, because one may be a known key whose name was damaged."""

    payload_type: Literal["application/vnd.dsc-split.manifest+json"] = field(name="payloadType")
    """Type of the signed document."""
    payload: Text
    """The manifest, in base64."""
    signatures: Annotated[tuple[_Signature, ...], Meta(min_length=1, max_length=MAX_SIGNATURES)]
    """Its signatures."""
    body_sha256: Text | UnsetType = UNSET
    """Digest of all other keys; other programs write none."""


def _signed_bytes(manifest: bytes) -> bytes:
    """Return the bytes that are signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(manifest), manifest)


def _base64(text: str, where: str) -> bytes:
    """Decode base64 in its standard form, which is the only text for the bytes.

    Raises:
        ValueError: The text is no base64, or not in its standard form; the message starts with ``where``.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (ValueError, binascii.Error):
        raise ValueError(f"{where}: got {shown(text)}; expected base64.") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError(f"{where}: got {shown(text)}; expected base64 in its one form.")
    return data


def _read_envelope(envelope: bytes, manifest: bytes, what: str) -> tuple[_Signature, ...]:
    """Return the signatures in an envelope of ``manifest``, without checking them.

    Raises:
        SignatureError: The envelope is damaged, or of another manifest.
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
    """Return the manifest in an envelope, which may be the manifest of another bundle."""
    document = read_json(envelope, "the envelope to add signatures to", SignatureError)
    try:
        return _base64(str(document.get("payload")), "payload")
    except ValueError as e:
        raise SignatureError(f"the envelope to add signatures to: {e} Remove it, and sign again.") from e


# ---- keys --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _PublicKey:
    """A trusted public key."""

    name: str
    """Name of its file, and the first digits of its id."""
    key: Ed25519PublicKey
    """The key itself."""

    def signed(self, signature: bytes, message: bytes) -> bool:
        """Return whether ``signature`` is by this key and of ``message``."""
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


def _names_of(keys: dict[str, _PublicKey]) -> str:
    return " or ".join(key.name for key in keys.values()) or "a trusted key (none is given: --trust)"


def _load_public(path: Path) -> tuple[str, _PublicKey]:
    """Read a public key; return its id and the key."""
    pem = _read_pem(path, wanted="public")
    key = _parse(path, "public", lambda: _serialization().load_pem_public_key(pem))
    if not isinstance(key, _ed25519().Ed25519PublicKey):
        raise _key_error(path, "public", _other_kind(key))
    key_id = _key_id(key)
    return key_id, _PublicKey(name=f"{path.name} ({key_id[:12]})", key=key)


def _load_private(path: Path) -> Ed25519PrivateKey:
    pem = _read_pem(path, wanted="private")
    key = _parse(path, "private", lambda: _serialization().load_pem_private_key(pem, password=None))
    if not isinstance(key, _ed25519().Ed25519PrivateKey):
        raise _key_error(path, "private", _other_kind(key))
    private: Ed25519PrivateKey = key
    return private


def _parse(path: Path, wanted: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (TypeError, ValueError, _crypto("exceptions").UnsupportedAlgorithm) as e:
        raise _key_error(path, wanted, str(e).partition(". ")[0]) from e


def _read_pem(path: Path, *, wanted: str) -> bytes:
    """Read the file of a key, which may be a pipe; log a warning if others may read a private key."""
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            data = file.read(MAX_KEY_BYTES + 1)
    except OSError as e:
        raise UsageError(f"{wanted} key {str(path)!r} cannot be read: {e.strerror or e}.") from e
    if len(data) > MAX_KEY_BYTES or data.count(b"-----BEGIN ") != 1:
        raise _key_error(path, wanted, "it holds no PEM block, or more than one")
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


def _key_error(path: Path, wanted: str, reason: str) -> UsageError:
    return UsageError(
        f"{str(path)!r} is no {wanted} Ed25519 key in PEM form: {reason}. Make a pair: dsc-split keygen NAME"
    )


def _other_kind(key: object) -> str:
    return f"the key in it is of another kind ({type(key).__name__})"


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a new file; remove it if it cannot be written completely."""
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
