from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dsc_split.engines.tensorrt._gemm import GemmRewrite, digest, prove_rewrite, rewrite_gemm
from dsc_split.errors import ModelFileError

Array = np.ndarray[Any, Any]

EXACT = 1e-6


def weights(shape: Sequence[int], seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(folder: Path, text: str, initializers: dict[str, Array] | None = None, *, external: bool = False) -> Path:
    """Write a graph, given as ONNX text after its opset; ``external`` puts the weights into a file beside it."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}')
    for name, array in (initializers or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    path = folder / "net.onnx"
    onnx.save(model, str(path), save_as_external_data=external, location="weights.data", size_threshold=0)
    return path


def ops(rewrite: GemmRewrite) -> list[str]:
    return [node.op_type for node in rewrite.model.graph.node]


def feeds(path: Path, batches: Sequence[int] = (1, 3)) -> list[dict[str, Array]]:
    """Make inputs; a symbol is the batch."""
    made = []
    for batch in batches:
        feed = {}
        for i, item in enumerate(onnx.load(str(path), load_external_data=False).graph.input):
            tensor = item.type.tensor_type
            shape = [dim.dim_value if dim.HasField("dim_value") else batch for dim in tensor.shape.dim]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            feed[item.name] = weights(shape, seed=i + 1).astype(dtype)
        made.append(feed)
    return made


def check_exact(path: Path, *, policy: str = "conv", converted: int = 1) -> GemmRewrite:
    rewrite = rewrite_gemm(path, policy=policy)
    assert [left.reason for left in rewrite.left] == []
    assert len(rewrite.converted) + len(rewrite.summed) == converted
    assert not {"Gemm", "MatMul", "Einsum"} & set(ops(rewrite))
    checked = path.with_name("rewritten.onnx")
    checked.write_bytes(rewrite.model.SerializeToString())
    onnx.checker.check_model(str(checked))
    _, max_rel = prove_rewrite(path, rewrite, feeds(path))
    assert max_rel <= EXACT
    return rewrite


# ---- Gemm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "w", "c"),
    [
        ("", (8, 4), None),
        ("", (8, 4), (4,)),
        ("", (8, 4), (1, 4)),
        ("", (8, 4), (1,)),
        ("", (8, 4), ()),
        ("<transB=1>", (4, 8), (4,)),
        ("<alpha=0.5>", (8, 4), (4,)),
        ("<beta=2.0, transB=1>", (4, 8), (4,)),
        ("<alpha=0.0, beta=0.0>", (8, 4), (1, 1)),
    ],
)
def test_gemm_with_a_constant_matrix_is_a_convolution(
    tmp_path: Path, attributes: str, w: tuple[int, ...], c: tuple[int, ...] | None
) -> None:
    third = {} if c is None else {"c": weights(c, 9)}
    text = f"g (float[B,8] x) => (float[B,4] y) {{ y = Gemm{attributes}(x, w{', c' if third else ''}) }}"

    rewrite = check_exact(save(tmp_path, text, {"w": weights(w), **third}))

    assert ops(rewrite).count("Conv") == 1


def test_bias_of_a_gemm_becomes_the_bias_of_the_convolution(tmp_path: Path) -> None:
    text = "g (float[B,8] x) => (float[B,4] y) { y = Gemm<transB=1>(x, w, c) }"

    rewrite = check_exact(save(tmp_path, text, {"w": weights((4, 8)), "c": weights((4,))}))

    assert "Add" not in ops(rewrite)
    assert [len(node.input) for node in rewrite.model.graph.node if node.op_type == "Conv"] == [3]


def test_gemm_with_transposed_rows_is_a_convolution(tmp_path: Path) -> None:
    text = "g (float[8,B] x, float[B,4] c) => (float[B,4] y) { y = Gemm<transA=1>(x, w, c) }"

    check_exact(save(tmp_path, text, {"w": weights((8, 4))}))


@pytest.mark.parametrize(
    ("attributes", "w", "x"), [("", "4,8", "8,B"), ("<transA=1, transB=1, beta=3.0>", "8,4", "B,8")]
)
def test_gemm_with_a_constant_left_side_is_a_convolution(tmp_path: Path, attributes: str, w: str, x: str) -> None:
    text = f"g (float[{x}] x) => (float[4,B] y) {{ y = Gemm{attributes}(w, x, c) }}"

    check_exact(save(tmp_path, text, {"w": weights([int(dim) for dim in w.split(",")]), "c": weights((4, 1))}))


# ---- MatMul ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "w", "y"),
    [
        ("B,8", (8, 4), "B,4"),
        ("B,5,8", (8, 4), "B,5,4"),
        ("B,5,6,8", (8, 4), "B,5,6,4"),
        ("2,3,B,8", (8, 4), "2,3,B,4"),
        ("64,5,8", (8, 4), "64,5,4"),
        ("8", (8, 4), "4"),
        ("B,5,8", (8,), "B,5"),
        ("B,8", (1, 8, 4), "1,B,4"),
        ("B,5,8", (1, 1, 8, 4), "1,B,5,4"),
        ("1,5,8", (3, 8, 4), None),
    ],
)
def test_matmul_with_a_constant_right_side_is_a_convolution(
    tmp_path: Path, x: str, w: tuple[int, ...], y: str | None
) -> None:
    if y is None:
        x, y = "1,5,8", "3,5,4"
    text = f"g (float[{x}] x) => (float[{y}] y) {{ y = MatMul(x, w) }}"

    check_exact(save(tmp_path, text, {"w": weights(w)}))


@pytest.mark.parametrize(
    ("w", "x", "y"),
    [
        ((4, 8), "8,B", "4,B"),
        ((4, 8), "B,8,5", "B,4,5"),
        ((4, 8), "B,3,8,5", "B,3,4,5"),
        ((4, 8), "3,8,B", "3,4,B"),
        ((4, 8), "8", "4"),
        ((8,), "B,8,5", "B,5"),
        ((1, 4, 8), "8,B", "1,4,B"),
    ],
)
def test_matmul_with_a_constant_left_side_is_a_convolution(tmp_path: Path, w: tuple[int, ...], x: str, y: str) -> None:
    check_exact(save(tmp_path, f"g (float[{x}] x) => (float[{y}] y) {{ y = MatMul(w, x) }}", {"w": weights(w)}))


def test_matrix_that_the_graph_computes_from_weights_is_a_kernel(tmp_path: Path) -> None:
    text = """g (float[B,5,8] x) => (float[B,5,4] y) <float[8,4] v> { v = Transpose<perm=[1,0]>(w) y = MatMul(x, v) }"""

    check_exact(save(tmp_path, text, {"w": weights((4, 8))}))


def test_intermediate_product_keeps_its_name_for_all_readers(tmp_path: Path) -> None:
    text = """g (float[B,8] x) => (float[B,8] h, float[B,8] y)
    { h = MatMul(x, w) r = Relu(h) s = MatMul(r, w) y = Add(s, h) }"""
    path = save(tmp_path, text, {"w": weights((8, 8))})

    rewrite = check_exact(path, converted=2)

    assert [output.name for output in rewrite.model.graph.output] == ["h", "y"]
    assert [item.name for item in rewrite.model.graph.input] == ["x"]


# ---- Einsum ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equation", "x", "w", "y"),
    [
        ("bij,jk->bik", "B,5,8", (8, 4), "B,5,4"),
        ("b i j, k j -> b k i", "B,5,8", (4, 8), "B,4,5"),
        ("bjc,ck", "B,5,8", (8, 4), "B,5,4"),
        ("bchw,ck->bhwk", "B,8,3,5", (8, 4), "B,3,5,4"),
        ("bhij,khj->bik", "B,2,5,8", (4, 2, 8), "B,5,4"),
        ("bij,ijk->bk", "B,5,8", (5, 8, 4), "B,4"),
        ("bi,j->bij", "B,5", (4,), "B,5,4"),
    ],
)
def test_einsum_with_a_constant_is_a_convolution(
    tmp_path: Path, equation: str, x: str, w: tuple[int, ...], y: str
) -> None:
    text = f'g (float[{x}] x) => (float[{y}] y) {{ y = Einsum<equation="{equation}">(x, w) }}'

    check_exact(save(tmp_path, text, {"w": weights(w)}))


def test_einsum_of_one_tensor_is_left_alone(tmp_path: Path) -> None:
    path = save(tmp_path, 'g (float[B,5,8] x) => (float[B,8,5] y) { y = Einsum<equation="bij->bji">(x) }')

    rewrite = rewrite_gemm(path, policy="conv")

    assert (rewrite.converted, rewrite.halved, rewrite.left) == ((), (), ())


# ---- what no convolution can do ----------------------------------------------------------------------------

ATTENTION = """g (float[B,2,5,8] q, float[B,2,8,5] k, float[B,2,5,8] v) => (float[B,2,5,8] y)
{ [scores] s = MatMul(q, k) p = Softmax<axis=-1>(s) [mix] y = MatMul(p, v) }"""


def test_attention_is_left_with_the_reason(tmp_path: Path) -> None:
    rewrite = rewrite_gemm(save(tmp_path, ATTENTION), policy="conv")

    assert [(left.name, left.op_type) for left in rewrite.left] == [("scores", "MatMul"), ("mix", "MatMul")]
    assert all("two computed tensors" in left.reason and left.is_product for left in rewrite.left)
    assert ops(rewrite) == ["MatMul", "Softmax", "MatMul"]


def test_attention_is_halved_on_request(tmp_path: Path) -> None:
    path = save(tmp_path, ATTENTION)

    rewrite = rewrite_gemm(path, policy="fp16")

    assert rewrite.halved == ("scores", "mix")
    assert ops(rewrite).count("Cast") == 6
    _, max_rel = prove_rewrite(path, rewrite, feeds(path))
    assert 0 < max_rel < 5e-3


def test_attention_is_multiplied_and_summed_on_request(tmp_path: Path) -> None:
    check_exact(save(tmp_path, ATTENTION), policy="sum", converted=2)


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("y = MatMul(x, z)", ("B,5,8", "B,8,4", "B,5,4")),
        ("y = MatMul(x, z)", ("B,3,5,8", "B,1,8,4", "B,3,5,4")),
        ("y = MatMul(x, z)", ("B,3,5,8", "3,8,4", "B,3,5,4")),
        ("y = MatMul(x, z)", ("B,8", "B,8,4", None)),
        ('y = Einsum<equation="bij,bjk->bik">(x, z)', ("B,5,8", "B,8,4", "B,5,4")),
        ('y = Einsum<equation="bij,bij->bij">(x, z)', ("B,5,8", "B,5,8", "B,5,8")),
        ('y = Einsum<equation="bhc,bwc->bhwc">(x, z)', ("B,5,8", "B,4,8", "B,5,4,8")),
        ('y = Einsum<equation="bij,bij->b">(x, z)', ("B,5,8", "B,5,8", "B")),
    ],
)
def test_product_of_two_tensors_is_multiplied_and_summed_on_request(
    tmp_path: Path, text: str, shapes: tuple[str, str, str | None]
) -> None:
    x, z, y = shapes
    if y is None:
        x, z, y = "B,1,8", "B,8,4", "B,1,4"

    check_exact(save(tmp_path, f"g (float[{x}] x, float[{z}] z) => (float[{y}] y) {{ {text} }}"), policy="sum")


def test_constant_with_one_matrix_per_group_is_left_with_the_reason(tmp_path: Path) -> None:
    text = "g (float[B,3,5,8] x) => (float[B,3,5,4] y) { y = MatMul(x, w) }"
    path = save(tmp_path, text, {"w": weights((3, 8, 4))})

    assert "one matrix per group" in rewrite_gemm(path, policy="conv").left[0].reason
    check_exact(path, policy="sum")


@pytest.mark.parametrize(
    ("equation", "inputs", "reason"),
    [
        ("...ij,jk->...ik", "x, w", "leaves axes unnamed"),
        ("bii,jk->bjk", "x, w", "takes a diagonal"),
        ("bij,jk,kl->bil", "x, w, w", "multiplies 3 tensors"),
        ("bij,jk->bk", "x, w", "one matrix per group"),
    ],
)
def test_unusual_einsum_is_left_with_the_reason(tmp_path: Path, equation: str, inputs: str, reason: str) -> None:
    text = f'g (float[B,8,8] x) => (float[B,N,M] y) {{ y = Einsum<equation="{equation}">({inputs}) }}'

    (left,) = rewrite_gemm(save(tmp_path, text, {"w": weights((8, 8))}), policy="conv").left

    assert reason in left.reason


def test_tensor_without_known_shape_is_left_with_the_reason(tmp_path: Path) -> None:
    text = "g (float[B,8] x, int64[N] s) => (float[] y) { z = Reshape(x, s) m = MatMul(z, w) y = ReduceSum(m) }"

    (left,) = rewrite_gemm(save(tmp_path, text, {"w": weights((8, 8))}), policy="conv").left

    assert "'z' is not known" in left.reason


@pytest.mark.parametrize(
    ("text", "w"),
    [
        ("g (float[B,S,8] x) => (float[B,S,4] y) { y = MatMul(x, w) }", (8, 4)),
        ("g (float[B,8,S] x) => (float[B,4,S] y) { y = MatMul(w, x) }", (4, 8)),
        ('g (float[B,8,S] x) => (float[S,B,4] y) { y = Einsum<equation="bis,io->sbo">(x, w) }', (8, 4)),
    ],
)
def test_several_open_dimensions_are_read_when_it_runs(tmp_path: Path, text: str, w: tuple[int, ...]) -> None:
    path = save(tmp_path, text, {"w": weights(w)})

    rewrite = check_exact(path)

    x = weights((2, 7, 8) if "S,8" in text else (2, 8, 7))
    assert prove_rewrite(path, rewrite, [{"x": x}])[1] <= EXACT


LSTM = """g (float[5,B,4] x) => (float[5,1,B,6] y, float[1,B,6] c) { y, , c = LSTM<hidden_size=6>(x, w, r) }"""


def test_recurrent_layer_is_halved_on_request_and_left_otherwise(tmp_path: Path) -> None:
    path = save(tmp_path, LSTM, {"w": weights((1, 24, 4)), "r": weights((1, 24, 6))})

    (left,) = rewrite_gemm(path, policy="conv").left
    assert (left.op_type, left.is_product, left.reason) == ("LSTM", False, "SM75 has no float32 LSTM")
    assert len(rewrite_gemm(path, policy="fp16").halved) == 1


def test_3d_convolution_is_halved_on_request_and_left_otherwise(tmp_path: Path) -> None:
    text = "g (float[B,8,5,5,5] x) => (float[B,4,5,5,5] y) { y = Conv(x, w) }"
    path = save(tmp_path, text, {"w": weights((4, 8, 1, 1, 1))})

    (left,) = rewrite_gemm(path, policy="sum").left
    assert (left.op_type, left.is_product, left.reason) == ("Conv", False, "SM75 has no float32 3-D convolution")
    assert len(rewrite_gemm(path, policy="fp16").halved) == 1


def test_weights_beyond_float16_are_not_halved(tmp_path: Path) -> None:
    text = "g (float[B,3,5,8] x) => (float[B,3,5,4] y) { y = MatMul(x, w) }"

    rewrite = rewrite_gemm(save(tmp_path, text, {"w": weights((3, 8, 4)) * np.float32(1e6)}), policy="fp16")

    assert rewrite.halved == ()
    assert "'w' does" in rewrite.left[0].reason


# ---- what is not touched, and where things lie -------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "double", "int32"])
def test_products_of_other_types_are_left_alone(tmp_path: Path, dtype: str) -> None:
    text = f"g ({dtype}[B,8] x, {dtype}[8,4] w) => ({dtype}[B,4] y) {{ y = MatMul(x, w) }}"

    rewrite = rewrite_gemm(save(tmp_path, text), policy="fp16")

    assert ops(rewrite) == ["MatMul"]
    assert (rewrite.converted, rewrite.halved, rewrite.left) == ((), (), ())


IN_BODIES = """g (float[B,8] x, bool c) => (float[B,8] y) {
  y = If(c) <
    then_branch = yes () => (float[B,8] o) { h = Relu(x) o = MatMul(h, w) },
    else_branch = no () => (float[B,8] p) { p = Gemm(x, w) }
  >
}"""


def test_products_in_bodies_are_rewritten_too(tmp_path: Path) -> None:
    path = save(tmp_path, IN_BODIES, {"w": weights((8, 8))})

    rewrite = rewrite_gemm(path, policy="conv")

    assert len(rewrite.converted) == 2
    cases = [{**feed, "c": np.array(flag)} for feed in feeds(path) for flag in (True, False)]
    assert prove_rewrite(path, rewrite, cases)[1] <= EXACT


def test_products_in_local_functions_are_rewritten_too(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        """
    <ir_version: 8, opset_import: ["" : 18, "mine" : 1]>
    g (float[B,8] x) => (float[B,4] y) <float[8,4] w = {0}> { h = mine.linear(x, w) y = Relu(h) }
    <opset_import: ["" : 18], domain: "mine"> linear (a, b) => (c) { c = MatMul(a, b) }""".replace(
            "{0}", "{" + ",".join(["0.5"] * 32) + "}"
        )
    )
    onnx.save(model, str(tmp_path / "net.onnx"))

    check_exact(tmp_path / "net.onnx")


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    text = "g (float[B,128] x) => (float[B,128] y) { h = MatMul(x, w) t = Tanh(h) y = Gemm(t, w, c) }"
    path = save(tmp_path, text, {"w": weights((128, 128)), "c": weights((128,))}, external=True)

    rewrite = check_exact(path, converted=2)

    assert rewrite.model.ByteSize() < 10_000
    stored = [tensor for tensor in rewrite.model.graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in stored} == {"w", "c"}


def test_digest_is_the_same_each_time_and_differs_between_policies(tmp_path: Path) -> None:
    path = save(tmp_path, ATTENTION)

    digests = {policy: digest(rewrite_gemm(path, policy=policy)) for policy in ("conv", "sum", "fp16")}

    assert len(set(digests.values())) == 3
    assert digest(rewrite_gemm(path, policy="sum")) == digests["sum"]


def test_garbage_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\xff" * 40)

    with pytest.raises(ModelFileError, match=r"net\.onnx"):
        rewrite_gemm(tmp_path / "net.onnx", policy="conv")


def test_unknown_policy_is_misuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="conv, sum, fp16"):
        rewrite_gemm(tmp_path / "net.onnx", policy="int8")


# ---- TensorRT for RTX itself -------------------------------------------------------------------------------


def build_for_sm75(graph: bytes, folder: Path) -> str:
    """Build a plan for SM75; returns what the builder says is wrong, or nothing."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'dsc-split[rtx]'")

    class Logger(trt.ILogger):  # type: ignore[misc]  # a native base class
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if int(severity) <= int(trt.ILogger.ERROR):
                self.errors.append(text)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(graph, str(folder / "net.onnx")), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM75, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if -1 in tensor.shape:
            profile.set_shape(tensor.name, *[[n if dim == -1 else dim for dim in tensor.shape] for n in (1, 2, 4)])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    return "" if plan is not None else "\n".join(logger.errors)


BUILT = {
    "classifier": (
        """g (float[B,3,8,8] x) => (float[B,10] y)
        { a = GlobalAveragePool(x) f = Flatten(a) y = Gemm<transB=1>(f, w, c) }""",
        {"w": weights((10, 3)), "c": weights((10,))},
    ),
    "linear": (
        "g (float[B,5,8] x) => (float[B,5,4] y) { h = MatMul(x, w) y = Add(h, c) }",
        {"w": weights((8, 4)), "c": weights((4,))},
    ),
    "left": ("g (float[B,8,5] x) => (float[B,4,5] y) { y = MatMul(w, x) }", {"w": weights((4, 8))}),
    "open": ("g (float[B,S,8] x) => (float[B,S,4] y) { y = MatMul(x, w) }", {"w": weights((8, 4))}),
    "einsum": (
        'g (float[B,8,5] x) => (float[B,5,4] y) { y = Einsum<equation="bij,ik->bjk">(x, w) }',
        {"w": weights((8, 4))},
    ),
    "body": (IN_BODIES, {"w": weights((8, 8))}),
    "attention": (ATTENTION, {}),
    "recurrent": (LSTM, {"w": weights((1, 24, 4)), "r": weights((1, 24, 6))}),
}


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("classifier", "conv"),
        ("linear", "conv"),
        ("left", "conv"),
        ("open", "conv"),
        ("einsum", "conv"),
        ("body", "conv"),
        ("attention", "sum"),
        ("attention", "fp16"),
        ("recurrent", "fp16"),
    ],
)
def test_rewritten_graph_builds_for_sm75_and_the_original_does_not(tmp_path: Path, name: str, policy: str) -> None:
    text, initializers = BUILT[name]
    path = save(tmp_path, text, initializers, external=bool(initializers))

    assert "FP32 GEMM is not supported" in build_for_sm75(path.read_bytes(), tmp_path)
    rewrite = rewrite_gemm(path, policy=policy)
    assert build_for_sm75(rewrite.model.SerializeToString(), tmp_path) == ""


def test_attention_that_was_left_is_refused_for_sm75_by_name(tmp_path: Path) -> None:
    rewrite = rewrite_gemm(save(tmp_path, ATTENTION), policy="conv")

    assert "'scores'" in build_for_sm75(rewrite.model.SerializeToString(), tmp_path)
