"""Time one ONNX Runtime session twice, side by side: with the timer of ``dsc-split bench``, and with a bare loop."""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from dsc_split.benchmarks.sweep._timer import time_calls
from dsc_split.engines import get_backend


def small_network(path: Path, channels: int, layers: int) -> None:
    """Write a chain of convolutions."""
    values = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for index in range(layers):
        kernel = values.standard_normal((channels, channels, 3, 3), dtype=np.float32) / (3 * channels**0.5)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"y{index}"], pads=[1, 1, 1, 1]))
        last = f"y{index}"
    shape = [1, channels, 56, 56]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", last)]
    graph = helper.make_graph(nodes, "network", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.write_bytes(model.SerializeToString())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="onnxruntime:cpu,threads=1")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()

    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}, {options.target}, medians of {options.rounds} rounds")
    print(f"{'network':>20} {'calls':>6} {'bare loop':>12} {'dsc-split':>12} {'difference':>11}")
    for channels, layers, calls in ((4, 1, 400), (16, 4, 100), (48, 8, 10)):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            small_network(path, channels, layers)
            engine = get_backend(options.target).load(path)
        feeds = {"x": np.random.default_rng(1).standard_normal((1, channels, 56, 56), dtype=np.float32)}
        call = engine.bind(feeds)
        session = engine._session  # the very session that the engine runs, for the bare loop
        bare_ms, timed_ms = [], []
        time_calls(call, calls)
        for _ in range(options.rounds):  # in turn, so that drift of the machine hits both alike
            for _ in range(calls):
                start = time.perf_counter()
                session.run(["y" + str(layers - 1)], feeds)
                bare_ms.append(1e3 * (time.perf_counter() - start))
            timed_ms += [sample / 1e6 for sample in time_calls(call, calls)]
        bare, timed = statistics.median(bare_ms), statistics.median(timed_ms)
        name = f"{layers} x {channels} channels"
        print(f"{name:>20} {len(timed_ms):>6} {bare:>9.4f} ms {timed:>9.4f} ms {timed / bare - 1:>+10.2%}")


if __name__ == "__main__":
    main()
