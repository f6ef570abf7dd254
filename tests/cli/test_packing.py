"""`pack`, `verify` and `unpack` on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.full_bundles import NEW_ENGINE, OLD, full_bundle

from dsc_split.bundle import Bundle

Program = Callable[..., Any]


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return full_bundle(tmp_path / "b4")


def test_pack_says_what_it_holds_by_role_and_how_much_disk_it_takes(
    tmp_path: Path, bundle: Bundle, dsc: Program
) -> None:
    done = dsc("pack", bundle.path, "--side", "device", "--device", OLD)

    packed = tmp_path / "b4.device.dscb"
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{packed}: the device's part, revision ")
    assert f"{packed.stat().st_size / 1e6:,.1f} MB on disk, not signed" in done.stdout
    assert "  engine: 1 files, 0.0 MB" in done.stdout
    assert "  left out: " in done.stdout


def test_pack_prints_json_and_takes_every_option(tmp_path: Path, bundle: Bundle, dsc: Program) -> None:
    done = dsc(
        *("pack", bundle.path, "--output", tmp_path / "x.dscb", "--side", "device", "--with-onnx", "--with-cells"),
        *("--revision", 7, "--json"),
    )

    result = json.loads(done.stdout)
    assert (result["revision"], result["side"]) == (7, "device")
    assert {item["role"] for item in result["roles"]} == {
        *("engine", "sample", "head", "model", "weights", "cell", "table")
    }


def test_packed_bundle_is_packed_again_under_its_own_name(tmp_path: Path, bundle: Bundle, dsc: Program) -> None:
    dsc("pack", bundle.path)
    dsc("pack", tmp_path / "b4.dscb", "--side", "server")

    assert {path.name for path in tmp_path.iterdir()} == {"b4", "b4.dscb", "b4.server.dscb"}


def test_road_from_pack_with_a_signature_to_unpack_and_back(tmp_path: Path, bundle: Bundle, dsc: Program) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "release.pem"
    dsc("keygen", key)
    packed, out = tmp_path / "b4.dscb", tmp_path / "out"
    trust = ("--trust", f"{key}.pub")

    assert "1 signatures" in dsc("pack", bundle.path, "--sign", key).stdout
    verified = dsc("verify", packed, *trust, "--require-signature")
    assert "signed by" in verified.stdout
    unpacked = dsc("unpack", packed, "--output", out, *trust)
    assert unpacked.exit_code == 0
    assert "files verified" in unpacked.stdout
    assert dsc("verify", out, *trust).exit_code == 0


def test_packed_bundle_is_signed_again_with_trust(tmp_path: Path, bundle: Bundle, dsc: Program) -> None:
    pytest.importorskip("cryptography")
    theirs, ours, packed = tmp_path / "theirs.pem", tmp_path / "ours.pem", tmp_path / "b4.dscb"
    dsc("keygen", theirs)
    dsc("keygen", ours)
    dsc("pack", bundle.path, "--sign", theirs)
    again = ("pack", packed, "--output", tmp_path / "again.dscb", "--sign", ours)

    refused = dsc(*again)
    assert (refused.exit_code, "is native code" in refused.stderr) == (6, True)
    assert dsc(*again, "--trust", f"{ours}.pub").exit_code == 6
    assert "2 signatures" in dsc(*again, "--trust", f"{theirs}.pub").stdout


def test_unpack_refuses_engines_without_trust_and_older_bundles(tmp_path: Path, bundle: Bundle, dsc: Program) -> None:
    packed, out = tmp_path / "b4.dscb", tmp_path / "out"
    dsc("pack", bundle.path, "--revision", 2)
    refused = dsc("unpack", packed, "--output", out)
    assert refused.exit_code == 6
    assert "--allow-unsigned" in refused.stderr
    assert not out.exists()
    assert dsc("unpack", packed, "--output", out, "--allow-unsigned").exit_code == 0

    dsc("pack", bundle.path, "--revision", 1)
    older = dsc("unpack", packed, "--output", out, "--allow-unsigned")
    assert (older.exit_code, "--allow-older" in older.stderr) == (6, True)
    assert dsc("unpack", packed, "--output", out, "--allow-unsigned", "--allow-older").exit_code == 0


def test_verify_names_every_fault_and_exits_with_six(bundle: Bundle, dsc: Program) -> None:
    (bundle.path / NEW_ENGINE).write_bytes(b"x")
    (bundle.path / "onnx/weights.data").unlink()
    done = dsc("verify", bundle.path)

    assert done.exit_code == 6
    assert f"{NEW_ENGINE}: has 1 bytes" in done.stdout
    assert "onnx/weights.data: is missing" in done.stdout
    assert "has 2 faults" in done.stderr

    done = dsc("verify", bundle.path, "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["ok"]) == (6, False)
    assert {row["path"] for row in document["rows"]} == {NEW_ENGINE, "onnx/weights.data"}


def test_verify_refuses_an_older_bundle_than_asked_for(bundle: Bundle, dsc: Program) -> None:
    assert dsc("verify", bundle.path, "--min-revision", bundle.manifest.revision).exit_code == 0
    done = dsc("verify", bundle.path, "--min-revision", bundle.manifest.revision + 1)

    assert (done.exit_code, "at least" in done.stdout) == (6, True)


def test_verify_says_whether_engines_load_here_and_times_hold(bundle: Bundle, dsc: Program) -> None:
    done = dsc("verify", bundle.path, "--here", "device")
    assert done.exit_code == 0
    assert "engines for this machine: no" in done.stdout
    assert "times taken on a machine like this: no" in done.stdout

    document = json.loads(dsc("verify", bundle.path, "--here", "server", "--json").stdout)
    assert document["ok"]
    assert document["here"]["target"] == "onnxruntime:cpu"
    assert document["here"]["loadable"]
    assert not document["here"]["timing_valid"]
    assert json.loads(dsc("verify", bundle.path, "--json").stdout)["here"] is None


def test_verify_of_nothing_is_wrong_usage(tmp_path: Path, dsc: Program) -> None:
    assert dsc("verify", tmp_path / "none").exit_code == 2
