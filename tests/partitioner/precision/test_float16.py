"""Float16 graphs: what becomes float16, what stays float32, and that both compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from dsc_split.bundles._samples import make_inputs
from dsc_split.errors import ExportError
from dsc_split.partitioner import SourceOptions, find_cuts, load_model
from dsc_split.partitioner._load import input_infos
from dsc_split.partitioner.precision import _float16_rules as _half_rules
from dsc_split.partitioner.precision._float16 import HalfReport, precision_of, to_half

Save = Callable[[str], Path]
Convert = Callable[..., "Converted"]


class Converted:
    """A graph before and after."""

    def __init__(self, path: Path, io_precision: str | None) -> None:
        self.wide, self.half = (load_model(str(path), SourceOptions(max_batch=3)).model for _ in range(2))
        self.report: HalfReport = to_half(self.half, io_precision=io_precision)
        self.proto: onnx.ModelProto = ir.serde.serialize_model(self.half)
        self.nodes = {node.op_type: node for node in self.half.graph}

    @property
    def kept(self) -> list[str]:
        return [op.op_type for op in self.report.kept_float32]

    def types(self, *names: str) -> list[str]:
        values = {value.name: value for node in self.half.graph for value in node.outputs}
        values |= {value.name: value for value in [*self.half.graph.inputs, *self.half.graph.initializers.values()]}
        return [str(values[name].dtype) for name in names]

    def casts(self) -> list[str]:
        return [str(node.inputs[0].name) for node in self.half.graph if node.op_type == "Cast" if node.inputs[0]]

    def compare(self, tolerance: float = 3e-3, batch: int = 2) -> dict[str, Any]:
        """Run both on the same inputs; gives the float16 answers."""
        if all(value.shape is not None for value in self.half.graph.outputs):
            onnx.checker.check_model(self.proto, full_check=True)
        answers = []
        for model in (self.wide, self.half):
            graph = ir.serde.serialize_model(model).SerializeToString()
            session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
            names = [item.name for item in session.get_outputs()]
            answers.append(dict(zip(names, session.run(names, make_inputs(input_infos(model), batch, 0)), strict=True)))
        wide, half = answers
        for name, expected in wide.items():
            assert half[name].shape == expected.shape
            scale = np.abs(expected.astype("f8")).max() if expected.size else 1.0
            assert np.abs(half[name].astype("f8") - expected).max(initial=0) <= tolerance * scale
        return half


@pytest.fixture
def convert(save: Save) -> Convert:
    """Convert a graph given as ONNX text."""
    return lambda text, io_precision=None: Converted(save(text), io_precision)


def net(opset: int, text: str, domains: str = "", functions: str = "") -> str:
    return f'<ir_version: 10, opset_import: ["" : {opset}{domains}]>\n{text}\n{functions}'


# x -Conv= a -Relu= b -Conv= y, and b also goes into z
PLAIN = net(
    17,
    """g (float[batch, 1, 4, 4] x) => (float[batch, 2, 4, 4] y, float[batch, 2, 1, 1] z)
    <float[2, 1, 1, 1] w = {0.5, -2.0}, float[2, 2, 1, 1] v = {1.0, 1e-9, 1e6, -1.5}> {
        a = Conv(x, w)
        b = Relu(a)
        y = Conv(b, v)
        z = GlobalAveragePool(b)
    }""",
)


def test_every_value_of_a_plain_net_becomes_float16_and_keeps_its_name(convert: Convert) -> None:
    done = convert(PLAIN.replace("1e-9", "0.5").replace("1e6", "0.25"))

    assert set(done.types("x", "w", "v", "a", "b", "y", "z")) == {"FLOAT16"}
    assert done.kept == []
    assert [node.name for node in done.half.graph] == [node.name for node in done.wide.graph]
    assert precision_of(done.wide) == "fp32"
    assert precision_of(done.half) == "fp16"
    done.compare()


def test_weights_that_overflow_become_the_largest_float16_and_are_counted(convert: Convert) -> None:
    done = convert(PLAIN)

    weights = done.half.graph.initializers["v"].const_value
    assert weights is not None
    assert weights.numpy().reshape(-1).tolist() == [1.0, 0.0, 65504.0, -1.5]
    assert done.report.weights_converted == 6
    assert (done.report.weights_overflowed, done.report.weights_vanished) == (1, 1)
    assert done.report.overflowed_in == ("v",)


def test_infinity_stays_and_the_lowest_float32_stays_finite(convert: Convert) -> None:
    done = convert(
        net(
            17, "g (float[batch, 2] x) => (float[batch, 2] y) <float[2] m = {-3.4028235e38, 65519.0}> { y = Max(x, m) }"
        )
    )
    tensor = done.half.graph.initializers["m"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [-65504.0, 65504.0]
    assert done.report.weights_overflowed == 1


def test_inputs_and_outputs_keep_their_type_on_request(convert: Convert) -> None:
    done = convert(PLAIN.replace("1e6", "0.25"), "fp32")

    assert done.types("x", "a", "b", "y", "z") == ["FLOAT", "FLOAT16", "FLOAT16", "FLOAT", "FLOAT"]
    assert [value.name for value in done.half.graph.outputs] == ["y", "z"]
    assert done.casts() == ["x", "y_float16", "z_float16"]
    assert done.compare()["y"].dtype == np.float32


def test_output_that_is_read_further_on_is_cast_for_the_user_alone(convert: Convert) -> None:
    done = convert(
        net(17, "g (float[batch, 4] x) => (float[batch, 4] y, float[batch, 4] z) { y = Relu(x)\n z = Neg(y) }"), "fp32"
    )

    assert done.nodes["Neg"].inputs[0].name == "y_float16"  # type: ignore[union-attr]  # Neg has an input
    done.compare()


# x -Conv= a -Celu= b -Conv= y; ONNX has no Celu in float16
KEPT = net(
    17,
    """g (float[batch, 1, 4, 4] x) => (float[batch, 1, 2, 2] y)
    <float[1, 1, 1, 1] w = {0.5}, float[1, 1, 3, 3] v = {1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 3.0}> {
        a = Conv(x, w)
        b = Celu(a)
        y = Conv(b, v)
    }""",
)


def test_op_that_onnx_does_not_allow_in_float16_stays_float32_between_casts(convert: Convert) -> None:
    done = convert(KEPT)

    assert done.kept == ["Celu"]
    assert "no float16" in done.report.kept_float32[0].reason
    assert [node.op_type for node in done.half.graph] == ["Conv", "Cast", "Celu", "Cast", "Conv"]
    assert done.types("a", "b_float32", "b", "y") == ["FLOAT16", "FLOAT", "FLOAT16", "FLOAT16"]
    done.compare()


def test_cast_of_a_kept_op_is_not_made_twice_and_widens_no_cut(convert: Convert) -> None:
    # a -Celu= b is read twice; a itself is read twice by Celu ops
    done = convert(
        net(
            17,
            """g (float[batch, 4] x) => (float[batch, 4] y) {
                a = Relu(x)
                b = Celu(a)
                c = Neg(b)
                d = Add(b, c)
                e = Celu<alpha = 2.0>(a)
                y = Mul(d, e)
            }""",
        )
    )

    assert done.casts() == ["a", "b_float32", "a", "e_float32"]
    done.compare()


def test_cuts_have_the_names_that_they_have_in_float32(convert: Convert) -> None:
    done = convert(PLAIN.replace("1e6", "0.25"))

    names = [[cut.name for cut in find_cuts(model).cuts] for model in (done.wide, done.half)]
    assert names[0] == names[1] == ["a", "b"]
    sizes = [[cut.size_bytes for cut in find_cuts(model).cuts] for model in (done.wide, done.half)]
    assert sizes[0] == [2 * size for size in sizes[1]]


def test_scales_of_a_resize_are_as_exact_as_before(convert: Convert) -> None:
    # the size is 3 * 1.6667, rounded down: 5 in float32, and 4 where the scale is a float16
    done = convert(
        net(
            17,
            """g (float[batch, 1, 3, 3] x) => (float[batch, 1, h, w] y)
            <float[4] scales = {1.0, 1.0, 1.6666667, 1.6666667}> {
                a = Relu(x)
                y = Resize<mode = "nearest">(a, , scales)
            }""",
        )
    )

    assert done.types("scales", "y") == ["FLOAT", "FLOAT16"]
    assert done.compare()["y"].shape == (2, 1, 5, 5)


def test_arithmetic_on_shapes_stays_float32_as_far_as_it_decides_a_size(convert: Convert) -> None:
    # 4098 is no float16; half of it slices
    done = convert(
        net(
            17,
            """g (float[batch, 4098] x) => (float[batch, n] y)
            <float two = {2.0}, int64 one = {1}, int64[1] zero = {0}, int64[1] axis = {1}, int64[1] flat = {-1}> {
                a = Relu(x)
                shape = Shape(a)
                length = Gather(shape, one)
                wide = Cast<to = 1>(length)
                middle = Div(wide, two)
                whole = Cast<to = 7>(middle)
                end = Reshape(whole, flat)
                part = Slice(a, zero, end, axis)
                y = Div(part, two)
            }""",
        )
    )

    assert done.kept == ["Cast", "Div", "Cast"]
    assert {op.reason for op in done.report.kept_float32} == {_half_rules._EXACT}
    assert done.types("two", "two_float16") == ["FLOAT", "FLOAT16"]
    assert done.compare()["y"].shape == (2, 2049)


def test_mask_that_follows_from_positions_is_the_same_as_before(convert: Convert) -> None:
    # in float16, 2048 and 2049 are one position
    done = convert(
        net(
            17,
            """g (float[batch, 2052] x) => (float[batch, 2052] y)
            <float zero = {0.0}, float step = {1.0}, float end = {2052.0}, float last = {2048.5}> {
                place = Range(zero, end, step)
                here = Less(place, last)
                mask = Cast<to = 1>(here)
                y = Mul(x, mask)
            }""",
        )
    )

    assert done.kept == ["Range", "Less"]
    assert (done.compare()["y"][:, 2049:] == 0).all()


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (
            "Range",
            """g (float[batch, 8] x) => (float[batch, 8] y)
            <float zero = {0.0}, float end = {4.0}, float half = {0.5}> {
                r = Range(zero, end, half)
                y = Add(x, r)
            }""",
        ),
        (
            "CumSum",
            """g (float[batch, 8] x) => (float[batch, 8] y) <int64 axis = {1}> { a = Relu(x)\n y = CumSum(a, axis) }""",
        ),
        (
            "GridSample",
            """g (float[batch, 1, 4, 4] x, float[batch, 2, 2, 2] grid) => (float[batch, 1, 2, 2] y) {
                y = GridSample(x, grid)
            }""",
        ),
        (
            "NonMaxSuppression",
            """g (float[batch, 6, 4] boxes, float[batch, 1, 6] scores) => (int64[n, 3] y)
            <int64[1] most = {2}, float[1] overlap = {0.5}, float[1] least = {0.1}> {
                a = Relu(scores)
                y = NonMaxSuppression(boxes, a, most, overlap, least)
            }""",
        ),
        (
            "DynamicQuantizeLinear",
            """g (float[batch, 8] x) => (float[batch, 8] y) {
                q, scale, zero = DynamicQuantizeLinear(x)
                y = DequantizeLinear(q, scale, zero)
            }""",
        ),
    ],
)
def test_op_that_needs_float32_is_named_and_the_graph_still_runs(convert: Convert, op: str, text: str) -> None:
    done = convert(net(17, text))

    assert op in done.kept
    done.compare(tolerance=0.02)


QDQ = """g (float[batch, 4] x) => (float[batch, 4] y) <float scale = {0.0123}, uint8 zero = {128}> {
    a = Relu(x)
    q = QuantizeLinear(a, scale, zero)
    d = DequantizeLinear(q, scale, zero)
    y = Neg(d)
}"""


def test_quantisation_stays_float32_where_scale_and_value_have_one_type(convert: Convert) -> None:
    done = convert(net(19, QDQ))

    assert done.kept == ["QuantizeLinear", "DequantizeLinear"]
    assert done.report.kept_float32[0].reason == "its scale stays float32"
    assert done.types("scale", "a", "d_float32", "y") == ["FLOAT", "FLOAT16", "FLOAT", "FLOAT16"]
    done.compare()


def test_quantisation_keeps_its_scale_alone_where_the_types_are_apart(convert: Convert) -> None:
    done = convert(net(23, QDQ))

    assert done.kept == []
    assert done.types("scale", "a", "d") == ["FLOAT", "FLOAT16", "FLOAT16"]
    assert done.nodes["DequantizeLinear"].attributes["output_dtype"].as_int() == ir.DataType.FLOAT16
    onnx.checker.check_model(done.proto, full_check=True)


def test_attributes_that_say_a_type_say_float16(convert: Convert) -> None:
    done = convert(
        net(
            17,
            """g (uint8[batch, 3] x) => (float[batch, 3] y) <int64[2] size = {3, 3}> {
                f = Cast<to = 1>(x)
                zeros = ConstantOfShape(size)
                ones = ConstantOfShape<value = float[1] {1.0}>(size)
                eye = EyeLike<dtype = 1>(zeros)
                bias = Constant<value_floats = [0.5, 0.25, 0.125]>()
                sum = Add(ones, eye)
                product = MatMul(f, sum)
                like = CastLike(x, product)
                total = Add(product, like)
                y = Add(total, bias)
            }""",
        )
    )

    assert set(done.types("f", "zeros", "ones", "eye", "bias", "like", "y")) == {"FLOAT16"}
    assert done.kept == []
    done.compare()


def test_bodies_of_if_loop_and_scan_become_float16(convert: Convert) -> None:
    done = convert(
        net(
            17,
            """g (float[batch, 4] x, bool c) => (float[batch, 4] y, float[s, batch, 4] z)
            <float[4] w = {1.0, 2.0, 3.0, 4.0}> {
                a = Mul(x, w)
                b = If(c)<then_branch = t () => (float[n, 4] p) { k = Constant<value_float = 2.0>()
                                                               p = Mul(a, k) },
                          else_branch = e () => (float[n, 4] q) { h = Celu(a)
                                                               q = Identity(h) }>
                trips = Constant<value_int = 3>()
                go = Constant<value = bool {1}>()
                d, all = Loop(trips, go, b)<body = l (int64 i, bool on, float[n, 4] u)
                                                  => (bool on2, float[n, 4] v, float[n, 4] s) {
                    on2 = Identity(on)
                    f = Cast<to = 1>(i)
                    m = Mul(u, w)
                    v = Add(m, f)
                    s = Celu(v) }>
                y = Relu(d)
                z = Identity(all)
            }""",
        )
    )

    assert set(done.types("a", "b", "d", "all", "y")) == {"FLOAT16"}
    assert done.kept == ["Celu", "Celu"]
    done.compare()


FUNCTION = """<domain: "own", opset_import: ["" : 17]>
swish (u) => (v) {
    one = Constant<value_float = 1.5>()
    s = Sigmoid(u)
    t = Mul(s, one)
    v = Mul(u, t)
}"""


def test_function_of_the_model_becomes_float16(convert: Convert) -> None:
    done = convert(
        net(
            17,
            "g (float[batch, 4] x) => (float[batch, 4] y) { a = own.swish(x)\n y = own.swish(a) }",
            ', "own" : 1',
            FUNCTION,
        )
    )

    assert done.types("a", "y") == ["FLOAT16", "FLOAT16"]
    done.compare()


def test_function_whose_types_its_callers_decide_stays_float32(convert: Convert) -> None:
    function = """<domain: "own", opset_import: ["" : 17]>
    to <to> (u) => (v) {
        h = Relu(u)
        v = Cast<to : int = @to>(h)
    }"""
    done = convert(
        net(
            17,
            "g (float[batch, 4] x) => (float[batch, 4] y) { a = Neg(x)\n b = own.to<to = 1>(a)\n y = Neg(b) }",
            ', "own" : 1',
            function,
        )
    )

    assert done.kept == ["Relu", "Cast"]
    assert done.casts() == ["a", "b_float32"]
    done.compare()


def test_op_that_nothing_is_known_of_stays_float32(convert: Convert) -> None:
    done = convert(
        net(
            17,
            "g (float[batch, 4] x) => (float[batch, 4] y) { a = Relu(x)\n y = com.microsoft.Gelu(a) }",
            ', "com.microsoft" : 1',
        )
    )

    assert done.kept == ["Gelu"]
    assert "'com.microsoft'" in done.report.kept_float32[0].reason
    assert done.types("y") == ["FLOAT16"]
    done.compare()


def test_sequences_become_float16_and_one_that_cannot_is_named(convert: Convert) -> None:
    text = """g (float[batch, 4] x) => (float[batch, 8] y) {
        a = Relu(x)
        s = SequenceConstruct(a, x)
        y = ConcatFromSequence<axis = 1>(s)
    }"""
    convert(net(17, text)).compare()

    listed = text.replace("ConcatFromSequence<axis = 1>(s)", "own.Glue(s)")
    model = ir.serde.deserialize_model(onnx.parser.parse_model(net(17, listed, ', "own" : 1')))
    for value, kind in zip([node.outputs[0] for node in model.graph], (ir.TensorType, ir.SequenceType), strict=False):
        wide = ir.TensorType(ir.DataType.FLOAT)
        value.type = wide if kind is ir.TensorType else ir.SequenceType(wide)
    with pytest.raises(ExportError, match=r"'s' is Sequence\(Tensor\(FLOAT\)\)"):
        to_half(model)


def test_layer_norm_and_integers_and_doubles_are_left_alone(convert: Convert) -> None:
    done = convert(
        net(
            17,
            """g (float[batch, 4] x, int64[batch, 4] i) => (float[batch, 4] y, double[batch, 4] z, int64[batch, 4] k)
            <float[4] scale = {1.0, 2.0, 3.0, 4.0}> {
                y = LayerNormalization(x, scale)
                z = Cast<to = 11>(y)
                k = Neg(i)
            }""",
        )
    )

    assert done.types("i", "y", "z", "k") == ["INT64", "FLOAT16", "DOUBLE", "INT64"]
    done.compare()


def test_shared_weight_is_counted_and_stored_once(save: Save, tmp_path: Path) -> None:
    from dsc_split.partitioner._weights_file import store_weights

    model = load_model(
        str(
            save(
                net(
                    17,
                    """g (float[batch, 32] x) => (float[batch, 32] y) <float[32, 32] v> {
                        a = MatMul(x, v)
                        b = Relu(a)
                        y = MatMul(b, v)
                    }""",
                ).replace("float[32, 32] v", "float[32, 32] v = {" + ", ".join(["0.125"] * 1024) + "}")
            )
        )
    ).model
    shared = model.graph.initializers["v"]
    twin = ir.Value(name="twin", shape=shared.shape, type=shared.type, const_value=shared.const_value)
    model.graph.register_initializer(twin)
    next(node for node in model.graph if node.outputs[0].name == "y").replace_input_with(1, twin)
    store_weights(model, tmp_path / "wide.data")

    report = to_half(model)
    stored = store_weights(model, tmp_path / "half.data")

    assert report.weights_converted == 1024
    assert stored is not None
    assert stored.size_bytes == 2048
