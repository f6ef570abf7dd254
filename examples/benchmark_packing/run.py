"""Time packing and verifying a bundle beside hashing the same bytes."""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from msgspec.structs import asdict, replace

from dsc_split._support.sizes import parse_size, size_text
from dsc_split.bundle import Bundle, Manifest, Split, TensorInfo
from dsc_split.bundles._manifest import encode_manifest
from dsc_split.bundles._records import BatchRange, CrossingTensor, FileEntry, ModelEntry, Targets, WeightsEntry
from dsc_split.engines._fingerprint import processor_name
from dsc_split.packing import pack_bundle, verify_bundle

GOAL = 1.2
"""Packing and verifying take at most this many times as long as hashing."""
BLOCK_BYTES = 1 << 20
GRAPHS = ("onnx/model.onnx", "onnx/a.head.onnx", "onnx/a.tail.onnx")
WEIGHTS = "onnx/weights.data"


def make_bundle(folder: Path, size_bytes: int) -> Bundle:
    """Make a bundle of one pair whose weights have a size."""
    (folder / "onnx").mkdir(parents=True)
    files: dict[str, FileEntry] = {}
    numbers = np.random.default_rng(0)
    with (folder / WEIGHTS).open("wb") as file:
        digest = hashlib.sha256()
        for start in range(0, size_bytes, BLOCK_BYTES):
            block = numbers.bytes(min(BLOCK_BYTES, size_bytes - start))
            digest.update(block)
            file.write(block)
    files[WEIGHTS] = FileEntry(sha256=digest.hexdigest(), size_bytes=size_bytes, role="weights")
    for path in GRAPHS:
        data = b""  # a graph without anything in it
        (folder / path).write_bytes(data)
        files[path] = FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data), role="graph")
    tensor = TensorInfo(name="x", dtype="float32", shape=("batch",), elements_by_batch=(1, 0), itemsize=4)
    crossing = CrossingTensor(**asdict(tensor), passthrough=False)
    split = Split(name="a", tensors=(crossing,), head=GRAPHS[1], tail=GRAPHS[2], early_outputs=())
    manifest = Manifest(
        revision=1,
        sealed=False,
        side=None,
        pair_id="",
        model=ModelEntry(path=GRAPHS[0], weights=WeightsEntry(path=WEIGHTS)),
        precision="fp32",
        batch=BatchRange(fixed=None, max=1),
        inputs=(tensor,),
        outputs=(tensor,),
        input_bytes_stated=None,
        full_offload=True,
        splits=(split,),
        failed_splits=(),
        targets=Targets(device=(), server=()),
        files=files,
        left_out={},
    )
    manifest = replace(manifest, pair_id=Bundle(folder, manifest).compute_pair_id())
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return Bundle.open(folder)


def hash_file(path: Path) -> str:
    """Hash a file as a program does that does nothing else."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def timed_fsync() -> Iterator[list[float]]:
    """Note how many seconds each fsync in the block takes."""
    taken_s: list[float] = []
    fsync = os.fsync

    def noting(fd: int) -> None:
        start_s = time.perf_counter()
        fsync(fd)
        taken_s.append(time.perf_counter() - start_s)

    os.fsync = noting
    try:
        yield taken_s
    finally:
        os.fsync = fsync


def seconds(body: Callable[[], object]) -> float:
    """Time a call."""
    start_s = time.perf_counter()
    body()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default=parse_size("1GB"), help="Size of the weights.")
    parser.add_argument("--rounds", type=int, default=7, help="Every round does everything once.")
    parser.add_argument("--folder", type=Path, help="Where to write; default: where temporary files go.")
    options = parser.parse_args()

    print(f"{processor_name()}, {os.cpu_count()} processors; Python {platform.python_version()}")
    print(f"{size_text(options.size)} of weights, in the page cache; {options.rounds} interleaved rounds")
    names = (
        "hashlib.sha256",
        "pack, without fsync",
        "fsync of the pack",
        "verify the packed file",
        "verify the folder",
    )
    times_s: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bundle = make_bundle(Path(folder) / "bundle", options.size)
        weights, packed = bundle.path / WEIGHTS, Path(folder) / "bundle.dscb"
        hash_file(weights)
        for _ in range(options.rounds):
            packed.unlink(missing_ok=True)
            times_s["hashlib.sha256"].append(seconds(partial(hash_file, weights)))
            with timed_fsync() as fsync_s:
                pack_s = seconds(partial(pack_bundle, bundle, packed))
            times_s["pack, without fsync"].append(pack_s - sum(fsync_s))
            times_s["fsync of the pack"].append(sum(fsync_s))
            times_s["verify the packed file"].append(seconds(partial(verify_bundle, packed)))
            times_s["verify the folder"].append(seconds(partial(verify_bundle, bundle.path)))
        if not (verify_bundle(packed).ok and verify_bundle(bundle.path).ok):
            raise SystemExit("what was packed cannot be verified")

    print(f"\n{'':<24}{'median':>9}{'fastest':>9}{'GB/s':>7}   beside hashing, median of the rounds")
    for name, each_s in times_s.items():
        ratio = statistics.median(
            one_s / hash_s for one_s, hash_s in zip(each_s, times_s["hashlib.sha256"], strict=True)
        )
        goal = "" if "fsync of" in name or name == names[0] else f"  {'met' if ratio <= GOAL else 'missed'}: {GOAL:g}"
        median_s = statistics.median(each_s)
        speed = f"{options.size / median_s / 1e9:>7.2f}"
        print(f"{name:<24}{median_s:>7.3f} s{min(each_s):>7.3f} s{speed}   {ratio:.2f} times{goal}")


if __name__ == "__main__":
    main()
