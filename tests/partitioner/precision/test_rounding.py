"""Float16 as a device computes it: every rounding happens, and what overflows on the way is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from dsc_split.errors import ExportError
from dsc_split.partitioner import ExportOptions, SourceOptions, export_bundle

Save = Callable[[str], Path]

HALF = ExportOptions(source=SourceOptions(max_batch=3), precision="fp16")

HEADER = '<ir_version: 8, opset_import: ["" : 17, "own" : 1]>\n'


def test_value_that_overflows_and_becomes_small_again_is_named(save: Save, tmp_path: Path) -> None:
    text = (
        HEADER
        + """net (float[batch, 1, 4, 4] x) => (float[batch, 1, 4, 4] y)
        <float[1, 1, 2, 2] w = {20000.0, 20000.0, 20000.0, 20000.0}, float small = {0.00001}> {
            a = Conv<pads = [1, 1, 0, 0]>(x, w)
            y = Mul(a, small)
        }"""
    )

    with pytest.raises(ExportError, match="The first value that float16 loses is 'a', made by Conv"):
        export_bundle(str(save(text)), tmp_path / "out", HALF)


# 400 x squared is beyond float16, and x / infinity is 0
NORM = """
    b{0} = Mul({1}, {1})
    c{0} = ReduceMean<axes = [1]>(b{0})
    d{0} = Sqrt(c{0})
    {2} = Div({1}, d{0})
"""
PLAIN = (
    "net (float[batch, 8] x) => (float[batch, 8] y) <float large = {400.0}> { a = Mul(x, large)\n"
    + NORM.format("", "a", "y")
    + "}"
)
BODY = (
    """net (float[batch, 8] x, bool[1] way) => (float[batch, 8] y) <float large = {400.0}> {
    a = Mul(x, large)
    y = If(way)<then_branch = t () => (float[n, 8] p) {"""
    + NORM.format(1, "a", "p")
    + "}, else_branch = e () => (float[n, 8] q) {"
    + NORM.format(2, "a", "q")
    + "}> }"
)
FUNCTION = (
    """net (float[batch, 8] x) => (float[batch, 8] y) <float large = {400.0}> {
    a = Mul(x, large)
    y = own.norm(a)
}
<domain: "own", opset_import: ["" : 17]>
norm (u) => (v) {"""
    + NORM.format("", "u", "v")
    + "}"
)


@pytest.mark.parametrize("text", [PLAIN, BODY, FUNCTION], ids=["graph", "body", "function"])
def test_overflow_that_leaves_a_finite_answer_is_seen_in_every_scope(save: Save, tmp_path: Path, text: str) -> None:
    with pytest.raises(ExportError, match="float16 is off by 1 of the largest value of output 'y'"):
        export_bundle(str(save(HEADER + text)), tmp_path / "out", HALF)


def test_roundings_are_kept_for_the_measure_alone(save: Save, tmp_path: Path) -> None:
    text = HEADER + "net (float[batch, 8] x) => (float[batch, 8] y) { a = Relu(x)\n b = Neg(a)\n y = Exp(b) }"

    bundle = export_bundle(str(save(text)), tmp_path / "out", HALF)

    graph = onnx.load(str(bundle.model_path)).graph
    assert [node.op_type for node in graph.node] == ["Relu", "Neg", "Exp"]
