"""Model repositories from packed bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.triton_plans import record_plans

from dsc_split.bundle import Bundle
from dsc_split.errors import BundleError, SignatureError, UsageError
from dsc_split.packing import Trust, generate_key, pack_bundle
from dsc_split.serving import export_triton

Make = Callable[[str], Bundle]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("side", [None, "server"])
def test_packed_bundle_gives_the_same_repository_as_its_folder(make: Make, tmp_path: Path, side: str | None) -> None:
    bundle = make("branches")
    pack_bundle(bundle, tmp_path / "b.dscb", side=side, with_onnx=True)

    export_triton(bundle, tmp_path / "models")
    export_triton(Bundle.open(tmp_path / "b.dscb"), tmp_path / "others")

    assert files_of(tmp_path / "models") == files_of(tmp_path / "others")


def test_packed_device_part_is_refused(make: Make, tmp_path: Path) -> None:
    pack_bundle(make("branches"), tmp_path / "b.dscb", side="device", with_onnx=True)

    with pytest.raises(UsageError, match="device's part"):
        export_triton(Bundle.open(tmp_path / "b.dscb"), tmp_path / "models")


def test_plans_of_a_packed_bundle_are_exported_when_a_trusted_key_signed_them(make: Make, tmp_path: Path) -> None:
    public = generate_key(tmp_path / "key")
    packed = tmp_path / "b.dscb"
    pack_bundle(record_plans(make("sequence"), {"8.6": "10.16.0.72"}), packed, side="server", sign=[tmp_path / "key"])

    with pytest.raises(SignatureError, match="native code"):
        export_triton(Bundle.open(packed), tmp_path / "models")
    assert not (tmp_path / "models").exists()

    trust = Trust(keys=(public,))
    result = export_triton(Bundle.open(packed, trust=trust), tmp_path / "models", target="tensorrt")
    assert result.backend == "tensorrt"


def test_server_part_without_graphs_says_how_to_get_them(make: Make, tmp_path: Path) -> None:
    pack_bundle(record_plans(make("sequence"), {"8.6": "10.16.0.72"}), tmp_path / "b.dscb", side="server")

    with pytest.raises(BundleError, match="--with-onnx"):
        export_triton(Bundle.open(tmp_path / "b.dscb"), tmp_path / "models", backend="onnxruntime")
