"""Engines that really run on a GPU, against ONNX Runtime on the processor. They skip where there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dsc_split.bundle import Bundle
from dsc_split.engines import EngineLike, check_engines, get_backend
from dsc_split.engines.side._load import SideEngines
from dsc_split.errors import BackendError, EngineFileError, OutOfMemoryError
from dsc_split.partitioner.proof._proof import TOLERANCE

pytestmark = pytest.mark.gpu

Export = Callable[[str], Bundle]
Build = Callable[[Bundle, str, str], None]
Load = Callable[[Bundle, str], EngineLike]


def image(batch: int) -> dict[str, np.ndarray]:
    """Make an input; another one for each batch size."""
    return {"x": np.random.default_rng(batch).standard_normal((batch, 3, 64, 64), dtype=np.float32)}


def reference(bundle: Bundle, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with get_backend("onnxruntime:cpu").load(bundle.model_path) as engine:  # type: ignore[attr-defined]  # an Engine
        output: np.ndarray = engine.run(inputs)["y"]
    return output


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference as a share of the largest value, as proofs do."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float(np.abs(found.astype(float) - expected).max() / np.abs(expected).max())


@contextlib.contextmanager
def full_gpu() -> Iterator[None]:
    """Take all memory of the GPU, in ever smaller pieces."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    taken, size_bytes = [], 1 << 34
    try:
        while size_bytes >= 1 << 20:
            status, pointer = runtime.cudaMalloc(size_bytes)
            if int(status):
                runtime.cudaGetLastError()
                size_bytes //= 2
            else:
                taken.append(pointer)
        yield
    finally:
        for pointer in taken:
            runtime.cudaFree(pointer)


# ---- right results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("side", ["device", "server"])
def test_engines_compute_the_golden_samples(
    target: str, export: Export, build: Build, side: str, precision: str
) -> None:
    bundle = export(precision)
    build(bundle, side, target)

    result = check_engines(bundle, side, target)

    assert result.passed, [(row.label, row.max_rel_error, row.reason) for row in result.rows]


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_every_batch_within_the_profile_agrees_with_the_processor(
    target: str, export: Export, load: Load, batch: int
) -> None:
    bundle = export("fp32")
    engine = load(bundle, target)

    found = engine.run(image(batch))["y"]

    assert error(found, reference(bundle, image(batch))) <= TOLERANCE["fp32"]


def test_an_engine_goes_from_one_batch_to_another_and_back(target: str, export: Export, load: Load) -> None:
    bundle = export("fp32")
    engine = load(bundle, target)

    for batch in (8, 1, 8, 2, 1):
        assert error(engine.run(image(batch))["y"], reference(bundle, image(batch))) <= TOLERANCE["fp32"]


def test_head_and_tail_on_the_gpu_compute_what_the_whole_model_does(target: str, export: Export, build: Build) -> None:
    bundle = export("fp32")
    build(bundle, "device", target)
    build(bundle, "server", target)
    device, server = (SideEngines(bundle, side, target) for side in ("device", "server"))
    assert bundle.splits, "the small model has a compressive cut"

    for split in bundle.splits:
        head = device.load(next(graph for graph in device.graphs if graph.path == split.head), 2)
        tail = server.load(next(graph for graph in server.graphs if graph.path == split.tail), 2)
        try:
            crossing = head.run(image(2))
            found = tail.run({spec.name: crossing[spec.name] for spec in tail.inputs})["y"]
        finally:
            head.close()
            tail.close()
        assert error(found, reference(bundle, image(2))) <= TOLERANCE["fp32"]


def test_batch_outside_the_profile_is_refused_by_name(tensorrt: str, export: Export, load: Load) -> None:
    engine = load(export("fp32"), tensorrt)

    with pytest.raises(BackendError, match="batches from 1 to 8; 9 was given"):
        engine.run(image(9))


def test_two_engines_at_once_do_not_disturb_each_other(target: str, export: Export, load: Load) -> None:
    bundle = export("fp32")
    one, other = load(bundle, target), load(bundle, target)
    first, second = one.bind(image(1)), other.bind(image(2))

    for _ in range(20):
        first()
        second()

    assert error(one.run(image(1))["y"], reference(bundle, image(1))) <= TOLERANCE["fp32"]
    assert error(other.run(image(2))["y"], reference(bundle, image(2))) <= TOLERANCE["fp32"]


# ---- how it runs -------------------------------------------------------------------------------------------


def test_bound_call_runs_as_a_cuda_graph_with_the_right_result(tensorrt: str, export: Export, load: Load) -> None:
    bundle = export("fp32")
    engine: Any = load(bundle, tensorrt)
    call = engine.bind(image(2))

    for _ in range(5):
        call()

    assert engine.facts["cuda_graph"] is True, engine.facts
    assert error(call.outputs["y"].host, reference(bundle, image(2))) <= TOLERANCE["fp32"]


def test_compute_time_is_part_of_the_time_from_host_to_host(target: str, export: Export, load: Load) -> None:
    import time

    call: Any = load(export("fp32"), target).bind(image(8))
    if not hasattr(call, "compute_ms"):
        pytest.skip(f"{target} does not tell its compute time")
    for _ in range(20):
        call()

    start = time.perf_counter()
    call()
    host_ms = 1e3 * (time.perf_counter() - start)

    assert 0 < call.compute_ms() <= host_ms


def test_mapped_memory_gives_the_same_result_as_pinned(tensorrt: str, export: Export, load: Load) -> None:
    bundle = export("fp32")
    engine: Any = load(bundle, f"{tensorrt},io=mapped")

    found = engine.run(image(2))["y"]

    assert engine.facts["io"] == "mapped"
    assert error(found, reference(bundle, image(2))) <= TOLERANCE["fp32"]


def test_arrays_of_torch_on_the_gpu_go_in_and_come_out_without_the_host(
    tensorrt: str, export: Export, load: Load
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    bundle = export("fp32")
    engine: Any = load(bundle, tensorrt)
    x = torch.from_numpy(image(2)["x"]).cuda()
    stream = torch.cuda.Stream()

    on_host = engine.run({"x": x})["y"]
    on_device = torch.from_dlpack(engine.run_on_device({"x": x})["y"]).cpu().numpy()
    with torch.cuda.stream(stream):
        doubled = torch.from_dlpack(engine.run_on_device({"x": x}, stream=stream)["y"]) * 2
    stream.synchronize()

    expected = reference(bundle, image(2))
    assert error(on_host, expected) <= TOLERANCE["fp32"]
    assert np.array_equal(on_device, on_host)
    assert np.array_equal(doubled.cpu().numpy(), on_host * 2)


def test_engine_works_beside_torch_in_one_context(tensorrt: str, export: Export, load: Load) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    bundle = export("fp32")
    before = torch.ones(1000, device="cuda")

    engine = load(bundle, tensorrt)
    engine.run(image(1))
    engine.close()

    assert float((before + torch.ones(1000, device="cuda")).sum()) == 2000


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_full_gpu_is_out_of_memory_and_works_again_when_there_is_room(
    target: str, export: Export, build: Build
) -> None:
    bundle = export("fp32")
    build(bundle, "device", target)
    side = SideEngines(bundle, "device", target)

    with full_gpu(), pytest.raises(OutOfMemoryError):
        side.load(side.graphs[0], 8).run(image(8))

    engine = side.load(side.graphs[0], 8)
    assert error(engine.run(image(8))["y"], reference(bundle, image(8))) <= TOLERANCE["fp32"]
    engine.close()


def test_flipped_byte_never_reaches_the_deserialiser(tensorrt: str, export: Export, build: Build) -> None:
    bundle = export("fp32")
    build(bundle, "device", tensorrt)
    (path,) = (bundle.path / "engines").glob("*/model.plan")
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    side = SideEngines(bundle, "device", tensorrt)

    with pytest.raises(EngineFileError, match=r"SHA-256"):
        side.load(side.graphs[0], 1)


def test_engine_that_was_closed_gives_its_memory_back(tensorrt: str, export: Export, load: Load) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    bundle = export("fp32")
    load(bundle, tensorrt).run(image(8))  # what the library keeps for itself is there from now on
    side = SideEngines(bundle, "device", tensorrt)

    def used_bytes() -> int:
        _, free, total = runtime.cudaMemGetInfo()
        return int(total - free)

    before = used_bytes()
    for _ in range(10):
        engine = side.load(side.graphs[0], 8)
        engine.run(image(8))
        engine.close()

    assert used_bytes() - before < 32 << 20
