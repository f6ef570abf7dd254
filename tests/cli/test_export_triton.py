"""``dsc-split export-triton``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.triton_networks import sequence
from tests.support.triton_plans import record_plans

from dsc_split.bundle import Bundle
from dsc_split.partitioner import CutOptions, ExportOptions, export_bundle


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    options = ExportOptions(cut=CutOptions(cuts="a", prove=False))
    return export_bundle(str(sequence(folder / "sequence.onnx")), folder / "b", options).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(exported, tmp_path / "b"))


def test_models_are_listed(dsc: Callable[..., Any], bundle: Bundle, tmp_path: Path) -> None:
    outcome = dsc("export-triton", bundle.path, tmp_path / "models")

    assert outcome.exit_code == 0, outcome.stderr
    digits = bundle.manifest.pair_id.removeprefix("sha256:")[:12]
    assert f"sequence-{digits}-a-tail" in outcome.stdout
    assert f"sequence-{digits}-full" in outcome.stdout
    assert "2 models, ONNX" in outcome.stderr


def test_json_is_one_document_with_all_options_taken(dsc: Callable[..., Any], bundle: Bundle, tmp_path: Path) -> None:
    record_plans(bundle, {"8.6": "10.16.0.72"})
    options = ["--target", "tensorrt", "--expect-trt", "10.16.0.72", "--instances", 2, "--max-queue-delay", 500]

    outcome = dsc("export-triton", bundle.path, tmp_path / "models", *options, "--json")

    document = json.loads(outcome.stdout)
    assert document["backend"] == "tensorrt"
    assert document["tensorrt_versions"] == ["10.16.0.72"]
    assert document["folder"] == str(tmp_path / "models")
    assert [model["choice"] for model in document["models"]] == ["full-offload", "a"]
    assert "count: 2" in (tmp_path / "models" / document["models"][0]["name"] / "config.pbtxt").read_text()


def test_onnx_is_served_whatever_was_built(dsc: Callable[..., Any], bundle: Bundle, tmp_path: Path) -> None:
    record_plans(bundle, {"8.6": "10.16.0.72"})

    outcome = dsc("export-triton", bundle.path, tmp_path / "models", "--onnx", "--json")

    assert json.loads(outcome.stdout)["backend"] == "onnxruntime"


def test_plans_of_another_tensorrt_end_with_exit_code_6(
    dsc: Callable[..., Any], bundle: Bundle, tmp_path: Path
) -> None:
    record_plans(bundle, {"8.6": "10.15.1.29"})

    outcome = dsc("export-triton", bundle.path, tmp_path / "models", "--expect-trt", "10.16.0.72")

    assert outcome.exit_code == 6
    assert "10.15.1.29" in outcome.stderr


def test_choices_that_are_left_out_are_warned_of(dsc: Callable[..., Any], bundle: Bundle, tmp_path: Path) -> None:
    record_plans(bundle, {"8.6": "10.16.0.72"}, without=(bundle.splits[0].tail,))

    outcome = dsc("export-triton", bundle.path, tmp_path / "models")

    assert outcome.exit_code == 0
    assert "warning: 'a' is left out, and requests for it will fail: no plan" in outcome.stderr
    assert "no kernel" in outcome.stderr


def test_plans_of_a_packed_bundle_need_a_trusted_signature(
    dsc: Callable[..., Any], bundle: Bundle, tmp_path: Path
) -> None:
    record_plans(bundle, {"8.6": "10.16.0.72"})
    key, packed = tmp_path / "key", tmp_path / "b.dscb"
    assert dsc("keygen", key).exit_code == 0
    assert dsc("pack", bundle.path, "--side", "server", "--sign", key, "--output", packed).exit_code == 0

    refused = dsc("export-triton", packed, tmp_path / "models")
    assert refused.exit_code == 6
    assert "--trust PUBLIC_KEY" in refused.stderr

    assert dsc("export-triton", packed, tmp_path / "models", "--trust", f"{key}.pub").exit_code == 0
