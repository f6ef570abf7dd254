"""``dsc-split cuts`` and ``cut`` on a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from dsc_split.bundle import Bundle
from dsc_split.partitioner import ExportOptions, SourceOptions, export_bundle
from dsc_split.partitioner.proof import _proof

NET = """<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 8] x) => (float[batch, 8] y) { a = Relu(x) b = Neg(a) y = Exp(b) }"""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    onnx.save(onnx.parser.parse_model(NET), str(tmp_path / "net.onnx"))
    options = ExportOptions(source=SourceOptions(max_batch=3))
    return export_bundle(str(tmp_path / "net.onnx"), tmp_path / "out", options)


def test_stated_input_bytes_count_for_a_bundle_too(dsc: Callable[..., Any], bundle: Bundle) -> None:
    outcome = dsc("cuts", bundle.path, "--input-bytes", 64, "--json")

    assert outcome.exit_code == 0
    found = json.loads(outcome.stdout)
    assert found["input_bytes"] == 64
    assert [cut["ratio"] for cut in found["cuts"]] == [0.5, 0.5]


@pytest.mark.parametrize("option", ["--input-shape", "--sample", "--weights"])
def test_options_of_a_source_do_not_go_with_a_bundle(dsc: Callable[..., Any], bundle: Bundle, option: str) -> None:
    outcome = dsc("cuts", bundle.path, option, "8")

    assert outcome.exit_code == 2
    assert f"{option} does not go with a bundle" in outcome.stderr


def test_seed_that_no_generator_takes_is_wrong_usage(dsc: Callable[..., Any]) -> None:
    outcome = dsc("cuts", "torchvision:alexnet", "--seed", 2**63)

    assert outcome.exit_code == 2
    assert "--seed" in outcome.stderr


def test_batch_whose_inputs_alone_are_too_large_is_not_tried(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(
        "dsc_split.partitioner.proof._reference.run_in_worker", lambda *arguments: tried.append(arguments[2])
    )

    largest, reason = _proof.largest_batch(bundle.model_path, bundle.inputs, 10**11, memory_bytes=32 * 1000)

    assert tried == [largest]
    assert largest <= 1000
    assert "inputs alone" in reason
