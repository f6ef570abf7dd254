"""The paper's networks: how many natural bottlenecks, and which are compressive, element ratio, block outputs alone.

The numbers were recomputed from the networks' block outputs and equal those the paper prints.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsc_split.partitioner import CutList, CutOptions, SourceOptions, list_cuts

pytestmark = pytest.mark.slow

# net, input size, blocks, natural, {block index: ratio} of the compressive ones
GOLDEN = [
    ("efficientnet_b0", 224, 16, 15, {1: 0.5000, 3: 0.2083, 5: 0.1042, 11: 0.0625}),
    ("efficientnet_b1", 240, 23, 21, {2: 0.5000, 5: 0.2083, 8: 0.1042, 16: 0.0711}),
    ("efficientnet_b2", 260, 23, 21, {2: 0.5000, 5: 0.2578, 8: 0.1254, 16: 0.0831}),
    ("efficientnet_b3", 300, 26, 24, {2: 0.6667, 5: 0.2567, 8: 0.1284, 18: 0.0859}),
    ("efficientnet_b4", 380, 32, 30, {2: 0.6667, 6: 0.2978, 10: 0.1489, 22: 0.0904}),
    ("efficientnet_b5", 456, 39, 36, {3: 0.8333, 8: 0.3333, 13: 0.1726, 27: 0.1096}),
    ("efficientnet_b6", 528, 45, 42, {3: 0.8333, 9: 0.3750, 15: 0.1875, 31: 0.1189}),
    ("efficientnet_b7", 600, 55, 44, {11: 0.4167, 18: 0.2139, 38: 0.1284}),
    ("tf_efficientnetv2_b0", 224, 21, 20, {1: 0.6667, 3: 0.2500, 5: 0.1250, 13: 0.0625}),
    ("tf_efficientnetv2_b1", 240, 27, 25, {2: 0.6667, 5: 0.2500, 8: 0.1250, 18: 0.0711}),
    ("tf_efficientnetv2_b2", 260, 28, 26, {2: 0.6667, 5: 0.3007, 8: 0.1482, 18: 0.0831}),
    ("tf_efficientnetv2_b3", 300, 32, 30, {2: 0.8333, 5: 0.2995, 8: 0.1497, 20: 0.0859}),
    ("tf_efficientnetv2_s", 384, 40, 34, {6: 0.3333, 10: 0.1667, 25: 0.0833}),
    ("tf_efficientnetv2_m", 480, 57, 49, {8: 0.4167, 13: 0.2083, 34: 0.0990}),
    ("tf_efficientnetv2_l", 480, 79, 68, {11: 0.5000, 18: 0.2500, 47: 0.1250}),
]


EXPORTED = [row for row in GOLDEN if row[0] in ("efficientnet_b0", "tf_efficientnetv2_s")]
"""One of each family. The others are built of the same timm modules, only more and wider ones, and PyTorch exports
about two blocks in a second. efficientnet_b4, as torchvision has it, is in test_networks.py."""


def block_shapes(net: str, size: int) -> list[tuple[int, ...]]:
    """Return the shapes of the network's input and of its blocks' outputs, from PyTorch without any numbers."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(net).eval()
        image = torch.empty(1, 3, size, size)
    shapes = [tuple(image.shape)]
    stages: Any = model.blocks  # as PyTorch declares it, it may be a tensor
    for stage in stages:
        for block in stage:
            block.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    model(image)
    return shapes


def chain(shapes: list[tuple[int, ...]]) -> onnx.ModelProto:
    """Make a network of one convolution for each block, with outputs of the same shapes, and a mean at its end."""
    nodes, weights = [], []
    for number, (before, after) in enumerate(itertools.pairwise(shapes)):
        stride = -(-before[2] // after[2])
        weights.append(numpy_helper.from_array(np.zeros((after[1], before[1], 1, 1), np.float32), f"w{number}"))
        nodes.append(
            helper.make_node("Conv", [f"t{number}", f"w{number}"], [f"t{number + 1}"], strides=[stride, stride])
        )
    nodes.append(helper.make_node("GlobalAveragePool", [f"t{len(shapes) - 1}"], ["y"]))
    x = helper.make_tensor_value_info("t0", TensorProto.FLOAT, ["batch", *shapes[0][1:]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", shapes[-1][1], 1, 1])
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def check_bottlenecks(found: CutList, blocks: int, natural: int, compressive: dict[int, float]) -> None:
    assert len(found.cuts) == blocks
    assert sum(cut.natural for cut in found.cuts) == natural
    assert {index: round(cut.ratio, 4) for index, cut in enumerate(found.cuts) if cut.compressive} == compressive


@pytest.mark.parametrize(("net", "size", "blocks", "natural", "compressive"), GOLDEN, ids=[row[0] for row in GOLDEN])
def test_bottlenecks_of_the_papers_networks(
    tmp_path: Path, net: str, size: int, blocks: int, natural: int, compressive: dict[int, float]
) -> None:
    shapes = block_shapes(net, size)
    onnx.save(chain(shapes), str(tmp_path / "chain.onnx"))

    found = list_cuts(str(tmp_path / "chain.onnx"), SourceOptions(), CutOptions(ratio="elements"))

    assert [cut.elements for cut in found.cuts] == [math.prod(shape) for shape in shapes[1:]]
    check_bottlenecks(found, blocks, natural, compressive)


@pytest.mark.parametrize(
    ("net", "size", "blocks", "natural", "compressive"), EXPORTED, ids=[row[0] for row in EXPORTED]
)
def test_bottlenecks_are_found_in_what_pytorch_exports(
    net: str, size: int, blocks: int, natural: int, compressive: dict[int, float]
) -> None:
    found = list_cuts(
        f"timm:{net}",
        SourceOptions(input_shapes=(f"3,{size},{size}",), weights="random", calibrate=False),
        CutOptions(modules="blocks.*.*", ratio="elements"),
    )

    check_bottlenecks(found, blocks, natural, compressive)


def test_bottlenecks_of_vgg16() -> None:
    found = list_cuts(
        "torchvision:vgg16",
        SourceOptions(input_shapes=("3,224,224",), weights="random", calibrate=False),
        CutOptions(modules="features.*", ratio="elements"),
    )

    # conv and pool layers of torchvision's VGG-16 by index: each convolution counts with the ReLU after it
    assert [cut.modules[-1] for cut in found.cuts if cut.natural] == [
        "features.23",  # pool4
        "features.25",  # conv5_1 with its ReLU
        "features.27",
        "features.29",
        "features.30",  # pool5
    ]
