from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from dsc_split.errors import UsageError
from dsc_split.partitioner._preprocess import add_uint8_input

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def model(dtype: str = "float", head: str = "y = Relu(image)") -> ir.Model:
    """image -> head -> y, and a second input that is no image."""
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
    net ({dtype}[batch,3,2,2] image, float[batch,3] vector) => ({dtype}[batch,3,2,2] y, float[batch,3] z) {{
        {head}
        z = Neg(vector)
    }}"""
    return ir.from_onnx_text(text)


def run(graph: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    return list(session.run(None, feeds))


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype", "tolerance"), [("float", "float32", 1e-6), ("float16", "float16", 4e-3)]
)
def test_an_8_bit_image_is_scaled_and_normalised_inside_of_the_graph(
    dtype: str, numpy_dtype: str, tolerance: float
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 2, 2), dtype=np.uint8)
    vector = np.ones((2, 3), np.float32)
    changed = add_uint8_input(model(dtype), MEAN, STD)
    y, z = run(changed, {"image": image, "vector": vector})
    mean, std = (np.reshape(values, (1, 3, 1, 1)) for values in (MEAN, STD))
    wanted = np.maximum((image / 255 - mean) / std, 0)
    assert y.dtype == numpy_dtype
    np.testing.assert_allclose(y, wanted, atol=tolerance)
    np.testing.assert_array_equal(z, -vector)


def test_names_shapes_and_types_are_kept_and_known_for_every_value() -> None:
    changed = add_uint8_input(model(), MEAN, STD)
    graph = changed.graph
    assert [(value.name, value.dtype) for value in graph.inputs] == [
        ("image", ir.DataType.UINT8),
        ("vector", ir.DataType.FLOAT),
    ]
    assert [node.op_type for node in graph] == ["Cast", "Mul", "Add", "Relu", "Neg"]
    added = [node.outputs[0] for node in list(graph)[:3]]
    assert all(str(value.shape) == "[batch,3,2,2]" and value.dtype == ir.DataType.FLOAT for value in added)
    names = [value.name for node in graph for value in node.outputs]
    assert len(set(names)) == len(names)
    for value in graph.initializers.values():
        assert value.shape == [1, 3, 1, 1]


def test_an_image_that_is_also_an_output_goes_out_normalised() -> None:
    graph = model(head="y = Identity(image)")
    graph.graph.outputs[0] = graph.graph.inputs[0]
    changed = add_uint8_input(graph, MEAN, STD)
    assert changed.graph.outputs[0].dtype == ir.DataType.FLOAT


def test_a_model_without_an_image_is_refused_naming_its_inputs() -> None:
    with pytest.raises(UsageError, match=r"no input is a float image of 1 channels.*image FLOAT"):
        add_uint8_input(model(), (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("mean", "std"), [((), ()), ((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((float("nan"),), (1.0,)), ((0.5,), (-1.0,))]
)
def test_statistics_that_are_none_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="--std"):
        add_uint8_input(model(), mean, std)
