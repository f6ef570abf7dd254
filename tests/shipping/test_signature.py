"""Signatures over manifests: who signed, who did not, and envelopes that were tampered with."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from dsc_split.bundles._manifest import DIGEST, encode_document
from dsc_split.errors import DscError, SignatureError, UsageError
from dsc_split.shipping._signature import PAYLOAD_TYPE, Trust, generate_key, key_name, sign_manifest

MANIFEST = encode_document({"format": "dsc-split/bundle", "revision": 7})
OTHER = encode_document({"format": "dsc-split/bundle", "revision": 6})
WHAT = "bundle 'b4.dscb'"


def pair(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / name, generate_key(folder / name)


@pytest.fixture
def mine(tmp_path: Path) -> tuple[Path, Path]:
    return pair(tmp_path, "mine")


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Path]:
    return pair(tmp_path, "theirs")


def check(envelope: bytes | None, *public: Path, manifest: bytes = MANIFEST, **options: bool) -> tuple[str, ...]:
    return Trust(keys=public, **options).check(manifest, envelope, WHAT)


def authenticated(manifest: bytes, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """DSSE's pre-authentication encoding, as its specification writes it."""
    return b" ".join(
        [b"DSSEv1", str(len(payload_type)).encode(), payload_type.encode(), str(len(manifest)).encode(), manifest]
    )


def foreign(signature: bytes, **more: Any) -> bytes:
    """An envelope as other programs write it: without an id of the key, and without a digest."""
    document = {
        "payload": base64.b64encode(MANIFEST).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(signature).decode(), **more}],
    }
    return json.dumps(document).encode()


def changed(envelope: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """An envelope whose writer made a change and took the digest anew."""
    document = json.loads(envelope)
    change(document)
    return encode_document(document)


# ---- who signed --------------------------------------------------------------------------------------------


def test_signature_of_a_trusted_key_is_named_by_file_and_id(mine: tuple[Path, Path]) -> None:
    envelope = sign_manifest(MANIFEST, [mine[0]])

    assert check(envelope, mine[1], require=True) == (key_name(mine[1]),)
    assert key_name(mine[1]).startswith("mine.pub (")


def test_one_of_two_signatures_is_enough(mine: tuple[Path, Path], theirs: tuple[Path, Path]) -> None:
    envelope = sign_manifest(MANIFEST, [mine[0], theirs[0]])

    assert check(envelope, theirs[1], require=True) == (key_name(theirs[1]),)
    assert check(envelope, theirs[1], mine[1]) == (key_name(theirs[1]), key_name(mine[1]))


def test_signatures_are_added_one_after_the_other(mine: tuple[Path, Path], theirs: tuple[Path, Path]) -> None:
    first = sign_manifest(MANIFEST, [mine[0]])

    both = sign_manifest(MANIFEST, [theirs[0]], first)

    assert both == sign_manifest(MANIFEST, [theirs[0], mine[0]])
    assert sign_manifest(MANIFEST, [mine[0]], both) == both


def test_signatures_of_another_manifest_are_not_kept(mine: tuple[Path, Path], theirs: tuple[Path, Path]) -> None:
    envelope = sign_manifest(MANIFEST, [theirs[0]], sign_manifest(OTHER, [mine[0]]))

    assert envelope == sign_manifest(MANIFEST, [theirs[0]])


def test_key_that_is_given_twice_signs_once_and_is_named_once(mine: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.pub"
    shutil.copy(mine[1], copy)
    envelope = sign_manifest(MANIFEST, [mine[0], mine[0]])

    assert len(json.loads(envelope)["signatures"]) == 1
    assert check(envelope, mine[1], copy) == (key_name(mine[1]),)


def test_wrong_key_is_refused_by_name(mine: tuple[Path, Path], theirs: tuple[Path, Path]) -> None:
    envelope = sign_manifest(MANIFEST, [mine[0]])

    with pytest.raises(SignatureError, match=r"is signed, but not by theirs\.pub \([0-9a-f]{12}\)") as caught:
        check(envelope, theirs[1])
    assert caught.value.exit_code == 6


def test_stripped_signature_is_refused_wherever_a_key_is_trusted(mine: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError, match=r"'b4\.dscb' is not signed; a signature by mine\.pub"):
        check(None, mine[1])
    with pytest.raises(SignatureError, match="a signature by a trusted key"):
        check(None, require=True)
    assert check(None, mine[1], allow_unsigned=True) == ()
    assert check(None) == ()


def test_required_signature_needs_a_trusted_key(mine: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError, match="none is given: --trust"):
        check(sign_manifest(MANIFEST, [mine[0]]), require=True)


def test_allowing_unsigned_bundles_allows_no_bundle_of_a_stranger(
    mine: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    with pytest.raises(SignatureError, match="but not by"):
        check(sign_manifest(MANIFEST, [mine[0]]), theirs[1], allow_unsigned=True)


def test_requiring_and_waiving_a_signature_at_once_is_refused() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        Trust(require=True, allow_unsigned=True)


def test_envelope_of_another_manifest_is_refused_with_and_without_keys(mine: tuple[Path, Path]) -> None:
    envelope = sign_manifest(OTHER, [mine[0]])

    for public in ((mine[1],), ()):
        with pytest.raises(SignatureError, match="signs another manifest"):
            check(envelope, *public)


def test_signature_that_claims_a_trusted_key_and_is_of_another_manifest_is_refused(
    mine: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    replayed = json.loads(sign_manifest(OTHER, [mine[0]]))["signatures"]
    envelope = changed(sign_manifest(MANIFEST, [theirs[0]]), lambda document: document["signatures"].extend(replayed))

    with pytest.raises(SignatureError, match=r"said to be by mine\.pub .* and is not"):
        check(envelope, theirs[1], mine[1])


# ---- tampering ---------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_an_envelope_is_found_even_without_a_key(
    mine: tuple[Path, Path], theirs: tuple[Path, Path]
) -> None:
    envelope = sign_manifest(MANIFEST, [mine[0], theirs[0]])

    accepted = []
    for position in range(len(envelope)):
        for bit in range(8):
            flipped = bytearray(envelope)
            flipped[position] ^= 1 << bit
            for public in ((), (mine[1],)) if bit == position % 8 else ((),):
                try:
                    check(bytes(flipped), *public)
                except SignatureError:
                    continue
                accepted.append((position, bit))
    assert accepted == []


def test_no_flipped_bit_of_a_foreign_envelope_changes_who_signed(mine: tuple[Path, Path]) -> None:
    private = serialization.load_pem_private_key(mine[0].read_bytes(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    envelope = foreign(private.sign(authenticated(MANIFEST)), keyid="build-7")

    results = set()
    for position in range(len(envelope)):
        flipped = bytearray(envelope)
        flipped[position] ^= 1 << position % 7
        try:
            results.add(check(bytes(flipped), mine[1]))
        except SignatureError:
            continue
    assert results <= {(key_name(mine[1]),)}


def test_every_truncation_of_an_envelope_is_refused(mine: tuple[Path, Path]) -> None:
    envelope = sign_manifest(MANIFEST, [mine[0]])

    for length in range(len(envelope)):
        with pytest.raises(SignatureError):
            check(envelope[:length], mine[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(payloadType="application/json"), "payloadType: got 'application/json'"),
        (lambda document: document.update(signatures=[]), "at least 1"),
        (lambda document: document.update(signatures=document["signatures"] * 65), "at most 64"),
        (lambda document: document.update(signatures=document["signatures"] * 2), "one signature twice"),
        (lambda document: document.update(signatures=[7]), r"signatures\[0\]: got 7"),
        (lambda document: document.update(signatures={}), "expected a list"),
        (lambda document: document.update(note="x"), "note: the key is unknown"),
        (lambda document: document["signatures"][0].update(cert="x"), r"signatures\[0\]\.cert: the key is unknown"),
        (lambda document: document["signatures"][0].update(keyid=7), r"signatures\[0\]\.keyid: got 7"),
        (lambda document: document["signatures"][0].update(sig="AAAA"), "64 bytes of an Ed25519 signature"),
        (lambda document: document["signatures"][0].update(sig="AA\n=="), "expected base64"),
        (lambda document: document["signatures"][0].update(sig="é"), "expected base64"),
        (lambda document: document["signatures"][0].update(sig=None), "expected a text"),
        (lambda document: document.update(payload="AB=="), "base64 in its one form"),
        (lambda document: document.update(payload=None), "payload: got None"),
        (lambda document: document.pop("payload"), "payload: the key is missing"),
    ],
)
def test_malformed_envelope_is_refused_by_place(
    mine: tuple[Path, Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    envelope = changed(sign_manifest(MANIFEST, [mine[0]]), change)

    with pytest.raises(SignatureError, match=message):
        check(envelope)


@pytest.mark.parametrize("envelope", [b"", b"[]", b'{"payload": "', b'{"payload": 1, "payload": 1}', b"\xff" * 9])
def test_what_is_no_envelope_is_refused(envelope: bytes, mine: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError, match=r"the envelope of bundle 'b4\.dscb'"):
        check(envelope, mine[1])
    with pytest.raises(SignatureError, match="the envelope to add signatures to"):
        sign_manifest(MANIFEST, [mine[0]], envelope)


def test_more_signatures_than_are_read_are_not_made(mine: tuple[Path, Path]) -> None:
    strangers = [{"keyid": f"{i}", "sig": base64.b64encode(bytes([i]) * 64).decode()} for i in range(64)]
    full = changed(sign_manifest(MANIFEST, [mine[0]]), lambda document: document.update(signatures=strangers))

    with pytest.raises(UsageError, match="65 signatures: between 1 and 64"):
        sign_manifest(MANIFEST, [mine[0]], full)


# ---- other programs ----------------------------------------------------------------------------------------


def test_signature_made_by_the_specification_alone_verifies(mine: tuple[Path, Path]) -> None:
    private = serialization.load_pem_private_key(mine[0].read_bytes(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)

    envelope = foreign(private.sign(authenticated(MANIFEST)))

    assert check(envelope, mine[1]) == (key_name(mine[1]),)
    resigned = sign_manifest(MANIFEST, [mine[0]], envelope)
    assert resigned == sign_manifest(MANIFEST, [mine[0]])


def test_signature_over_another_type_of_payload_does_not_verify(mine: tuple[Path, Path]) -> None:
    private = serialization.load_pem_private_key(mine[0].read_bytes(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)

    with pytest.raises(SignatureError, match="but not by"):
        check(foreign(private.sign(authenticated(MANIFEST, "application/json"))), mine[1])
    with pytest.raises(SignatureError, match="but not by"):
        check(foreign(private.sign(MANIFEST)), mine[1])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl program")
def test_keys_and_signatures_of_openssl_are_taken(tmp_path: Path, mine: tuple[Path, Path]) -> None:
    private, public, message, signature = (tmp_path / name for name in ("o.pem", "o.pub", "message", "signature"))
    message.write_bytes(authenticated(MANIFEST))
    for command in (
        ["genpkey", "-algorithm", "ed25519", "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
        ["pkeyutl", "-sign", "-rawin", "-in", message, "-inkey", private, "-out", signature],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)

    assert check(foreign(signature.read_bytes()), public) == (key_name(public),)
    assert check(sign_manifest(MANIFEST, [private]), public) == (key_name(public),)


def test_securesystemslib_reads_what_is_signed_here_and_signs_what_is_read_here(mine: tuple[Path, Path]) -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    private = serialization.load_pem_private_key(mine[0].read_bytes(), None)
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    ours = json.loads(sign_manifest(MANIFEST, [mine[0]]))
    (key_id,) = (item["keyid"] for item in ours["signatures"])

    key = signer.SSlibKey.from_crypto(private.public_key(), keyid=key_id)
    assert set(dsse.Envelope.from_dict(ours).verify([key], 1)) == {key_id}

    envelope = dsse.Envelope(MANIFEST, PAYLOAD_TYPE, {})
    envelope.sign(signer.CryptoSigner(private))  # under an id of its own making
    assert check(json.dumps(envelope.to_dict()).encode(), mine[1]) == (key_name(mine[1]),)


# ---- keys --------------------------------------------------------------------------------------------------


def test_keys_are_for_their_owner_and_never_overwritten(tmp_path: Path) -> None:
    public = generate_key(tmp_path / "release")
    before = public.read_bytes(), (tmp_path / "release").read_bytes()

    assert public == tmp_path / "release.pub"
    assert (tmp_path / "release").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match=r"release\.pub' is there already, and no key is overwritten"):
        generate_key(tmp_path / "release")
    assert before == (public.read_bytes(), (tmp_path / "release").read_bytes())


def test_public_key_is_not_left_alone_where_the_private_one_is_there(tmp_path: Path) -> None:
    (tmp_path / "release").write_text("precious")

    with pytest.raises(UsageError, match="release' is there already"):
        generate_key(tmp_path / "release")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]
    assert (tmp_path / "release").read_text() == "precious"


def test_keys_get_a_folder_where_there_is_none(tmp_path: Path) -> None:
    assert generate_key(tmp_path / "missing" / "release").is_file()
    with pytest.raises(DscError, match="cannot make folder"):
        generate_key(tmp_path / "missing" / "release" / "inner")


def test_private_key_is_not_taken_for_a_public_one_nor_the_reverse(mine: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"mine' is a private key; a public one was expected, such as '.*mine\.pub'"):
        check(None, mine[0])
    with pytest.raises(UsageError, match=r"mine\.pub' is a public key; .* such as '.*mine'\."):
        sign_manifest(MANIFEST, [mine[1]])


@pytest.mark.parametrize("kind", ["RSA", "EC"])
def test_keys_of_other_kinds_are_refused_by_kind(tmp_path: Path, kind: str) -> None:
    private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey = (
        rsa.generate_private_key(public_exponent=65537, key_size=1024)
        if kind == "RSA"
        else ec.generate_private_key(ec.SECP256R1())
    )
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (tmp_path / "k").write_bytes(private.private_bytes(pem, form, serialization.NoEncryption()))
    (tmp_path / "k").chmod(0o600)
    (tmp_path / "k.pub").write_bytes(
        private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    )

    with pytest.raises(
        UsageError, match=f"k' is no private Ed25519 key in PEM form: the key .* of another kind .*{kind}"
    ):
        sign_manifest(MANIFEST, [tmp_path / "k"])
    with pytest.raises(
        UsageError, match=rf"k\.pub' is no public Ed25519 key in PEM form: the key .* of another kind .*{kind}"
    ):
        check(None, tmp_path / "k.pub")


@pytest.mark.parametrize("form", ["PKCS8", "OpenSSH"])
def test_encrypted_private_key_is_refused_with_the_way_out(tmp_path: Path, form: str) -> None:
    encrypted = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        getattr(serialization.PrivateFormat, form),
        serialization.BestAvailableEncryption(b"secret") if form == "PKCS8" else serialization.NoEncryption(),
    )
    (tmp_path / "k").write_bytes(encrypted)
    (tmp_path / "k").chmod(0o600)

    message = "is encrypted.*openssl pkey" if form == "PKCS8" else "is no private Ed25519 key in PEM form"
    with pytest.raises(UsageError, match=message):
        sign_manifest(MANIFEST, [tmp_path / "k"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"ssh-ed25519 AAAA me@here\n",
        b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        b"-----BEGIN PUBLIC KEY-----\n" * 2,
        b"-----BEGIN PUBLIC KEY-----\n" + b"A" * 70000,
    ],
)
def test_file_that_holds_no_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "k.pub").write_bytes(content)

    with pytest.raises(UsageError, match=r"k\.pub' is no public Ed25519 key in PEM form: .* dsc-split keygen NAME"):
        check(None, tmp_path / "k.pub")


def test_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"public key '.*absent\.pub' cannot be read: No such file"):
        check(None, tmp_path / "absent.pub")
    with pytest.raises(UsageError, match=r"private key '.*absent' cannot be read: No such file"):
        sign_manifest(MANIFEST, [tmp_path / "absent"])


def test_private_key_that_others_may_read_is_warned_of(
    mine: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    sign_manifest(MANIFEST, [mine[0]])
    assert caplog.messages == []

    mine[0].chmod(0o640)
    sign_manifest(MANIFEST, [mine[0]])
    assert [message.rpartition("may")[2] for message in caplog.messages] == [
        " be read by others than its owner; chmod 600 it."
    ]


def test_digest_of_an_envelope_is_not_needed_but_must_be_right(mine: tuple[Path, Path]) -> None:
    document = json.loads(sign_manifest(MANIFEST, [mine[0]]))
    document.pop(DIGEST)
    assert check(json.dumps(document).encode(), mine[1]) == (key_name(mine[1]),)

    with pytest.raises(SignatureError, match="its own SHA-256"):
        check(json.dumps({**document, DIGEST: "0" * 64}).encode(), mine[1])
