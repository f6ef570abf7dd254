"""Measure how long engines take to build for two GPUs, without a GPU, and how long when they are in the cache."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from dsc_split.bundle import Bundle
from dsc_split.engines import build_engines
from dsc_split.partitioner import ExportOptions, SourceOptions, export_bundle

TARGETS = {"device": "tensorrt-rtx:sm75", "server": "tensorrt-rtx:sm89"}
MODELS = "efficientnet_b4,efficientnet_v2_s,resnet50,convnext_tiny,swin_t"


def builds(bundle: Bundle) -> Iterator[tuple[int, int, float]]:
    """Build both sides; gives engines, failures and seconds of each."""
    for side, target in TARGETS.items():
        start = time.perf_counter()
        result = build_engines(bundle, side, target)
        for row in result.failed:
            print(f"    {side}: {row.label}: {row.reason}")
        yield len(result.rows), len(result.failed), time.perf_counter() - start


def main() -> None:
    """Print one line for each model and precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=MODELS, help="names in torchvision, with commas between")
    parser.add_argument("--precisions", default="fp16,fp32")
    parser.add_argument("--max-batch", type=int, default=64)
    options = parser.parse_args()
    libraries = ", ".join(f"{name} {version(name)}" for name in ("tensorrt-rtx-cu13", "torch", "onnxruntime"))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {libraries}")
    print(f"{TARGETS['device']} and {TARGETS['server']}, batches up to {options.max_batch}")
    print(f"{'model':>20} {'precision':>9} {'engines':>8} {'export':>8} {'build':>8} {'again':>8} {'size':>10}")
    for model in options.models.split(","):
        for precision in options.precisions.split(","):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["DSC_SPLIT_CACHE"] = f"{folder}/cache"
                source = SourceOptions(max_batch=options.max_batch, weights="random")
                start = time.perf_counter()
                bundle = export_bundle(
                    f"torchvision:{model}", f"{folder}/bundle", ExportOptions(source=source, precision=precision)
                )
                export_s = time.perf_counter() - start
                first, again = list(builds(bundle)), list(builds(bundle))
                size = sum(path.stat().st_size for path in Path(folder, "bundle/engines").rglob("*.plan"))
                count, failed, build_s = (sum(column) for column in zip(*first, strict=True))
                again_s = sum(seconds for _, _, seconds in again)
                engines = f"{count - failed} of {count}"
                times = " ".join(f"{seconds:>6.1f} s" for seconds in (export_s, build_s, again_s))
                print(f"{model:>20} {precision:>9} {engines:>8} {times} {size / 1e6:>7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
