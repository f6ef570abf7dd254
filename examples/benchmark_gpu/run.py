"""Time one TensorRT engine three ways: with ``dsc-split bench``, a bare loop, and trtexec where that is there."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import math
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsc_split.benchmarks import BenchSettings, bench_bundle
from dsc_split.bundle import Bundle
from dsc_split.engines import build_engines, get_backend
from dsc_split.engines._engine_file import export_raw
from dsc_split.engines._options import BuildOptions
from dsc_split.engines.gpu._state import gpu_facts, gpu_state
from dsc_split.engines.side._inputs import engine_inputs
from dsc_split.engines.side._load import SideEngines
from dsc_split.errors import BackendUnavailable, DscError, UsageError

TOOLS = {"tensorrt": "trtexec", "tensorrt_rtx": "tensorrt_rtx"}
"""What NVIDIA's own benchmark is called, by library."""
WARM_UP_S = 1.0
SUMMARY = re.compile(r"\] (?P<name>Latency|GPU Compute Time): .*?median = (?P<ms>[0-9.]+) ms")


@dataclass(frozen=True, kw_only=True)
class Times:
    """Medians of one way to run an engine."""

    host_ms: float
    """Inputs and outputs in host memory, copies included."""
    compute_ms: float
    """Between two events around the computation."""


def read_summary(text: str) -> Times:
    """Read the performance summary that trtexec prints."""
    found = {match["name"]: float(match["ms"]) for match in SUMMARY.finditer(text)}
    if len(found) < 2:
        raise DscError(f"no performance summary in what the tool printed: {text.strip()[-300:]!r}")
    return Times(host_ms=found["Latency"], compute_ms=found["GPU Compute Time"])


def time_by_tool(tool: str, plan: Path, inputs: Mapping[str, np.ndarray]) -> Times:
    """Run NVIDIA's own benchmark on a bare plan."""
    shapes = ",".join(f"{name}:{'x'.join(map(str, array.shape))}" for name, array in inputs.items())
    command = [tool, f"--loadEngine={plan}", f"--shapes={shapes}", f"--warmUp={1000 * WARM_UP_S:g}", "--duration=3"]
    if Path(tool).name == "trtexec":
        command.append("--useCudaGraph")
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    return read_summary(done.stdout + done.stderr)


def time_by_loop(library: str, plan: bytes, inputs: Mapping[str, np.ndarray], calls: int) -> Times:
    """Run a bare plan with the library and the CUDA runtime alone: pinned memory, one stream, no graph."""
    trt = importlib.import_module(library)
    cuda = importlib.import_module("cuda.bindings.runtime")

    def value(answer: tuple[Any, ...]) -> Any:
        error, *values = answer
        if int(error):
            raise DscError(f"CUDA says {error!r}")
        return values[0] if values else None

    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    for name, array in inputs.items():
        context.set_input_shape(name, array.shape)
    stream = value(cuda.cudaStreamCreate())
    start, end = value(cuda.cudaEventCreate()), value(cuda.cudaEventCreate())
    uploads, downloads = [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
        size_bytes = math.prod(context.get_tensor_shape(name)) * dtype.itemsize
        host, device = value(cuda.cudaHostAlloc(size_bytes, 0)), value(cuda.cudaMalloc(size_bytes))
        context.set_tensor_address(name, int(device))
        if name in inputs:
            ctypes.memmove(int(host), np.ascontiguousarray(inputs[name]).ctypes.data, size_bytes)
            uploads.append((device, host, size_bytes, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice, stream))
        else:
            downloads.append((host, device, size_bytes, cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream))

    host_ms: list[float] = []
    compute_ms: list[float] = []
    warm_at = time.perf_counter() + WARM_UP_S
    while len(host_ms) < calls:
        started = time.perf_counter()
        for copy in uploads:
            cuda.cudaMemcpyAsync(*copy)
        cuda.cudaEventRecord(start, stream)
        if not context.execute_async_v3(int(stream)):
            raise DscError("the engine cannot be run")
        cuda.cudaEventRecord(end, stream)
        for copy in downloads:
            cuda.cudaMemcpyAsync(*copy)
        value(cuda.cudaStreamSynchronize(stream))
        ended = time.perf_counter()
        if ended > warm_at:
            host_ms.append(1e3 * (ended - started))
            compute_ms.append(value(cuda.cudaEventElapsedTime(start, end)))
    return Times(host_ms=statistics.median(host_ms), compute_ms=statistics.median(compute_ms))


def usable_targets() -> Iterable[str]:
    """List the TensorRT targets that run here; says why the others do not."""
    capability = gpu_facts().get("compute_capability")
    if capability is None:
        print(f"no GPU to time: {gpu_state().get('unreadable', 'NVML does not tell what it is')}")
        return
    for name in ("tensorrt:cuda", f"tensorrt-rtx:sm{capability.replace('.', '')}"):
        try:
            get_backend(name).run_fingerprint()
        except (BackendUnavailable, UsageError) as e:
            print(f"{name} is left out: {e}")
        else:
            yield name


def compare(bundle: Bundle, target: str, batches: tuple[int, ...]) -> None:
    """Print what each way takes at each batch size."""
    built = build_engines(bundle, "device", target, BuildOptions(batches=batches)).rows[0]
    if built.path is None:
        raise DscError(f"{target}: {built.reason}")
    side = SideEngines(bundle, "device", target)
    library = side.backend.build_fingerprint()["library"]
    settings = BenchSettings(precision_goal=0.01, time_limit_s=5.0)
    result = bench_bundle(bundle, sides=["device"], device=target, batches=batches, settings=settings)
    cells = {cell.batch: cell for cell in result.cells if cell.graph == built.graph}
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "bare.plan"
        export_raw(bundle.file(built.path), plan)
        for batch in batches:
            cell = cells[batch]
            if cell.latency_ms is None or cell.compute_ms is None:
                print(f"{target} batch {batch}: {cell.status}: {cell.reason}")
                continue
            inputs = engine_inputs(bundle, side.graphs[0], [info.name for info in bundle.inputs], batch)
            ours = Times(host_ms=cell.latency_ms["median"], compute_ms=cell.compute_ms["median"])
            loop = time_by_loop(library, plan.read_bytes(), inputs, calls=500)
            print_row(target, batch, "dsc-split bench", ours, ours)
            print_row(target, batch, "bare loop", loop, ours)
            tool = shutil.which(TOOLS[library])
            if tool is None:
                print(f"{'':>32}  {TOOLS[library]} is not on PATH")
            else:
                print_row(target, batch, TOOLS[library], time_by_tool(tool, plan, inputs), ours)
            graph, marks = cell.environment["engine"].get("cuda_graph"), ", ".join(cell.marks) or "none"
            print(f"{'':>32}  CUDA graph: {graph}; marks: {marks}")


def print_row(target: str, batch: int, way: str, times: Times, ours: Times) -> None:
    ratios = f"{ours.host_ms / times.host_ms:>9.3f} {ours.compute_ms / times.compute_ms:>9.3f}"
    print(f"{target:>20} {batch:>5} {way:>16} {times.host_ms:>9.4f} {times.compute_ms:>11.4f} {ratios}")


def chain_of_convolutions(path: Path, channels: int = 48, layers: int = 12) -> None:
    """Write a network that no cut makes smaller, so that the whole model alone is timed."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    values = np.random.default_rng(0)
    nodes, weights, last, before = [], [], "x", 3
    for i in range(layers):
        kernel = values.standard_normal((channels, before, 3, 3), dtype=np.float32) / (3 * before**0.5)
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [last, f"w{i}"], [f"c{i}"], pads=[1] * 4, name=f"conv{i}"))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], name=f"relu{i}"))
        last, before = f"r{i}", channels
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 112, 112])
    y = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", channels, 112, 112])
    graph = helper.make_graph(nodes, "chain", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", help="what to export and time; default: a chain of convolutions")
    parser.add_argument("--batches", default="1,8")
    options = parser.parse_args()
    batches = tuple(sorted({int(batch) for batch in options.batches.split(",")}))

    bundle = None
    with tempfile.TemporaryDirectory() as folder:
        for target in usable_targets():
            if bundle is None:
                from dsc_split.partitioner import export_bundle

                source = options.source or str(Path(folder) / "chain.onnx")
                if options.source is None:
                    chain_of_convolutions(Path(source))
                bundle = export_bundle(source, Path(folder) / "bundle")
                facts = gpu_facts()
                print(f"{facts.get('name')}, driver {facts.get('driver_version')}, medians in ms; ratio: ours to this")
                titles = ("target", "batch", "timed by", "host", "compute", "ratio", "ratio")
                print("{:>20} {:>5} {:>16} {:>9} {:>11} {:>9} {:>9}".format(*titles))
            compare(bundle, target, batches)


if __name__ == "__main__":
    main()
