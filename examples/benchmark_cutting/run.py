"""Measure the cutting half: against onnx.utils.extract_model, on 10 GB of weights, on 100,000 nodes, at start-up.

Every figure is printed with the machine and the versions it was taken on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from dsc_split._support.hashing import sha256_file
from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, cut_bundle, export_bundle, find_cuts


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Time ``work`` and give the median."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def against_extract_model(folder: Path, model: str, repeats: int) -> None:
    """Cut every compressive pair, both ways from the same file, in turns."""
    options = ExportOptions(source=SourceOptions(max_batch=3, weights="random"), cut=CutOptions(prove=False))
    bundle = export_bundle(model, folder / "bundle", options)
    whole = str(bundle.model_path)
    inputs, outputs = ([info.name for info in infos] for infos in (bundle.inputs, bundle.outputs))
    weights = bundle.path / "onnx" / "weights.data"
    written_before = (sha256_file(weights), weights.stat().st_mtime_ns)

    def ours() -> None:
        cut_bundle(bundle, CutOptions(cuts="compressive", prove=False))

    def theirs() -> None:
        for split in bundle.splits:
            crossing = [tensor.name for tensor in split.tensors]
            onnx.utils.extract_model(whole, str(folder / "head.onnx"), inputs, crossing)
            onnx.utils.extract_model(whole, str(folder / "tail.onnx"), crossing, outputs)

    ours_s, theirs_s = [], []
    for _ in range(repeats):
        ours_s.append(seconds(ours, 1))
        theirs_s.append(seconds(theirs, 1))
    mine, other = statistics.median(ours_s), statistics.median(theirs_s)
    same = (sha256_file(weights), weights.stat().st_mtime_ns) == written_before
    print(f"{model}, {len(bundle.splits)} pairs, file to files, no proof, {repeats} repeats, medians")
    print(f"  cut_bundle {mine:.3f} s, onnx.utils.extract_model {other:.2f} s: {other / mine:.1f} times faster")
    print(f"  weights file written again: {'no' if same else 'YES'}")


CUT = """
import sys, time
from pathlib import Path
from dsc_split import Bundle
from dsc_split.partitioner import CutOptions, cut_bundle
start = time.perf_counter()
bundle = cut_bundle(Bundle.open(sys.argv[1]), CutOptions(cuts="all", prove=False))
taken_s = time.perf_counter() - start
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(len(bundle.splits), taken_s, int(status["VmHWM"].split()[0]) / 1024)
"""


def layers(count: int, width: int) -> onnx.ModelProto:
    """Make a chain of matrix products."""
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]) for i in range(count)]
    values = [helper.make_tensor_value_info(f"h{i}", TensorProto.FLOAT, ["batch", width]) for i in range(count + 1)]
    weights = [numpy_helper.from_array(np.ones((width, width), np.float32), f"w{i}") for i in range(count)]
    graph = helper.make_graph(nodes, "layers", values[:1], values[-1:], weights, value_info=values[1:-1])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def ten_gigabytes(folder: Path) -> None:
    """Cut a bundle whose weights are 10 GB: a small one, its matrices made large, the file sparse."""
    count, small, large = 20, 32, 11_200
    onnx.save(layers(count, small), str(folder / "layers.onnx"))
    bundle = export_bundle(
        str(folder / "layers.onnx"),
        folder / "large",
        ExportOptions(source=SourceOptions(max_batch=3), cut=CutOptions(prove=False)),
    )
    proto = onnx.load(str(bundle.model_path), load_external_data=False)
    size_bytes = large * large * 4
    for number, tensor in enumerate(proto.graph.initializer):
        tensor.dims[:] = [large, large]
        del tensor.external_data[:]
        for key, value in (("location", "weights.data"), ("offset", number * size_bytes), ("length", size_bytes)):
            tensor.external_data.add(key=key, value=str(value))
    for info in [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]:
        info.type.tensor_type.shape.dim[1].dim_value = large
    bundle.model_path.write_bytes(proto.SerializeToString())
    with (bundle.path / "onnx" / "weights.data").open("r+b") as file:
        file.truncate(count * size_bytes)
    with bundle.edit() as draft:
        listed = draft.manifest.files
        weights, graph = listed["onnx/weights.data"], listed["onnx/model.onnx"]
        sha256, graph_bytes = sha256_file(bundle.model_path), bundle.model_path.stat().st_size
        changed = {
            "onnx/weights.data": replace(weights, size_bytes=count * size_bytes),
            "onnx/model.onnx": replace(graph, sha256=sha256, size_bytes=graph_bytes),
        }
        draft.change(files={**listed, **changed})
    process = subprocess.run(
        [sys.executable, "-c", CUT, str(bundle.path)], capture_output=True, text=True, check=True
    )  # in a process of its own, for its memory
    pairs, taken_s, resident_mb = process.stdout.split()
    print(f"cut a bundle with {count * size_bytes / 1e9:.1f} GB of weights into {pairs} pairs, no proof")
    print(f"  {float(taken_s):.2f} s, {float(resident_mb):.0f} MiB resident at most")


def many_nodes(count: int) -> None:
    """Find all cuts of a long graph with a skip over every other node."""
    for size in (count // 10, count):
        nodes = []
        for i in range(size // 2):
            nodes.append(helper.make_node("Relu", [f"v{i}"], [f"r{i}"]))
            nodes.append(helper.make_node("Add", [f"v{i}", f"r{i}"], [f"v{i + 1}"]))
        infos = [
            helper.make_tensor_value_info(f"{kind}{i}", TensorProto.FLOAT, ["batch", 8])
            for i in range(size // 2 + 1)
            for kind in "vr"
        ]
        graph = helper.make_graph(nodes, "long", infos[:1], infos[-2:-1], value_info=infos[1:-2])
        model = ir.serde.deserialize_model(helper.make_model(graph))
        taken_s = seconds(lambda model=model: find_cuts(model), 3)  # type: ignore[misc]  # bound at once
        print(f"find all cuts of {size:,} nodes: {taken_s:.2f} s, {len(find_cuts(model).cuts):,} cuts")


def start_up(repeats: int) -> None:
    """Time the program's help and the import, each in fresh processes, with Python's own start taken off."""
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import dsc_split": [sys.executable, "-c", "import dsc_split"],
        "dsc-split --help": [sys.executable, "-m", "dsc_split.cli", "--help"],
    }
    for name, command in commands.items():
        taken_s = seconds(lambda command=command: subprocess.run(command, capture_output=True, check=True), repeats)  # type: ignore[misc]  # bound at once
        print(f"{name}: {taken_s:.3f} s in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="torchvision:efficientnet_b4")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=100_000)
    arguments = parser.parse_args()
    packages = ("dsc-split", "onnx", "onnx-ir", "torch")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(json.dumps({package: version(package) for package in packages}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        against_extract_model(folder, arguments.model, arguments.repeats)
        ten_gigabytes(folder)
    many_nodes(arguments.nodes)
    start_up(arguments.repeats)


if __name__ == "__main__":
    main()
