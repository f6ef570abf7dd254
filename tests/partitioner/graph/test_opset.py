"""Graphs of a higher opset than a target parses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from tests.support.manifests import stated

from dsc_split.bundle import Bundle
from dsc_split.errors import ExportError, UsageError
from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, export_bundle
from dsc_split.partitioner import _export as export_module
from dsc_split.partitioner.graph._opset import fit_opset

Save = Callable[[str], Path]

LIMITS = {"tensorrt": 20, "tensorrt-rtx:sm75": 25}


def net(opset: int, body: str, inputs: str = "float[batch, 4] x", outputs: str = "float[batch, 4] y") -> str:
    return f'<ir_version: 10, opset_import: ["" : {opset}]>\ng ({inputs}) => ({outputs}) {body}'


def parse(opset: int, body: str, **borders: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(net(opset, body, **borders)))


PLAIN = "<float[4, 4] w> { a = MatMul(x, w)\n b = Relu(a)\n c = Cast<to = 1>(b)\n y = Reshape(c, s) }".replace(
    "<float[4, 4] w>", f"<float[4, 4] w = {{{', '.join(map(str, range(16)))}}}, int64[2] s = {{0, 4}}>"
)


@pytest.mark.parametrize("opset", [21, 22, 23, 24, 25])
def test_op_that_only_takes_more_types_is_the_same_in_the_lower_opset(opset: int) -> None:
    model = parse(opset, PLAIN)
    before = [str(node) for node in model.graph]

    assert fit_opset(model, LIMITS)

    assert model.opset_imports[""] == 20
    assert [str(node) for node in model.graph] == before
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)


@pytest.mark.parametrize("limits", [{}, {"tensorrt": 20}, {"tensorrt": 25}])
def test_graph_that_is_parsed_as_it_is_is_not_touched(limits: dict[str, int]) -> None:
    model = parse(20, PLAIN)

    assert not fit_opset(model, limits)
    assert model.opset_imports[""] == 20


def test_attribute_that_came_later_is_dropped_where_it_says_what_was_meant_before() -> None:
    model = parse(24, '{ y = Cast<to = 10, round_mode = "up">(x) }', outputs="float16[batch, 4] y")

    assert fit_opset(model, LIMITS)
    assert list(next(iter(model.graph)).attributes) == ["to"]


@pytest.mark.parametrize(
    ("opset", "body", "reason"),
    [
        (24, "{ y = Swish(x) }", "it came with opset 24"),
        (23, "<float[4] s = {1, 2, 3, 4}> { y = RMSNormalization(x, s) }", "it came with opset 23"),
        (
            21,
            "<float[4] s = {1, 2, 3, 4}> { y = GroupNormalization<num_groups = 2>(x, s, s) }",
            "it meant something else before opset 21",
        ),
        (24, '{ y = Cast<to = 10, round_mode = "down">(x) }', "its attribute 'round_mode' came later"),
        (
            21,
            "<float[4] s = {1, 1, 1, 1}, int8[4] z = {0, 0, 0, 0}> { q = QuantizeLinear<block_size = 2>(x, s, z)\n"
            " y = DequantizeLinear<block_size = 2>(q, s, z) }",
            "its attribute 'block_size' came later",
        ),
        (
            23,
            "<int64 one = {1}> { c = Cast<to = 9>(x)\n"
            " y = If(c)<then_branch = t () => (float[n, 4] p) { p = RMSNormalization(x, x) },"
            " else_branch = e () => (float[n, 4] q) { q = Relu(x) }> }",
            "it came with opset 23",
        ),
    ],
)
def test_op_without_conversion_is_refused_by_name_and_the_graph_stays(opset: int, body: str, reason: str) -> None:
    model = parse(opset, body)

    with pytest.raises(UsageError, match=reason) as caught:
        fit_opset(model, LIMITS)

    assert f"target 'tensorrt' parses ONNX up to opset 20, and the graph has opset {opset}" in str(caught.value)
    assert "Export the model with opset 20 or lower" in str(caught.value)
    assert model.opset_imports[""] == opset


def test_type_that_came_later_is_refused() -> None:
    model = parse(23, "{ c = Cast<to = 23>(x)\n y = Cast<to = 1>(c) }")
    next(iter(model.graph)).outputs[0].type = ir.TensorType(ir.DataType.FLOAT4E2M1)

    with pytest.raises(UsageError, match=r"its output 0 was no tensor\(float4e2m1\) then"):
        fit_opset(model, LIMITS)


def export(save: Save, folder: Path, text: str, **options: object) -> Bundle:
    return export_bundle(
        str(save(text)),
        folder / "out",
        ExportOptions(
            source=SourceOptions(max_batch=3),
            cut=CutOptions(cuts="all"),
            **options,  # type: ignore[arg-type]  # a test's shorthand
        ),
    )


def test_export_converts_down_and_proves_again(save: Save, tmp_path: Path) -> None:
    bundle = export(save, tmp_path, net(23, PLAIN), opset_limits=LIMITS)

    assert bundle.manifest.model.opset == {"": 20}
    assert "the graph was converted from opset 23 to 20" in stated(bundle.manifest.notes)
    for path in bundle.path.glob("onnx/*.onnx"):
        assert onnx.load(str(path)).opset_import[0].version == 20
    assert [split.name for split in bundle.splits] == ["a", "b", "c"]


def test_export_refuses_a_conversion_that_computes_something_else(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: ir.Model, limits: object) -> bool:
        next(node for node in model.graph if node.op_type == "Relu").op_type = "Abs"
        return True

    monkeypatch.setattr(export_module, "fit_opset", spoil)

    with pytest.raises(ExportError, match="converted down from opset 23, the graph does not compute"):
        export(save, tmp_path, net(23, PLAIN.replace("{0, 1,", "{-9, -9,")), opset_limits=LIMITS)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
