"""``dsc-split keygen``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cryptography", reason="the extra `sign` is not installed")

Dsc = Callable[..., Any]


def test_keygen_writes_a_pair_and_prints_the_id_of_the_public_key(dsc: Dsc, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    outcome = dsc("keygen", tmp_path / "release")

    key = serialization.load_pem_public_key((tmp_path / "release.pub").read_bytes())
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert outcome.exit_code == 0
    assert outcome.stdout == f"release.pub ({hashlib.sha256(der).hexdigest()[:12]})\n"
    assert "keep it secret" in outcome.stderr


def test_keygen_overwrites_nothing(dsc: Dsc, tmp_path: Path) -> None:
    dsc("keygen", tmp_path / "release")
    before = (tmp_path / "release").read_bytes()

    outcome = dsc("keygen", tmp_path / "release")

    assert outcome.exit_code == 2
    assert "no key is overwritten" in outcome.stderr
    assert (tmp_path / "release").read_bytes() == before


def test_keygen_without_the_extra_names_it(dsc: Dsc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives.serialization", None)

    outcome = dsc("keygen", tmp_path / "release")

    assert outcome.exit_code == 5
    assert "pip install 'dsc-split[sign]'" in outcome.stderr
    assert list(tmp_path.iterdir()) == []
