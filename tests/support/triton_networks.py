"""Networks whose cuts have what a server has to cope with, as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LEFT = 'left "ä"\\:0'
"""A name that has to be quoted wherever it is written."""


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    **weights: object,
) -> Path:
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, path.stem, inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )
    path.write_bytes(model.SerializeToString())
    return path


def two_branches(path: Path, *, seed: int = 0) -> Path:
    """Save a network with an exit, two branches that cross together, and an input that is read late.

    ::

        image -> w1 -> a -+-> left ---> w4 --+-> sum -> * -> final -> label
                          +-> right --> w5 --+          |
                          +-> pool -> early             scale
    """
    values = np.random.default_rng(seed)

    def weight(*shape: int) -> Any:
        return np.multiply(values.standard_normal(shape, dtype=np.float32), np.float32(0.2))

    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["a"]),
        helper.make_node("ReduceMean", ["a", "axes"], ["pool"], keepdims=0),
        helper.make_node("Gemm", ["pool", "w2"], ["early"]),
        helper.make_node("Conv", ["a", "w3"], [LEFT], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Conv", ["a", "w6"], ["right"], strides=[4, 4]),
        helper.make_node("Flatten", [LEFT], ["l"]),
        helper.make_node("Flatten", ["right"], ["r"]),
        helper.make_node("Gemm", ["l", "w4"], ["lw"]),
        helper.make_node("Gemm", ["r", "w5"], ["rw"]),
        helper.make_node("Add", ["lw", "rw"], ["sum"]),
        helper.make_node("Unsqueeze", ["scale", "one"], ["s"]),
        helper.make_node("Mul", ["sum", "s"], ["final"]),
        helper.make_node("ArgMax", ["final"], ["label"], axis=1, keepdims=0),
    ]
    inputs = [
        helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 16, 16]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, ["batch"]),
    ]
    outputs = [
        helper.make_tensor_value_info("early", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("final", TensorProto.FLOAT, ["batch", 32]),
        helper.make_tensor_value_info("label", TensorProto.INT64, ["batch"]),
    ]
    return save(
        path,
        nodes,
        inputs,
        outputs,
        w1=weight(16, 3, 3, 3),
        w2=weight(16, 4),
        w3=weight(3, 16, 3, 3),
        w4=weight(192, 32),
        w5=weight(32, 32),
        w6=weight(2, 16, 1, 1),
        axes=np.array([2, 3]),
        one=np.array([1]),
    )


def sequence(path: Path) -> Path:
    """Save a network whose batch is on axis 1: ``x (5, batch, 4) -> a -> y (5, batch, 2)``."""
    values = np.random.default_rng(7)
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("MatMul", ["a", "w2"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, "batch", 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, "batch", 2])]
    first, second = (values.standard_normal(shape, dtype=np.float32) for shape in ((4, 3), (3, 2)))
    return save(path, nodes, inputs, outputs, w1=first, w2=second)
