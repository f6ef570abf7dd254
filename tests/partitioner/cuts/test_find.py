"""Where a graph can be cut. Each graph is drawn above it; ``=`` marks the edges that are cuts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from dsc_split.bundle import Bundle
from dsc_split.errors import CutError, UsageError
from dsc_split.partitioner import CutList, find_cuts
from dsc_split.partitioner.graph._index import MODULE_CLASSES_KEY, MODULE_KEY

Cuts = Callable[..., CutList]
Export = Callable[..., Bundle]

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'

# x -Relu= a -Add(residual)-+= c -Relu- y
#           `-Neg- b -------'
RESIDUAL = (
    HEADER
    + """net (float[batch, 8] x) => (float[batch, 8] y) {
    a = Relu(x)
    b = Neg(a)
    c = Add(a, b)
    y = Exp(c)
}"""
)


def names(found: CutList) -> list[str]:
    return [cut.name for cut in found.cuts]


def test_cuts_are_the_edges_that_all_data_crosses(cuts: Cuts) -> None:
    found = cuts(RESIDUAL)

    assert names(found) == ["a", "c"]
    assert [cut.size_bytes for cut in found.cuts] == [32, 32]
    assert found.input_bytes == 32
    assert found.input_elements == 8


def test_two_tensors_may_cross_when_asked_for(cuts: Cuts, export: Export) -> None:
    found = cuts(RESIDUAL, max_tensors=2)

    assert [[tensor.name for tensor in cut.tensors] for cut in found.cuts] == [["a"], ["a", "b"], ["c"]]
    assert found.cuts[1].size_bytes == 64

    bundle = export(RESIDUAL, max_tensors=2)

    assert [split.name for split in bundle.splits] == ["a", "a+b", "c"]


def test_natural_compressive_and_frontier_follow_equation_3(cuts: Cuts) -> None:
    # 8 -> 16 -> 12 -> 4 -> 4 -> 6 -> 2 elements
    widths = [8, 16, 12, 4, 4, 6, 2]
    weights = "".join(f", float[{a}, {b}] w{i}" for i, (a, b) in enumerate(pairwise(widths)))
    body = "".join(f"h{i + 1} = MatMul({'x' if i == 0 else f'h{i}'}, w{i})\n" for i in range(len(widths) - 1))
    text = HEADER + f"net (float[batch, 8] x) => (float[batch, 2] y) <{weights[2:]}> {{ {body} y = Relu(h6) }}"
    model = onnx.parser.parse_model(text)
    for info in list(model.graph.value_info):
        if info.name.startswith("w"):
            dims = [dim.dim_value for dim in info.type.tensor_type.shape.dim]
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(dims, "f4"), info.name))
    graph = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))

    found = find_cuts(graph)

    judged = {cut.name: (cut.natural, cut.compressive, cut.frontier) for cut in found.cuts}
    assert judged == {
        "h1": (False, False, True),  # first: smaller than nothing before it, larger than the input
        "h2": (False, False, True),
        "h3": (True, True, True),
        "h4": (True, False, False),  # equal to h3: the earlier one wins
        "h5": (True, False, False),
        "h6": (True, True, True),
    }
    reasons = {cut.name: cut.reason for cut in found.cuts}
    assert reasons["h3"] == reasons["h6"] == ""
    assert "not smaller than the input, 32 bytes" in reasons["h1"]
    assert "not smaller than 'h3', 16 bytes" in reasons["h4"]


def test_ratio_in_elements_and_stated_input_bytes_change_the_verdict(cuts: Cuts) -> None:
    text = (
        HEADER
        + """net (uint8[batch, 8] x) => (float[batch, 8] y) <float scale = {0.5}> {
        a = DequantizeLinear(x, scale)
        b = ReduceMax<axes = [1], keepdims = 1>(a)
        y = Add(b, b)
    }"""
    )
    in_bytes, in_elements = cuts(text), cuts(text, ratio="elements")

    assert [cut.ratio for cut in in_bytes.cuts] == [4.0, 0.5]
    assert [cut.ratio for cut in in_elements.cuts] == [1.0, 0.125]


def test_batch_size_read_off_an_early_shape_does_not_cross(cuts: Cuts, export: Export) -> None:
    # Shape(x) -> batch is read by both Reshapes; counted as data it would cross everywhere.
    text = (
        HEADER
        + """net (float[batch, 2, 8] x) => (float[batch, 16] y)
    <int64[1] zero = {0}, int64[1] sixteen = {16}, int64[2] flat = {-1, 8}, int64[1] two = {2}> {
        s = Shape(x)
        n = Gather(s, zero)
        a = Relu(x)
        b = Reshape(a, flat)
        c = Neg(b)
        d = Exp(c)
        shape = Concat<axis = 0>(n, sixteen)
        y = Reshape(d, shape)
    }"""
    )

    assert names(cuts(text)) == ["a", "b", "c", "d"]
    bundle = export(text)

    assert [split.name for split in bundle.splits] == ["a", "b", "c", "d"]
    assert [split.tensors[0].shape for split in bundle.splits] == [("batch", 2, 8)] + [("2*batch", 8)] * 3
    assert all(split.max_abs_error == 0 for split in bundle.splits)


def test_tail_that_cannot_know_the_batch_is_refused_by_name(cuts: Cuts) -> None:
    # m has no batch dimension, and the Expand after it needs one.
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[n, 4] y) <int64[1] zero = {0}, int64[1] four = {4}> {
        s = Shape(x)
        n = Gather(s, zero)
        shape = Concat<axis = 0>(n, four)
        m = ReduceMean<axes = [0], keepdims = 1>(x)
        e = Neg(m)
        y = Expand(e, shape)
    }"""
    )
    found = cuts(text)

    assert [cut.refused for cut in found.cuts] == [True, True]
    assert "needs the batch size" in found.cuts[0].reason


def test_input_read_by_the_tail_is_a_passthrough_and_is_counted(cuts: Cuts, export: Export) -> None:
    # x -Relu- a -Add-+= c -Exp- y
    # z --------------'
    text = (
        HEADER
        + """net (float[batch, 4] x, float[batch, 2] z) => (float[batch, 6] y) {
        a = Relu(x)
        b = Neg(a)
        c = Concat<axis = 1>(b, z)
        y = Exp(c)
    }"""
    )

    assert names(cuts(text)) == ["c"]
    found = cuts(text, max_tensors=2)
    assert [[tensor.passthrough for tensor in cut.tensors] for cut in found.cuts] == [[True, False]] * 2 + [[False]]
    assert found.cuts[0].size_bytes == 24

    bundle = export(text, max_tensors=2)
    assert [split.passthrough for split in bundle.splits] == [("z",), ("z",), ()]
    head = onnx.load(str(bundle.path / bundle.splits[0].head))
    assert [info.name for info in head.graph.input] == ["x"]


def test_early_output_stays_on_the_device_and_is_not_counted(cuts: Cuts, export: Export) -> None:
    # x -Relu= a -Neg= b -Exp- y      exit = ReduceSum(a) is an output
    text = (
        HEADER
        + """net (float[batch, 8] x) => (float[batch, 1] exit, float[batch, 8] y) {
        a = Relu(x)
        exit = ReduceMax<axes = [1], keepdims = 1>(a)
        b = Neg(a)
        y = Exp(b)
    }"""
    )
    found = cuts(text)

    assert [(cut.name, cut.early_outputs, cut.size_bytes) for cut in found.cuts] == [
        ("a", (), 32),
        ("b", ("exit",), 32),
    ]
    bundle = export(text)
    tails = [[info.name for info in onnx.load(str(bundle.path / split.tail)).graph.output] for split in bundle.splits]
    assert tails == [["exit", "y"], ["y"]]


def test_tensor_that_is_an_output_and_crosses_is_both(cuts: Cuts, export: Export) -> None:
    text = (
        HEADER
        + """net (float[batch, 8] x) => (float[batch, 8] a, float[batch, 8] y) {
        a = Relu(x)
        y = Exp(a)
    }"""
    )

    assert [(cut.name, cut.early_outputs) for cut in cuts(text).cuts] == [("a", ("a",))]
    bundle = export(text)
    assert [info.name for info in onnx.load(str(bundle.path / bundle.splits[0].head)).graph.output] == ["a"]


def test_tensor_captured_by_an_if_body_crosses(cuts: Cuts, export: Export) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[batch, 4] y) <float[1] limit = {0.0}, int64[0] none = {}> {
        a = Relu(x)
        b = Neg(a)
        m = ReduceMax<keepdims = 0>(b)
        flag = Cast<to = 9>(m)
        c = If (flag) <
            then_branch = yes () => (float[batch, 4] t) { t = Exp(a) },
            else_branch = no () => (float[batch, 4] e) { e = Identity(b) }
        >
        y = Neg(c)
    }"""
    )
    found = cuts(text, max_tensors=3)

    crossing = {cut.name: [tensor.name for tensor in cut.tensors] for cut in found.cuts}
    assert crossing["a+b"] == ["a", "b"]
    assert ["a", "b", "flag"] in crossing.values()
    bundle = export(text, max_tensors=3)
    assert len(bundle.splits) == len(found.cuts)


def test_constants_and_initialisers_shared_by_both_sides_are_in_both(export: Export) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[batch, 4] y) <float[4] w = {1, 2, 3, 4}> {
        two = Constant<value = float {2.0}>()
        v = Mul(w, two)
        a = Mul(x, v)
        b = Relu(a)
        y = Add(b, v)
    }"""
    )
    bundle = export(text)

    assert [split.name for split in bundle.splits] == ["a", "b"]
    tail = onnx.load(str(bundle.path / bundle.splits[1].tail))
    assert "Mul" in [node.op_type for node in tail.graph.node]


def test_initialiser_that_is_also_an_input_is_a_constant(cuts: Cuts) -> None:
    model = onnx.parser.parse_model(RESIDUAL.replace("Neg(a)", "Mul(a, w)"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, "f4"), "w"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", 1, [8]))

    found = cuts(onnx.printer.to_text(model))

    assert found.input_bytes == 32
    assert names(found) == ["a", "c"]


def test_local_function_is_one_node_and_travels_with_the_side_that_calls_it(cuts: Cuts, export: Export) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    net (float[batch, 4] x) => (float[batch, 4] y) {
        a = Relu(x)
        b = local.twice(a)
        y = Neg(b)
    }
    <domain: "local", opset_import: ["" : 17, "local" : 1]>
    twice (p) => (q) { r = local.same(p)  q = Add(p, r) }
    <domain: "local", opset_import: ["" : 17]>
    same (p) => (q) { q = Identity(p) }
    """

    assert names(cuts(text)) == ["a", "b"]
    bundle = export(text)
    functions = [
        (sorted(f.name for f in onnx.load(str(bundle.path / path)).functions))
        for split in bundle.splits
        for path in (split.head, split.tail)
    ]
    assert functions == [[], ["same", "twice"], ["same", "twice"], []]


def test_random_op_refuses_every_cut_and_says_so(cuts: Cuts, export: Export) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[batch, 4] y) {
        a = Relu(x)
        r = RandomNormalLike(a)
        b = Add(a, r)
        y = Neg(b)
    }"""
    )
    found = cuts(text)

    assert found.cuts
    assert all(cut.refused and "RandomNormalLike" in cut.reason for cut in found.cuts)


def test_dropout_in_inference_mode_is_no_random_op(cuts: Cuts) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (float[batch, 4] y) {
        a = Relu(x)
        b = Dropout(a)
        y = Neg(b)
    }"""
    )

    assert not any(cut.refused for cut in cuts(text).cuts)


def test_size_that_depends_on_the_data_is_refused(cuts: Cuts) -> None:
    text = (
        HEADER
        + """net (float[batch, 4] x) => (int64[k] y) <int64[1] minus = {-1}> {
        a = Relu(x)
        i = NonZero(a)
        f = Reshape(i, minus)
        y = Neg(f)
    }"""
    )
    found = cuts(text)

    assert [cut.refused for cut in found.cuts] == [False, True, True]
    assert "depends on the data" in found.cuts[1].reason


def test_integer_tensor_is_the_one_to_send_at_a_quantised_edge(cuts: Cuts, export: Export) -> None:
    text = (
        HEADER
        + """net (float[batch, 8] x) => (float[batch, 8] y)
    <float scale = {0.1}, uint8 zero = {128}, float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}> {
        q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        m = Mul(d, w)
        q2 = QuantizeLinear(m, scale, zero)
        d2 = DequantizeLinear(q2, scale, zero)
        y = Relu(d2)
    }"""
    )
    found = cuts(text)

    verdict = {cut.name: (cut.size_bytes, cut.compressive) for cut in found.cuts}
    assert verdict == {"q": (8, True), "d": (32, False), "m": (32, False), "q2": (8, False), "d2": (32, False)}
    assert all(split.max_abs_error == 0 for split in export(text).splits)


def test_recurrent_state_comes_in_and_goes_out(export: Export) -> None:
    rng = np.random.default_rng(0)
    text = (
        HEADER
        + """net (float[6, batch, 3] x, float[1, batch, 4] h0) => (float[6, batch, 5] y, float[1, batch, 4] hn) {
        a = Relu(x)
        seq, hn = GRU<hidden_size = 4>(a, w, r, , , h0)
        s = Squeeze(seq, one)
        b = MatMul(s, p)
        y = Tanh(b)
    }"""
    )
    model = onnx.parser.parse_model(text)
    weights = {"w": (1, 12, 3), "r": (1, 12, 4), "p": (4, 5)}
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype("f4")
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one"))

    bundle = export(onnx.printer.to_text(model), max_tensors=2)

    crossing = {split.name: (split.passthrough, split.early_outputs) for split in bundle.splits}
    assert crossing["h0+a"] == (("h0",), ())
    assert crossing["b"] == ((), ("hn",))
    assert bundle.splits[-1].tensors[0].shape == (6, "batch", 5)


def test_names_are_safe_unique_without_case_and_short(cuts: Cuts) -> None:
    long = "t" * 150
    text = (
        HEADER
        + f"""net (float[batch, 8] x) => (float[batch, 8] y) {{
        "a/b:c" = Relu(x)
        "A/B:C" = Neg("a/b:c")
        con = Relu("A/B:C")
        "full-offload" = Relu(con)
        {long} = Neg("full-offload")
        y = Exp({long})
    }}"""
    )
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(_quoteless(text))))
    for node, name in zip(model.graph, ["a/b:c", "A/B:C", "con", "full-offload", long], strict=False):
        node.outputs[0].name = name

    found = names(find_cuts(model))

    assert found[:4] == ["a_b_c", "A_B_C-2", "_con", "_full-offload"]
    assert len(found[4]) <= 100
    assert len({name.lower() for name in found}) == 5


def _quoteless(text: str) -> str:
    return text.replace('"a/b:c"', "v1").replace('"A/B:C"', "v2").replace('"full-offload"', "v4")


def _with_modules(text: str, modules: dict[str, str], classes: str = "{}") -> ir.Model:
    model = ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    model.metadata_props[MODULE_CLASSES_KEY] = classes
    for node in model.graph:
        name = node.outputs[0].name
        if name in modules:
            node.metadata_props[MODULE_KEY] = modules[name]
    return model


def test_cut_is_named_after_the_outermost_module_that_ends_there() -> None:
    model = _with_modules(RESIDUAL, {"a": "stem", "b": "blocks.0.conv", "c": "blocks.0", "y": "head"})

    found = find_cuts(model)

    assert [(cut.name, cut.modules) for cut in found.cuts] == [("stem", ("stem",)), ("blocks", ("blocks", "blocks.0"))]


def test_pattern_keeps_module_outputs_and_an_activation_belongs_to_its_layer() -> None:
    text = (
        HEADER
        + """net (float[batch, 8] x) => (float[batch, 8] y) {
        a = Neg(x)
        b = Relu(a)
        c = Neg(b)
        s = Sigmoid(c)
        d = Mul(c, s)
        y = Exp(d)
    }"""
    )
    modules = {"a": "features.0", "b": "features.1", "c": "features.2", "s": "features.3", "d": "features.3", "y": "fc"}
    model = _with_modules(text, modules, '{"features.1": "torch.nn.modules.activation.ReLU"}')

    assert names(find_cuts(model)) == ["features.0", "features.1", "features.2", "features"]
    assert names(find_cuts(model, modules="features.*")) == ["features.1", "features"]
    assert names(find_cuts(model, modules="*")) == ["features"]


def test_name_does_not_depend_on_the_pattern() -> None:
    model = _with_modules(RESIDUAL, {"a": "a.0", "b": "a.1", "c": "a.1", "y": "head"})

    assert names(find_cuts(model, modules="a.*")) == [cut.name for cut in find_cuts(model).cuts]


def test_cut_inside_a_residual_block_is_refused_naming_the_skip_edge(export: Export) -> None:
    with pytest.raises(CutError, match=r"'b' does not separate the graph: 'a' is also read by .*--max-tensors 2"):
        export(RESIDUAL, cuts="b")


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("cc", "Did you mean 'c'"), ("x", "input or output"), ("y", "input or output"), (",", "names nothing")],
)
def test_name_that_is_no_cut_is_refused_with_what_to_do(export: Export, wanted: str, message: str) -> None:
    with pytest.raises(CutError, match=message):
        export(RESIDUAL, cuts=wanted)


def test_no_tensor_at_all_is_refused(cuts: Cuts) -> None:
    with pytest.raises(UsageError, match="max-tensors"):
        cuts(RESIDUAL, max_tensors=0)


def _chain(length: int) -> ir.Model:
    """Make a chain with a skip over every other node."""
    nodes = []
    for i in range(length // 2):
        nodes.append(onnx.helper.make_node("Relu", [f"v{i}"], [f"r{i}"]))
        nodes.append(onnx.helper.make_node("Add", [f"v{i}", f"r{i}"], [f"v{i + 1}"]))
    infos = [onnx.helper.make_tensor_value_info(f"{k}{i}", 1, ["batch", 8]) for i in range(length // 2) for k in "vr"]
    output = onnx.helper.make_tensor_value_info(f"v{length // 2}", 1, ["batch", 8])
    graph = onnx.helper.make_graph(nodes, "chain", infos[:1], [output], value_info=infos[1:])
    return ir.serde.deserialize_model(onnx.helper.make_model(graph))


def test_work_is_linear_in_the_nodes() -> None:
    def calls(length: int) -> int:
        """Count the function calls of a search: unlike seconds, they are the same each time."""
        model = _chain(length)
        count = 0

        def on_event(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(on_event)
        try:
            found = find_cuts(model)
        finally:
            sys.setprofile(None)
        assert len(found.cuts) == length // 2 - 1
        return count

    assert calls(4_000) < 11 * calls(400)
