"""ONNX files from anywhere: which are taken, and what the others are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.manifests import stated

from dsc_split.bundle import Bundle
from dsc_split.errors import BackendError, DscError, ExportError, ModelFileError, UsageError
from dsc_split.partitioner import (
    CutOptions,
    ExportOptions,
    SourceOptions,
    cut_bundle,
    export_bundle,
    list_cuts,
    load_model,
)

Export = Callable[..., Bundle]


def conv_net(opset: int, batch: int | str | None, *, shapes: bool = True) -> onnx.ModelProto:
    """Make x -Conv- a -Relu- b -Flatten- c -Gemm- y, with a 2 kB weight."""
    rng = np.random.default_rng(0)
    weights = {"w": (8, 3, 5, 5), "fc": (8 * 4 * 4, 10)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("Gemm", ["c", "fc"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10] if shapes else None)],
        [numpy_helper.from_array(rng.standard_normal(shape).astype("f4"), name) for name, shape in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def export_all(path: Path, tmp_path: Path, *shapes: str, **options: object) -> Bundle:
    source = SourceOptions(input_shapes=shapes, max_batch=3, **options)  # type: ignore[arg-type]  # a test's shorthand
    return export_bundle(str(path), tmp_path / "out", ExportOptions(source=source, cut=CutOptions(cuts="all")))


@pytest.mark.parametrize("opset", [11, 13, 17, 20, 22])
@pytest.mark.parametrize("batch", ["N", None, 0, -1])
def test_any_opset_and_any_way_to_write_a_free_batch(tmp_path: Path, opset: int, batch: int | str | None) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(conv_net(opset, batch, shapes=False).SerializeToString())

    bundle = export_all(path, tmp_path)

    assert [split.name for split in bundle.splits] == ["a", "b", "c"]
    assert bundle.inputs[0].shape == ("batch", 3, 8, 8)
    assert bundle.splits[0].tensors[0].shape == ("batch", 8, 4, 4)
    assert {item.domain: item.version for item in onnx.load(str(bundle.path / bundle.splits[0].tail)).opset_import} == {
        "": opset
    }


def test_fixed_batch_is_the_only_one_that_is_proven(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(conv_net(17, 4).SerializeToString())

    bundle = export_all(path, tmp_path)

    assert bundle.fixed_batch == bundle.max_batch == 4
    assert stated(bundle.splits[0].proof).batches == (4,)
    assert bundle.splits[0].size_bytes(4) == 4 * 8 * 4 * 4 * 4
    assert list_cuts(str(path)).cuts[0].size_bytes == 8 * 4 * 4 * 4


def test_weights_beside_the_file_are_read_and_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(conv_net(17, "N"), str(path), save_as_external_data=True, location="net.bin", size_threshold=0)

    bundle = export_all(path, tmp_path)

    weights = bundle.path / "onnx" / "weights.data"
    assert weights.stat().st_size < 1.1 * (8 * 3 * 5 * 5 + 8 * 4 * 4 * 10) * 4
    assert bundle.splits[-1].max_abs_error == 0
    for split in bundle.splits:
        for part in (split.head, split.tail):
            assert (bundle.path / part).stat().st_size < 1500


def test_shapes_that_no_inference_finds_are_observed(tmp_path: Path) -> None:
    # The target of Reshape goes through float arithmetic, which ONNX's inference does not follow.
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 4] x) => (float[batch, 2] y) <float[2] half = {0.5, 0.5}, int64[1] one = {1}> {
        a = Relu(x)
        s = Shape(a)
        f = Cast<to = 1>(s)
        g = Mul(f, half)
        h = Add(g, g)
        i = Cast<to = 7>(h)
        b = Reshape(a, i)
        c = Neg(b)
        y = ReduceMax<axes = [1], keepdims = 0>(c)
    }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text.replace("float[batch, 2] y", "float[n] y")), str(path))

    cuts = list_cuts(str(path)).cuts

    assert [(cut.name, cut.tensors[0].info and cut.tensors[0].info.shape) for cut in cuts] == [
        (name, ("batch", 4)) for name in "abc"
    ]


def test_batch_may_stand_on_any_axis(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[T, N, 3] x) => (float[T, N, 3] y) { a = Relu(x) y = Neg(a) }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))

    bundle = export_all(path, tmp_path, "x=6,batch,3")

    assert bundle.inputs[0].shape == (6, "batch", 3)


def test_second_free_axis_is_refused_by_name_with_the_option_that_settles_it(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (int64[batch, seq] ids, int64[batch, seq] mask) => (int64[batch, seq] y) {
        a = Mul(ids, mask) b = Neg(a) y = Abs(b) }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))

    with pytest.raises(UsageError, match=r"'ids' has the free dimension 'seq' on axis 1.*--input-shape ids=batch,SIZE"):
        load_model(str(path))

    bundle = export_all(path, tmp_path, "ids=12")

    assert [info.shape for info in bundle.inputs] == [("batch", 12), ("batch", 12)]
    assert [split.name for split in bundle.splits] == ["a", "b"]


def test_sample_settles_free_dimensions_too(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (int64[batch, seq] ids) => (int64[batch, seq] y) { a = Neg(ids) y = Abs(a) }"""
    path, sample = tmp_path / "net.onnx", tmp_path / "sample.npz"
    onnx.save(onnx.parser.parse_model(text), str(path))
    np.savez(sample, ids=np.arange(7).reshape(1, 7))

    bundle = export_all(path, tmp_path, sample=sample)

    assert bundle.inputs[0].shape == ("batch", 7)
    assert (np.load(bundle.path / "samples" / "model.npz")["input:ids"] == np.arange(7)).all()
    cut_bundle(bundle, CutOptions(cuts="a"))
    assert (np.load(bundle.path / "samples" / "model.npz")["input:ids"] == np.arange(7)).all()


def test_differently_named_batches_are_taken_for_one(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[a_batch, 4] a, float[b_batch, 4] b) => (float[a_batch, 4] y) { c = Add(a, b) d = Neg(c) y = Abs(d) }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))

    bundle = export_all(path, tmp_path)

    assert [info.shape for info in bundle.inputs] == [("batch", 4)] * 2
    assert "taken for one batch" in stated(bundle.manifest.notes)[0]


def test_missing_input_shape_is_settled_by_the_option(tmp_path: Path) -> None:
    model = conv_net(17, "N")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())

    bundle = export_all(path, tmp_path, "3,8,8")

    assert bundle.inputs[0].shape == ("batch", 3, 8, 8)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("z=3,8,8", "names the input 'z'"),
        ("x=3,9,8", "fixed in the file"),
        ("x=3,8", "2|3 dimensions"),
        ("x=3,-1,8", "-1"),
    ],
)
def test_shape_that_does_not_fit_is_refused(tmp_path: Path, shape: str, message: str) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(conv_net(17, "N").SerializeToString())

    with pytest.raises(UsageError, match=message):
        load_model(str(path), SourceOptions(input_shapes=(shape,)))


def external(path: Path, location: str, offset: int = 0, length: int = 40) -> None:
    model = conv_net(17, "N")
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("gone.bin", "does not exist"),
        ("../secret", "outside"),
        ("/etc/passwd", "outside"),
        ("link", "outside"),
        ("", "outside"),
    ],
)
def test_weights_missing_or_outside_the_folder_are_refused(tmp_path: Path, location: str, message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(100_000))
    (folder / "link").symlink_to(tmp_path / "secret")
    external(folder / "net.onnx", location)

    with pytest.raises(ModelFileError, match=message):
        load_model(str(folder / "net.onnx"))


def test_weights_file_that_is_too_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(100))
    external(tmp_path / "net.onnx", "w.bin", offset=64, length=2400)

    with pytest.raises(ModelFileError, match="the file has 100 bytes"):
        load_model(str(tmp_path / "net.onnx"))


def test_damaged_files_are_refused_wherever_they_are_cut_off(tmp_path: Path) -> None:
    data = conv_net(17, "N").SerializeToString()
    path = tmp_path / "net.onnx"
    for size in [0, 1, 7, *range(50, len(data) - 1, len(data) // 12)]:
        path.write_bytes(data[:size])

        with pytest.raises(DscError) as caught:
            export_all(path, tmp_path)

        assert caught.value.exit_code in (4, 6), size
        assert not (tmp_path / "out").exists()


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(np.random.default_rng(0).bytes(5000))

    with pytest.raises(ModelFileError, match="no ONNX model"):
        load_model(str(path))


def test_old_opset_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(conv_net(9, "N").SerializeToString())

    with pytest.raises(ModelFileError, match=r"opset 9; 11 or later.*convert_version"):
        load_model(str(path))


@pytest.mark.parametrize("inside", ["graph", "body"])
def test_an_engine_in_the_form_of_a_graph_is_refused_by_name(tmp_path: Path, inside: str) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", ep_cache_context=b"engine")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    nodes = [node]
    if inside == "body":
        body = helper.make_graph([node], "body", [], [y])
        condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
        nodes = [condition, helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)]
    model = helper.make_model(helper.make_graph(nodes, "net", [x], [y]))
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(ModelFileError, match="EPContext"):
        load_model(str(tmp_path / "net.onnx"))


def test_unknown_op_is_named(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    net (float[batch, 4] x) => (float[batch, 4] y) { a = Relu(x) b = mine.Magic(a) y = Neg(b) }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))

    with pytest.raises(BackendError, match="Magic"):
        export_all(path, tmp_path)


def test_large_constant_node_becomes_a_stored_weight(tmp_path: Path) -> None:
    model = conv_net(17, "N")
    model.graph.node.insert(
        2, helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones((8, 4, 4), "f4")))
    )
    model.graph.node.insert(3, helper.make_node("Add", ["b", "k"], ["b2"]))
    model.graph.node[4].input[0] = "b2"
    path = tmp_path / "net.onnx"
    path.write_bytes(model.SerializeToString())

    bundle = export_all(path, tmp_path)

    assert [split.name for split in bundle.splits] == ["a", "b", "b2", "c"]
    assert all(stated(split.max_abs_error) <= 1e-5 for split in bundle.splits)


def test_batch_that_is_free_in_name_alone_is_refused_with_the_node_and_the_way_out(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 4] x) => (float[N, 4] y) <int64[2] shape = {1, 4}> { a = Relu(x) b = Reshape(a, shape) y = Neg(b) }"""
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))

    with pytest.raises(ExportError, match=r"batch 1 alone.*Reshape.*--input-shape x=1,4"):
        export_all(path, tmp_path)

    bundle = export_all(path, tmp_path, "x=1,4")

    assert bundle.fixed_batch == 1
    assert [split.name for split in bundle.splits] == ["a", "b"]
