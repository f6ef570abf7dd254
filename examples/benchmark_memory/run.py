"""Load all tails of a bundle in ONNX Runtime on the processor, with and without sharing their weights."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import psutil

from dsc_split.bundle import Bundle

WEIGHTS = {
    "read from the file": None,
    "one buffer, copied": "0",
    "one buffer, shared": "1",
}
"""Where a session has its weights from, and what the option that shares the buffer is then."""
LAYOUTS = {
    "blocked": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "as stored": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
}
"""How the weights of convolutions lie in memory: in blocks for the processor's vectors, or as in the file."""
RUNS = 15


def added_mb(before: int) -> float:
    return (memory_bytes() - before) / 1e6


def memory_bytes() -> int:
    """Count this process's memory, pages that it shares with other processes in proportion."""
    return int(psutil.Process().memory_full_info().pss)


def measure(folder: Path, weights: str, layout: str) -> tuple[float, float, float]:
    """Load all tails and run each; returns MB after loading, MB after the runs, and the first tail's median ms."""
    bundle = Bundle.open(folder)
    weights_path = bundle.file(bundle.manifest.model.weights.path)
    before = memory_bytes()
    buffer = None if WEIGHTS[weights] is None else np.fromfile(weights_path, dtype=np.uint8)
    sessions = []
    for split in bundle.splits:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.graph_optimization_level = LAYOUTS[layout]
        model: str | bytes = str(bundle.file(split.tail))
        if buffer is not None:
            model = bundle.read(split.tail)
            options.add_external_initializers_from_files_in_memory([weights_path.name], [buffer], [buffer.size])
            key = "session.use_external_initializer_file_buffers_directly"
            options.add_session_config_entry(key, str(WEIGHTS[weights]))
        sessions.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
    loaded_mb = added_mb(before)
    feeds = [{tensor.name: random_input(tensor.shape_at(1)) for tensor in split.tensors} for split in bundle.splits]
    for session, feed in zip(sessions, feeds, strict=True):
        session.run(None, feed)
    run_mb = added_mb(before)
    times_ms = []
    for _ in range(RUNS):
        start = time.perf_counter()
        sessions[0].run(None, feeds[0])
        times_ms.append(1e3 * (time.perf_counter() - start))
    return loaded_mb, run_mb, statistics.median(times_ms)


def random_input(shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = Bundle.open(parser.parse_args().bundle)

    weights_mb = bundle.file(bundle.manifest.model.weights.path).stat().st_size / 1e6
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"onnxruntime {onnxruntime.__version__}, one thread, batch 1")
    print(f"{bundle.manifest.model.title}: {len(bundle.splits)} tails, weights of {weights_mb:.1f} MB")
    print(f"{'weights':>20} {'layout':>10} {'loaded MB':>10} {'after a run MB':>15} {'first tail ms':>14}")
    for layout in LAYOUTS:
        for weights in WEIGHTS:
            with multiprocessing.get_context("spawn").Pool(1) as fresh_process:
                numbers = fresh_process.apply(measure, (bundle.path, weights, layout))
            loaded_mb, run_mb, tail_ms = numbers
            print(f"{weights:>20} {layout:>10} {loaded_mb:>10.1f} {run_mb:>15.1f} {tail_ms:>14.1f}")


if __name__ == "__main__":
    main()
