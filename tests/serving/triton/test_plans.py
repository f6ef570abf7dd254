"""The model repository that ``export_triton`` writes, with plans of TensorRT; what the library built is pretended."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.manifests import edited, targets_of
from tests.support.triton_plans import plan_bytes, record_plans

from dsc_split.bundle import Bundle
from dsc_split.engines._engine_file import PlanTensor
from dsc_split.errors import BundleError, EngineFileError, EngineMismatch, SignatureError, UsageError
from dsc_split.serving import TritonResult, export_triton

Make = Callable[[str], Bundle]

TRT = "10.16.0.72"


def config_of(result: TritonResult, index: int) -> str:
    return (result.folder / result.models[index].name / "config.pbtxt").read_text()


def rename_library(bundle: Bundle) -> None:
    """Let the targets be of TensorRT for RTX."""
    with edited(bundle) as document:
        for entry in targets_of(document, "server"):
            entry["target"] = "tensorrt-rtx:sm86"
            entry["fingerprint"]["library"] = "tensorrt_rtx"


def test_each_compute_capability_has_its_plan_and_no_other_gpu_has_one(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("branches"), {"8.9": TRT, "8.6": TRT})

    result = export_triton(bundle, tmp_path / "models", expect_trt=TRT)

    assert result.backend == "tensorrt"
    assert result.tensorrt_versions == (TRT,)
    graphs = [bundle.manifest.model.path, *(split.tail for split in bundle.splits)]
    for index, (model, graph) in enumerate(zip(result.models, graphs, strict=True)):
        folder = result.folder / model.name / "1"
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
            "model_cc86.plan": plan_bytes(graph, "8.6"),
            "model_cc89.plan": plan_bytes(graph, "8.9"),
        }
        text = config_of(result, index)
        assert 'cc_model_filenames {\n  key: "8.6"\n  value: "model_cc86.plan"\n}' in text
        assert 'cc_model_filenames {\n  key: "8.9"\n  value: "model_cc89.plan"\n}' in text
        assert 'backend: "tensorrt"' in text
        assert "default_model_filename" not in text
        assert "platform" not in text


def test_largest_batch_is_what_every_plan_takes(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("branches"), {"8.6": TRT}, profile=(1, 8, 32))
    bundle = record_plans(bundle, {"8.9": TRT}, profile=(2, 8, 16))

    result = export_triton(bundle, tmp_path / "models")

    assert {model.max_batch for model in result.models} == {16}
    assert any("no batch smaller than 2" in note for note in result.notes)
    limited = export_triton(bundle, tmp_path / "models", max_batch=8)
    assert {model.max_batch for model in limited.models} == {8}


def test_of_an_engine_per_batch_the_largest_is_taken(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("branches"), {"8.6": TRT}, per_batch=(1, 8, 4))

    result = export_triton(bundle, tmp_path / "models")

    assert {model.max_batch for model in result.models} == {8}
    assert {tuple(model.files) for model in result.models} == {("1/model_cc86.plan",)}


def test_two_plans_of_one_capability_are_both_named_and_either_can_be_chosen(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.9": TRT}, gpu="L4")
    bundle = record_plans(bundle, {"8.9": TRT}, gpu="L40S")
    first, second = (entry.id for entry in bundle.manifest.targets.server)

    with pytest.raises(UsageError, match=re.escape(f"--target {first} or --target {second}")) as caught:
        export_triton(bundle, tmp_path / "models")
    assert f"engines/{first}/" in str(caught.value)
    assert f"engines/{second}/" in str(caught.value)

    assert len(export_triton(bundle, tmp_path / "models", target=second).models) == 2


def test_target_that_was_asked_for_last_is_served(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT})
    with edited(bundle) as document:
        targets_of(document, "server").append(
            {"target": "onnxruntime:cpu", "fingerprint": {"library": "onnxruntime"}, "id": "onnxruntime-cpu-0"}
        )

    assert export_triton(bundle, tmp_path / "models").backend == "onnxruntime"
    assert export_triton(bundle, tmp_path / "models", target="tensorrt").backend == "tensorrt"
    assert export_triton(bundle, tmp_path / "models", backend="tensorrt").backend == "tensorrt"
    assert export_triton(bundle, tmp_path / "models", target="onnxruntime:cpu").backend == "onnxruntime"


def test_plans_of_tensorrt_for_rtx_are_refused_with_the_ways_out(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT})
    rename_library(bundle)

    for target in (None, "tensorrt-rtx:sm86", "tensorrt-rtx:sm75"):
        with pytest.raises(UsageError, match="TensorRT for RTX") as caught:
            export_triton(bundle, tmp_path / "models", target=target)
        assert "--onnx" in str(caught.value)
        assert "dsc-split build BUNDLE --side server --target tensorrt" in str(caught.value)

    assert export_triton(bundle, tmp_path / "models", backend="onnxruntime").backend == "onnxruntime"


def test_plan_whose_own_header_is_of_tensorrt_for_rtx_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT}, library="tensorrt_rtx")

    with pytest.raises(UsageError, match="TensorRT for RTX"):
        export_triton(bundle, tmp_path / "models")


def test_plan_of_another_tensorrt_than_expected_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.6": "10.15.1.29"})

    with pytest.raises(EngineMismatch, match=r"10\.15\.1\.29; 10\.16\.0\.72 was expected"):
        export_triton(bundle, tmp_path / "models", expect_trt=TRT)
    assert not (tmp_path / "models").exists()


def test_plans_of_several_versions_are_pointed_out(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT, "8.9": "10.15.1.29"})

    result = export_triton(bundle, tmp_path / "models")

    assert result.tensorrt_versions == ("10.15.1.29", TRT)
    assert any("10.15.1.29 and 10.16.0.72" in note for note in result.notes)


def test_graph_that_could_not_be_built_is_left_out_with_the_reason(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")
    tail = bundle.splits[0].tail

    partly = record_plans(record_plans(bundle, {"8.6": TRT}), {"8.9": TRT}, without=(tail,))
    result = export_triton(partly, tmp_path / "models")
    assert [len(model.files) for model in result.models] == [2, 1]
    assert any("no kernel" in note for note in result.notes)

    (only,) = [entry for entry in partly.manifest.targets.server if entry.failures]
    result = export_triton(partly, tmp_path / "others", target=only.id)
    assert [model.choice for model in result.models] == ["full-offload"]
    assert "no kernel" in result.left_out["a"]


def test_target_that_nothing_was_built_for_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")

    for target, backend in (("tensorrt", None), (None, "tensorrt")):
        with pytest.raises(UsageError, match="nothing was built for target 'tensorrt:cuda'"):
            export_triton(bundle, tmp_path / "models", target=target, backend=backend)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph_digest": 64 * "0"}, "another graph"),
        ({"outputs": (PlanTensor(name="y", dtype="float16", shape=(1,)),)}, "float16"),
        ({"build_fingerprint": {"compute_capability": "7.5"}}, "7.5"),
    ],
)
def test_plan_that_is_not_of_the_bundles_graph_is_refused(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT}, **changes)

    with pytest.raises(EngineFileError, match=message):
        export_triton(bundle, tmp_path / "models")


def test_plan_that_was_changed_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT})
    path = bundle.file(bundle.manifest.targets.server[0].built[0].path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(BundleError, match="SHA-256"):
        export_triton(bundle, tmp_path / "models")


def test_plan_of_a_packed_bundle_needs_trust_before_it_is_read(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = record_plans(make("sequence"), {"8.6": TRT})
    bundle.trusted = False
    read: list[str] = []
    monkeypatch.setattr(Bundle, "read", lambda self, relative: read.append(relative))

    with pytest.raises(SignatureError, match="native code"):
        export_triton(bundle, tmp_path / "models")

    assert read == []
