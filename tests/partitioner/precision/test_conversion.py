"""Bundles in float16: what the manifest says, what is stored, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import UNSET
from tests.support.manifests import document_of, stated, write_document

from dsc_split._support.progress import Progress
from dsc_split._support.records import to_document
from dsc_split.bundle import Bundle
from dsc_split.errors import BundleError, ExportError, UsageError
from dsc_split.partitioner import CutList, CutOptions, ExportOptions, SourceOptions, export_bundle
from dsc_split.partitioner.proof._reference import open_session, run_session

Save = Callable[[str], Path]
Cuts = Callable[..., CutList]

# x(64) -Conv= a(128) -MaxPool= b(32) -Relu= c(32) -MaxPool= d(8) -Flatten= e(8) -Neg- y
NET = """<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 1, 8, 8] x) => (float[batch, 8] y) <float[2, 1, 1, 1] w = {0.5, -2.0}> {
    a = Conv(x, w)
    b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
    c = Relu(b)
    d = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)
    e = Flatten(d)
    y = Neg(e)
}"""

HALF = NET.replace("float[", "float16[").replace("{0.5, -2.0}", "{14336, 49152}")
"""The same in float16; its weights are written as bits."""


def options(cuts: str | None = None, **more: Any) -> ExportOptions:
    return ExportOptions(source=SourceOptions(max_batch=3), cut=CutOptions(cuts=cuts), **more)


def test_float16_bundle_says_what_the_conversion_did(save: Save, tmp_path: Path) -> None:
    wide = export_bundle(str(save(NET)), tmp_path / "wide", options("all"))
    half = export_bundle(str(save(NET)), tmp_path / "half", options("all", precision="fp16"))

    assert half.manifest.precision == "fp16"
    conversion = to_document(stated(half.manifest.conversion))
    assert 0 < conversion.pop("max_rel_error") < 2e-3
    assert 0 < conversion.pop("max_abs_error") < 2e-2
    assert conversion == {
        "from": "fp32",
        "io_precision": "fp16",
        "weights_converted": 2,
        "weights_overflowed": 0,
        "weights_vanished": 0,
        "kept_float32": (),
    }
    assert [info.dtype for info in (*half.inputs, *half.outputs)] == ["float16", "float16"]
    assert [split.name for split in half.splits] == [split.name for split in wide.splits]
    assert [split.size_bytes(1) * 2 for split in half.splits] == [split.size_bytes(1) for split in wide.splits]
    assert wide.manifest.conversion is UNSET
    assert sorted(path.name for path in half.path.iterdir()) == ["manifest.json", "onnx", "samples"]
    assert half.manifest.pair_id != wide.manifest.pair_id


def test_golden_samples_are_those_of_the_float16_graph(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options(precision="fp16"))
    whole, part = (np.load(bundle.path / "samples" / f"{name}.npz") for name in ("model", "b"))

    assert {str(array.dtype) for array in (*whole.values(), *part.values())} == {"float16"}
    answer = run_session(open_session(bundle.model_path), {"x": whole["input:x"]}, "the whole")
    np.testing.assert_array_equal(answer["y"], whole["output:y"])


def test_float16_graph_with_float32_inputs_and_outputs_casts_inside(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options(precision="fp16", io_precision="fp32"))

    assert [info.dtype for info in (*bundle.inputs, *bundle.outputs)] == ["float32", "float32"]
    assert stated(bundle.manifest.conversion).io_precision == "fp32"
    assert {tensor.dtype for split in bundle.splits for tensor in split.tensors} == {"float16"}


def test_float16_graph_takes_8_bit_images(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(
        str(save(NET)), tmp_path / "out", options(precision="fp16", uint8_input=True, mean=(0.5,), std=(0.25,))
    )

    assert [info.dtype for info in (*bundle.inputs, *bundle.outputs)] == ["uint8", "float16"]
    assert stated(bundle.manifest.conversion).weights_converted == 4


def test_real_inputs_become_float16(save: Save, tmp_path: Path) -> None:
    image = np.full((2, 1, 8, 8), 0.1, "f4")
    np.savez(tmp_path / "real.npz", x=image)
    bundle = export_bundle(
        str(save(NET)),
        tmp_path / "out",
        ExportOptions(source=SourceOptions(max_batch=3, sample=tmp_path / "real.npz"), precision="fp16"),
    )

    golden = np.load(bundle.path / "samples" / "model.npz")["input:x"]
    np.testing.assert_array_equal(golden, image.astype("f2"))


def test_weights_are_stored_in_float16_alone(save: Save, tmp_path: Path) -> None:
    numbers = ", ".join(["0.125"] * 1024)
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 32] x) => (float[batch, 32] y) <float[32, 32] w = {{{numbers}}}> {{
        a = MatMul(x, w)
        y = MatMul(a, w)
    }}"""
    bundle = export_bundle(str(save(text)), tmp_path / "out", options("all", precision="fp16"))

    assert bundle.manifest.files["onnx/weights.data"].size_bytes == 2048
    assert stated(bundle.manifest.conversion).weights_converted == 1024


def test_graph_that_is_float16_already_stays_as_it_is(save: Save, tmp_path: Path) -> None:
    asked = export_bundle(str(save(HALF)), tmp_path / "asked", options(precision="fp16"))
    plain = export_bundle(str(save(HALF)), tmp_path / "plain", options())

    assert asked.manifest.precision == plain.manifest.precision == "fp16"
    assert asked.manifest.conversion is UNSET
    assert asked.manifest.files["onnx/model.onnx"] == plain.manifest.files["onnx/model.onnx"]


@pytest.mark.parametrize(
    ("text", "asked", "message"),
    [
        (HALF, {"precision": "fp32"}, "16-bit floats, and what they lost"),
        (HALF, {"precision": "fp16", "io_precision": "fp32"}, "float16 already"),
        (NET.replace("float[", "double["), {"precision": "fp16"}, "nothing in the graph is float32"),
        (NET, {"io_precision": "fp32"}, "goes with --precision fp16 only"),
        (NET, {"precision": "int8"}, "--precision is 'int8'; fp32 or fp16 is expected"),
        (NET, {"precision": "fp16", "io_precision": "half"}, "--io-precision is 'half'; fp32 or fp16"),
    ],
)
def test_precision_that_does_not_fit_is_refused(
    save: Save, tmp_path: Path, text: str, asked: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export_bundle(str(save(text)), tmp_path / "out", options(**asked))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_graph_of_which_nothing_can_be_float16_is_refused(save: Save, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 8] x) => (float[batch, 8] y) { a = Celu(x)\n y = Celu(a) }"""

    with pytest.raises(ExportError, match=r"nothing in the graph can be computed in float16 \(Celu stay float32\)"):
        export_bundle(str(save(text)), tmp_path / "out", options(precision="fp16", io_precision="fp32"))


# x -Mul= a -Mul= b(beyond float16) -Mul= y(small again in float32)
HOT = """<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 8] x) => (float[batch, 8] y) <float large = {3000.0}, float small = {0.0001}> {
    a = Mul(x, large)
    b = Mul(a, large)
    c = Relu(b)
    d = Neg(c)
    y = Mul(d, small)
}"""


def test_value_that_float16_cannot_hold_is_named(save: Save, tmp_path: Path) -> None:
    text = HOT.replace("0.0001", "0.5")

    with pytest.raises(ExportError, match="output 'y' is not finite") as caught:
        export_bundle(str(save(text)), tmp_path / "out", options(precision="fp16"))

    assert "The first value that float16 loses is 'b', made by Mul" in str(caught.value)
    assert "--precision fp32" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def add(constant: str) -> str:
    return f"""<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 8] x) => (float[batch, 8] y) <float c = {{{constant}}}> {{ a = Relu(x)\n y = Add(a, c) }}"""


def test_weights_beyond_float16_are_noted(save: Save, tmp_path: Path) -> None:
    text = add("-3.4028235e38").replace("Add", "Max")

    bundle = export_bundle(str(save(text)), tmp_path / "out", options(precision="fp16"))

    assert stated(bundle.manifest.conversion).weights_overflowed == 1
    assert "weights beyond float16, 1 of them, became its largest, 65504, in 'c'" in stated(bundle.manifest.notes)


def test_float16_that_is_somewhat_off_is_noted_and_logged(
    save: Save, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = export_bundle(str(save(add("70000.0"))), tmp_path / "out", options(precision="fp16"))

    note = "float16 is off by 0.064 of the largest value of output 'y'"
    assert note in stated(bundle.manifest.notes)
    assert note in caplog.text


def test_float16_that_is_far_off_is_refused_with_what_is_known(save: Save, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"off by 0\.93 of the largest value of output 'y'; at most 0\.1") as caught:
        export_bundle(str(save(add("1e6"))), tmp_path / "out", options(precision="fp16"))

    assert "became its largest, 65504, in 'c'. Export the model with --precision fp32" in str(caught.value)
    assert "--sample" in str(caught.value)


# x(float16) -Relu- a -Cast- b(float32) -Conv- c -Neg- d -Cast- y(float16)
MIXED = """<ir_version: 8, opset_import: ["" : 17]>
net (float16[batch, 1, 8, 8] x) => (float16[batch, 2, 8, 8] y) <float[2, 1, 1, 1] w = {0.5, -2.0}> {
    a = Relu(x)
    b = Cast<to = 1>(a)
    c = Conv(b, w)
    d = Neg(c)
    y = Cast<to = 10>(d)
}"""


def test_what_is_float32_in_a_float16_graph_is_converted(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(MIXED)), tmp_path / "out", options("all", precision="fp16"))

    assert stated(bundle.manifest.conversion).weights_converted == 2
    assert {tensor.dtype for split in bundle.splits for tensor in split.tensors} == {"float16"}


@pytest.mark.parametrize("io_precision", [None, "fp32"])
@pytest.mark.parametrize("text", [NET, NET.replace("c = Relu", "c = Celu")])
def test_graph_that_was_converted_before_stays_as_it_is(
    save: Save, tmp_path: Path, io_precision: str | None, text: str
) -> None:
    asked = options("all", precision="fp16", io_precision=io_precision)
    once = export_bundle(str(save(text)), tmp_path / "once", asked)
    twice = export_bundle(str(once.model_path), tmp_path / "twice", asked)

    assert twice.manifest.conversion is UNSET
    assert [split.name for split in twice.splits] == [split.name for split in once.splits]


def test_inputs_and_outputs_of_a_float16_graph_become_float16_unless_told_otherwise(save: Save, tmp_path: Path) -> None:
    once = export_bundle(str(save(NET)), tmp_path / "once", options(precision="fp16", io_precision="fp32"))
    bundle = export_bundle(str(once.model_path), tmp_path / "twice", options(precision="fp16"))

    assert [info.dtype for info in (*bundle.inputs, *bundle.outputs)] == ["float16", "float16"]


# ---- casts are no cuts -------------------------------------------------------------------------------------


def test_casts_of_inputs_and_outputs_are_no_pairs(save: Save, tmp_path: Path) -> None:
    bundles = [
        export_bundle(str(save(NET)), tmp_path / str(precision), options("all", precision=precision, io_precision=io))
        for precision, io in ((None, None), ("fp16", "fp32"))
    ]

    names = [[split.name for split in bundle.splits] for bundle in bundles]
    assert names[0] == names[1] != []


def test_casts_at_both_ends_are_left_out_and_change_no_name(cuts: Cuts) -> None:
    # x -Cast- f -Relu= a -Cast= c -Neg= b -Cast- h -Cast- y
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 8] x) => (float[batch, 8] y) {
        f = Cast<to = 10>(x)
        a = Relu(f)
        c = Cast<to = 1>(a)
        b = Neg(c)
        h = Cast<to = 10>(b)
        y = Cast<to = 1>(h)
    }"""

    assert [cut.name for cut in cuts(text).cuts] == ["a", "c"]


def test_casts_and_shapes_alone_make_no_cut(cuts: Cuts) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 8] x) => (float16[batch, 8] y, int64[2] s) {
        s = Shape(x)
        d = Cast<to = 11>(x)
        y = Cast<to = 10>(d)
    }"""

    assert cuts(text).cuts == ()


def test_random_graph_is_converted_without_an_error_to_state(save: Save, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 8] x) => (float[batch, 8] y) { a = Relu(x)\n r = RandomNormalLike(a)\n y = Add(a, r) }"""
    bundle = export_bundle(str(save(text)), tmp_path / "out", options(precision="fp16"))

    assert stated(bundle.manifest.conversion).max_rel_error is None


def test_float16_that_chooses_another_class_is_noted(save: Save, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 2] x) => (int64[batch] y, float[batch, 2] b)
    <float[2] near = {1024.0, 1024.25}, float tiny = {0.01}> {
        a = Mul(x, tiny)
        b = Add(a, near)
        y = ArgMax<axis = 1, keepdims = 0>(b)
    }"""
    bundle = export_bundle(str(save(text)), tmp_path / "out", options(precision="fp16"))

    assert "output 'y' is not the same as in float32 on every input that was tried" in stated(bundle.manifest.notes)


def test_float32_files_are_gone_before_pairs_are_cut_and_after_an_interruption(save: Save, tmp_path: Path) -> None:
    seen: dict[str, bool] = {}

    def watch(step: Progress) -> None:
        seen[step.stage + step.label] = any(tmp_path.glob(".out.*.partial/.fp32"))
        if step.stage == "cut":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(str(save(NET)), tmp_path / "out", options(precision="fp16"), progress=watch)

    assert seen["provethe graph in float16"]
    assert not seen["cutb"]
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights_vanished", -1), ("io_precision", "int8"), ("max_rel_error", "small"), ("kept_float32", [{"name": 1}])],
)
def test_damaged_conversion_is_refused_by_its_place(save: Save, tmp_path: Path, key: str, value: object) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options(precision="fp16"))
    document = document_of(bundle)
    document["conversion"][key] = value
    write_document(bundle, document)

    with pytest.raises(BundleError, match=f"conversion.{key}"):
        Bundle.open(bundle.path)


def test_command_converts_and_says_so(save: Save, tmp_path: Path, dsc: Callable[..., Any]) -> None:
    arguments = ("--precision", "fp16", "--io-precision", "fp32", "--max-batch", 3, "--cuts", "b", "--json")

    done = dsc("export", save(NET), "--output", tmp_path / "out", *arguments)

    assert done.exit_code == 0
    assert json.loads(done.stdout)["conversion"]["io_precision"] == "fp32"
    assert dsc("export", save(NET), "--output", tmp_path / "no", "--precision", "fp8").exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize("source", ["mobilenet_v3_small", "resnet18", "efficientnet_b0"])
def test_real_model_has_the_same_pairs_in_float16(tmp_path: Path, source: str) -> None:
    single = export_bundle(f"torchvision:{source}", tmp_path / "fp32", options())
    half = export_bundle(str(single.path / "onnx" / "model.onnx"), tmp_path / "fp16", options(precision="fp16"))

    assert [split.name for split in half.splits] == [split.name for split in single.splits] != []
    assert single.manifest.failed_splits == half.manifest.failed_splits == ()
    assert all(stated(split.max_rel_error) <= 1e-5 for split in single.splits)
    assert stated(stated(half.manifest.conversion).max_rel_error) < 0.01
