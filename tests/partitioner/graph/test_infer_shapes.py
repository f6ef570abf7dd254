"""Shapes that no file states: what a run may tell, and what it may not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsc_split.bundle import Bundle
from dsc_split.errors import ModelFileError, UsageError
from dsc_split.partitioner import CutList

Cuts = Callable[..., CutList]
Export = Callable[..., Bundle]

HEADER = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>\n'


def test_detections_are_not_taken_for_as_many_as_one_run_found(cuts: Cuts) -> None:
    # Made-up inputs give no detection at all, and a cut of no bytes would be the best there is.
    text = (
        HEADER
        + """net (float[batch, 6, 4] boxes, float[batch, 1, 6] scores) => (float[n, 3] y)
    <int64 most = {5}, float overlap = {0.5}, float limit = {1000.0}> {
        s = Relu(scores)
        found = NonMaxSuppression(boxes, s, most, overlap, limit)
        f = Cast<to = 1>(found)
        y = Neg(f)
    }"""
    )
    refused = {cut.name: cut.reason for cut in cuts(text, max_tensors=2).cuts if cut.refused}

    assert list(refused) == ["found", "f"]
    assert "depends on the data" in refused["found"]


def test_size_computed_from_values_is_not_taken_for_a_constant(cuts: Cuts) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[batch, k] y) <int64[1] end = {4}, int64[1] one = {1}> {
        a = Relu(x)
        m = ReduceMin<keepdims = 0, axes = [0, 1]>(a)
        i = Cast<to = 7>(m)
        start = Reshape(i, one)
        s = Slice(x, start, end, one)
        y = Neg(s)
    }"""
    )
    refused = [cut.name for cut in cuts(text, max_tensors=2).cuts if cut.refused]

    assert refused == ["s"]


def test_shape_that_inference_does_not_find_is_still_observed(cuts: Cuts) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[batch, 4] y) {
        a = Relu(x)
        b = com.microsoft.QuickGelu(a)
        y = Neg(b)
    }"""
    )

    assert [(cut.name, cut.size_bytes) for cut in cuts(text).cuts] == [("a", 16), ("b", 16)]


def test_output_that_needs_the_batch_which_nothing_shows_refuses_the_cut_alone(export: Export, cuts: Cuts) -> None:
    # x -ReduceSum(batch)= m -Relu= r -Neg- y       zeros is as large as x, and depends on nothing in it
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[1, 4] y, float[batch, 4] zeros) <int64[1] first = {0}> {
        s = Shape(x)
        zeros = ConstantOfShape(s)
        a = Neg(x)
        m = ReduceSum<keepdims = 1>(a, first)
        r = Relu(m)
        y = Neg(r)
    }"""
    )
    reasons = {cut.name: cut.reason for cut in cuts(text).cuts if cut.refused}

    assert list(reasons) == ["m", "r"]
    assert "needs the batch size" in reasons["m"]
    assert [split.name for split in export(text).splits] == ["a"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("net (string[batch, 2] x) => (string[batch, 2] y) { y = Identity(x) }", "input 'x' holds strings"),
        (
            "net (float[batch, 2] x) => (seq(float[batch, 2]) s) { s = SequenceConstruct(x, x) }",
            "output 's' is no tensor",
        ),
    ],
)
def test_what_cannot_be_fed_or_compared_is_refused_by_name(cuts: Cuts, text: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        cuts(HEADER + text)


def test_input_without_a_shape_is_not_taken_for_a_scalar(cuts: Cuts) -> None:
    text = HEADER + "net (float x) => (float y) { a = Relu(x) y = Neg(a) }"

    assert cuts(text).input_elements == 1
    with pytest.raises(UsageError, match=r"shape of input 'x' is not stated.*--input-shape x="):
        cuts(text.replace("float x", "float[] x"))
