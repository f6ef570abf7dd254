"""Random graphs: the cuts against brute force over the file alone, and every pair against the whole."""

from __future__ import annotations

import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, bundle_cuts, export_bundle

MAX_TENSORS = 3
BATCH = 4
"""One that the proof does not try."""


@dataclass
class Net:
    """A graph in the making; every value is ``[batch, width]``, ``[2*batch, width]`` or of width times four."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, op_type: str, inputs: list[str], results: int = 1, **attributes: Any) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(results)]
        self.nodes.append(helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", **attributes))
        return names

    def numbers(self, *values: int) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name


@st.composite
def nets(draw: st.DrawFn) -> onnx.ModelProto:
    net = Net()
    values = [(f"x{i}", 4 * draw(st.integers(1, 2))) for i in range(draw(st.integers(1, 3)))]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in values]
    for _ in range(draw(st.integers(1, 10))):
        # Late values are likelier, so that graphs get deep.
        (name, width), (other, other_width) = (
            values[-1 - min(draw(st.integers(0, len(values) - 1)) for _ in range(2))] for _ in range(2)
        )
        kind = draw(st.sampled_from(["unary", "unary", "merge", "split", "fold", "like"]))
        if kind == "unary":
            values.append((net.add(draw(st.sampled_from(["Relu", "Neg", "Sin"])), [name])[0], width))
        elif kind == "merge" and width == other_width:
            values.append((net.add(draw(st.sampled_from(["Add", "Max"])), [name, other])[0], width))
        elif kind == "merge":
            values.append((net.add("Concat", [name, other], axis=1)[0], width + other_width))
        elif kind == "split" and width % 2 == 0:
            values += [(part, width // 2) for part in net.add("Split", [name], 2, axis=1, num_outputs=2)]
        elif kind == "fold" and width % 2 == 0:
            # There and back with the batch read off another value's shape, as exporters do it.
            folded = net.add("Reshape", [name, net.numbers(-1, width // 2)])[0]
            batch = net.add("Gather", [net.add("Shape", [other])[0], net.numbers(0)])[0]
            shape = net.add("Concat", [batch, net.numbers(width)], axis=0)[0]
            values.append((net.add("Reshape", [net.add("Neg", [folded])[0], shape])[0], width))
        elif kind == "like":
            # A constant as large as the batch: no data, yet the tail needs the batch for it.
            batch = net.add("Gather", [net.add("Shape", [other])[0], net.numbers(0)])[0]
            ones = net.add("ConstantOfShape", [net.add("Concat", [batch, net.numbers(1)], axis=0)[0]])[0]
            values.append((net.add("Add", [name, ones])[0], width))
    made = [value for value in values if not value[0].startswith("x")] or [(net.add("Relu", ["x0"])[0], values[0][1])]
    read = {name for node in net.nodes for name in node.input}
    last = [value for value in made if value[0] not in read] or [made[-1]]
    ends = dict([*last, *draw(st.lists(st.sampled_from(made), max_size=1))])
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in ends.items()]
    graph = helper.make_graph(net.nodes, "net", inputs, outputs, net.initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def crossing_by_brute_force(model: onnx.ModelProto) -> list[list[str]]:
    """For every place between two nodes that make data: what was made before it and is read after it."""
    inputs = [info.name for info in model.graph.input]
    data = set(inputs)
    steps = []
    for node in model.graph.node:
        if node.op_type != "Shape" and data & set(node.input):
            data |= set(node.output)
            steps.append(node)
    sets = []
    for place in range(1, len(steps) + 1):
        before = inputs + [name for node in steps[:place] for name in node.output]
        after = {name for node in steps[place:] for name in node.input}
        sets.append([name for name in before if name in after])
    distinct = [names for names, _ in itertools.groupby(sets)]
    return [names for names in distinct if 0 < len(names) <= MAX_TENSORS and not set(names) <= set(inputs)]


def run(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    values = session.run(names, {item.name: feed[item.name] for item in session.get_inputs()})
    return dict(zip(names, values, strict=True))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(model=nets())
def test_cuts_of_random_graphs_are_all_there_are_and_every_pair_is_the_whole(model: onnx.ModelProto) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx.save(model, str(folder / "net.onnx"))
        options = CutOptions(cuts="all", max_tensors=MAX_TENSORS)
        export = ExportOptions(source=SourceOptions(max_batch=3), cut=options)

        bundle = export_bundle(str(folder / "net.onnx"), folder / "out", export)
        found = bundle_cuts(bundle, options)

        expected = crossing_by_brute_force(onnx.load(str(bundle.model_path)))
        assert [[tensor.name for tensor in cut.tensors] for cut in found.cuts] == expected
        assert [split.name for split in bundle.splits] == [cut.name for cut in found.cuts]
        generator = np.random.default_rng(0)
        feed = {
            info.name: generator.standard_normal((BATCH, info.type.tensor_type.shape.dim[1].dim_value), np.float32)
            for info in model.graph.input
        }
        whole = run(folder / "net.onnx", feed)
        for split in bundle.splits:
            head = run(bundle.path / split.head, feed)
            sent = {tensor.name: (feed | head)[tensor.name] for tensor in split.tensors}
            assert sum(array.nbytes for array in sent.values()) == split.size_bytes(BATCH)
            tail = run(bundle.path / split.tail, sent)
            both = {name: head[name] for name in split.early_outputs} | tail
            assert both.keys() == whole.keys()
            for name, array in whole.items():
                np.testing.assert_allclose(both[name], array, rtol=1e-5, atol=1e-6)
