"""The run path of TensorRT engines, on a GPU and a library that are pretended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from tests.support import fake_cuda as fakes

from dsc_split.engines._engine_file import PlanTensor, ShapeBounds
from dsc_split.engines.tensorrt._engine import TensorRTEngine
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
)

Kind = fakes.DataType
X, PLAN = fakes.X, fakes.PLAN
OnGpu, Shared = fakes.OnGpu, fakes.Shared
header, load, pretended = fakes.header, fakes.load, fakes.pretended


# ---- NumPy arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("io", ["pinned", "mapped"])
@pytest.mark.parametrize("rtx", [True, False])
def test_outputs_are_computed_for_every_batch_of_the_profile(io: str, rtx: bool) -> None:
    engine = load(pretended(rtx=rtx), io=io)

    for batch in (2, 8, 1, 8, 3):
        x = np.random.default_rng(batch).standard_normal((batch, 3)).astype(np.float32)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], x * 2)


def test_outputs_of_one_run_are_not_touched_by_the_next() -> None:
    engine = load(pretended())

    first = engine.run({"x": X})["y"]
    engine.run({"x": X + 1})

    np.testing.assert_array_equal(first, X * 2)


def test_inputs_need_not_be_contiguous() -> None:
    x = np.arange(6, dtype=np.float32).reshape(3, 2).T

    np.testing.assert_array_equal(load(pretended()).run({"x": x})["y"], x * 2)


def test_bound_call_copies_in_launches_the_graph_between_events_copies_out_and_waits() -> None:
    trt = pretended()
    call = load(trt).bind({"x": X})
    call()
    first = list(trt.cuda.calls)
    trt.cuda.calls.clear()

    call()

    around = ["copy 24 in own", "record in own", "launch in own", "record in own", "copy 24 in own", "synchronise own"]
    assert trt.cuda.calls == around
    warm = ["copy 24 in own", "enqueue", "synchronise own", "capture", "enqueue", "make graph"]
    assert first[-len(warm) - len(around) :] == [*warm, *around]
    np.testing.assert_array_equal(call.outputs["y"].host, X * 2)


def test_bound_call_tells_the_time_between_its_events() -> None:
    call = load(pretended()).bind({"x": X})

    call()

    assert call.compute_ms() == 2  # the clock of the pretended GPU counts calls


def test_mapped_memory_is_not_copied() -> None:
    trt = pretended()
    call = load(trt, io="mapped").bind({"x": X})

    call()

    assert not [name for name in trt.cuda.calls if name.startswith("copy")]
    assert "allocate host 24 mapped" in trt.cuda.calls
    np.testing.assert_array_equal(call.outputs["y"].host, X * 2)


def test_inputs_are_copied_when_they_are_bound() -> None:
    x = X.copy()
    call = load(pretended()).bind({"x": x})

    x[:] = 0
    call()

    np.testing.assert_array_equal(call.outputs["y"].host, X * 2)


def test_bound_calls_of_one_engine_do_not_disturb_each_other() -> None:
    trt = pretended()
    engine = load(trt)
    one, other = engine.bind({"x": X}), engine.bind({"x": np.ones((8, 3), np.float32)})

    for _ in range(3):
        one()
        other()
        engine.run({"x": X + 5})

        np.testing.assert_array_equal(one.outputs["y"].host, X * 2)
        np.testing.assert_array_equal(other.outputs["y"].host, np.full((8, 3), 2, np.float32))
    assert trt.cuda.kinds().count("graph") == 3  # a graph that is replaced is freed


def test_memory_grows_and_never_shrinks() -> None:
    trt = pretended()
    engine = load(trt)
    for batch in (8, 1, 4, 8):
        engine.run({"x": np.ones((batch, 3), np.float32)})

    assert [call for call in trt.cuda.calls if call.startswith("allocate")] == [
        "allocate host 96",
        "allocate 96",
        "allocate 8000",  # for activations
        "allocate host 96",
        "allocate 96",
    ]


def test_empty_arrays_go_through() -> None:
    bounds = ShapeBounds(min=(0, 3), opt=(4, 3), max=(8, 3))
    engine = load(pretended(), described=header(min=0, shapes={"x": bounds}))
    empty = np.zeros((0, 3), np.float32)

    assert engine.run({"x": empty})["y"].shape == (0, 3)
    on_gpu = OnGpu(engine._cuda, empty, data=(0, False))
    assert engine.run({"x": on_gpu})["y"].shape == (0, 3)
    np.testing.assert_array_equal(engine.run({"x": X})["y"], X * 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "int64", "uint8", "bool"])
def test_every_type_of_element_that_both_have(dtype: str) -> None:
    kind = next(kind for kind, name in fakes.NUMPY.items() if name == dtype)
    trt = pretended(inputs={"x": kind}, outputs={"y": kind}, compute=lambda inputs: {"y": inputs["x"]})
    x = np.array([[1, 0, 1]]).astype(dtype)

    y = load(trt, described=header(dtype)).run({"x": x})["y"]

    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x)


def test_type_of_element_that_numpy_lacks_is_refused_by_name() -> None:
    with pytest.raises(BackendError, match=r"'y' of 'model\.plan' has elements of type BF16, which NumPy lacks"):
        load(pretended(outputs={"y": Kind.BF16}))


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 9])
def test_batch_outside_the_profile_is_refused_with_the_command_that_mends_it(batch: int) -> None:
    engine = load(pretended())
    batches = "0,1,4,8" if batch == 0 else "1,4,8,9"

    for run in (engine.run, engine.bind, engine.run_on_device):
        with pytest.raises(BackendError) as caught:
            run({"x": np.ones((batch, 3), np.float32)})
        words = f"takes batches from 1 to 8; {batch} was given. Build it again with that batch: dsc-split build BUNDLE"
        assert words in str(caught.value)
        assert f"--target tensorrt-rtx:sm75 --batches {batches}" in str(caught.value)


def test_other_dimension_than_the_batch_is_named() -> None:
    with pytest.raises(BackendError, match=r"'x' of 'model.plan' has shape \(2, 4\); 3 was expected in dimension 1"):
        load(pretended()).run({"x": np.ones((2, 4), np.float32)})


def test_without_shapes_in_the_profile_fixed_dimensions_are_checked() -> None:
    engine = load(pretended(), described=header(shapes={}))

    assert engine.run({"x": np.ones((50, 3), np.float32)})["y"].shape == (50, 3)
    with pytest.raises(BackendError, match="3 was expected in dimension 1"):
        engine.run({"x": np.ones((2, 4), np.float32)})


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        ("shape", r"does not take shape \(2, 3\) of input 'x': \[x\] too large"),
        ("address", r"does not take input 'x': \[x\] too large"),
        ("infer", r"the shapes of \['x'\] cannot be inferred: \[x\] too large"),
        ("run", r"'model.plan' cannot be run: \[x\] too large"),
    ],
)
def test_what_the_library_refuses_comes_with_its_words(refuse: str, words: str) -> None:
    trt = pretended(says="[x] too large")
    engine = load(trt)
    trt.refuse = refuse

    with pytest.raises(BackendError, match=words):
        engine.run({"x": X})
    trt.refuse = ""
    np.testing.assert_array_equal(engine.run({"x": X})["y"], X * 2)


def test_memory_that_ends_inside_the_library_has_an_error_of_its_own() -> None:
    trt = pretended(says="Error Code 2: OutOfMemory (Requested size was 275675584 bytes.)")
    engine = load(trt)
    trt.refuse = "run"

    with pytest.raises(OutOfMemoryError, match="275675584"):
        engine.run({"x": X})


def positive(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"y": inputs["x"][inputs["x"].sum(axis=1) > 0]}


@pytest.mark.parametrize("io", ["pinned", "mapped"])
def test_outputs_whose_shape_is_known_only_when_they_are_computed(io: str) -> None:
    trt = pretended(compute=positive, deferred=("y",))
    engine = load(trt, io=io)

    for rows in ([1, -1, 1], [1], [-1, -1], [1, 1, 1, 1, 1]):
        x = np.array(rows, np.float32)[:, None].repeat(3, axis=1)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], positive({"x": x})["y"])
        np.testing.assert_array_equal(engine.run_on_device({"x": x})["y"].copy_to_host(), positive({"x": x})["y"])
    assert engine.facts["cuda_graph"] == "the shape of output 'y' is known only when it is computed"


def test_end_of_memory_for_such_an_output_passes_through_the_library() -> None:
    trt = pretended(compute=positive, deferred=("y",))
    engine = load(trt)
    trt.cuda.allow(4)  # memory of the input, twice, and of activations, and the copy

    with pytest.raises(OutOfMemoryError, match="cannot allocate host 24"):
        engine.run({"x": X + 1})


def test_input_that_decides_about_shapes_stays_on_the_host() -> None:
    trt = pretended(
        inputs={"x": Kind.FLOAT, "n": Kind.INT64},
        on_host=("n",),
        compute=lambda inputs: {"y": inputs["x"][: int(inputs["n"][0])]},
    )
    described = header()
    count = PlanTensor(name="n", dtype="int64", shape=(1,))
    engine = load(trt, described=replace(described, inputs=(*described.inputs, count)))

    for n in (1, 2, 1):
        assert engine.run({"x": X, "n": np.array([n])})["y"].shape == (n, 3)
    assert engine.facts["cuda_graph"] == "'n' is read or written on the host"
    with pytest.raises(BackendError, match="input 'n' decides about shapes and is read on the host"):
        engine.run({"x": X, "n": OnGpu(trt.cuda, np.array([1]))})


# ---- CUDA graphs -------------------------------------------------------------------------------------------


def test_a_graph_that_was_captured_is_in_the_facts() -> None:
    engine = load(pretended())
    assert engine.facts["cuda_graph"] == "nothing was run yet"

    engine.bind({"x": X})()

    assert engine.facts == {
        "io": "pinned",
        "cuda_graph": True,
        "profile": {"min": 1, "opt": 4, "max": 8},
        "file": "model.plan",
        "jit": True,
    }


def test_where_capture_fails_the_work_is_enqueued_and_the_reason_kept() -> None:
    trt = pretended()
    trt.cuda.no_capture = "CUDA cannot end a CUDA graph (cudaErrorStreamCaptureInvalidated)."
    engine = load(trt)
    call = engine.bind({"x": X})

    call()
    call()

    assert engine.facts["cuda_graph"] == trt.cuda.no_capture
    assert trt.executions == 3
    np.testing.assert_array_equal(call.outputs["y"].host, X * 2)


def test_plan_that_says_it_cannot_be_captured_is_not() -> None:
    trt = pretended(capturable=False)
    engine = load(trt)

    engine.run({"x": X})

    assert str(engine.facts["cuda_graph"]).startswith("TensorRT says that this plan cannot be captured")
    assert "capture" not in trt.cuda.calls


# ---- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        (1, EngineMismatch, "built by another version of the library"),
        (2, EngineMismatch, "built for other GPUs than this one"),
        (1 | 2, EngineMismatch, "another version"),
        (4, BackendUnavailable, "driver is too old"),
        (8, BackendUnavailable, "CUDA runtime is too old"),
        (16, OutOfMemoryError, "too little memory"),
        (32, EngineFileError, "its plan is damaged"),
        (64, BackendUnavailable, "CUDA failed"),
        (0, BackendError, "TensorRT says it is not valid here: the library gives no reason"),
    ],
)
def test_plan_that_is_not_valid_here_is_refused_before_it_is_loaded(found: int, error: type, words: str) -> None:
    trt = pretended(validity=(fakes.EngineValidity.INVALID, found))

    with pytest.raises(error, match=words) as caught:
        load(trt)

    assert caught.type is error
    assert "engine" not in trt.released


def test_plan_that_was_built_for_another_gpu_is_used_and_said() -> None:
    trt = pretended(validity=(fakes.EngineValidity.SUBOPTIMAL, 0))

    assert "not built for it" in str(load(trt).facts["validity"])


@pytest.mark.parametrize(
    ("says", "error"),
    [
        ("Version tag does not match. Note: Current Version: 239, Serialized Engine Version: 236", EngineMismatch),
        ("The engine plan file is generated on an incompatible device, expecting compute 8.7 got", EngineMismatch),
        ("The engine plan file is not compatible with this version of TensorRT, expecting library", EngineMismatch),
        ("Error Code 2: OutOfMemory", OutOfMemoryError),
        ("Magic tag does not match", BackendError),
    ],
)
@pytest.mark.parametrize("refuse", ["plan", "context"])
def test_plan_that_cannot_be_loaded_is_an_error_with_the_words_of_the_library(
    refuse: str, says: str, error: type
) -> None:
    trt = pretended(rtx=False, refuse=refuse, says=says)

    with pytest.raises(error, match=says[:20]) as caught:
        load(trt)

    assert caught.type is error


def test_plan_with_other_tensors_than_its_file_says_is_refused() -> None:
    with pytest.raises(EngineFileError, match=r"holds .*'input float16'.*; its file says .*'input float32'"):
        load(pretended(inputs={"x": Kind.HALF}))


def test_kernels_are_made_for_the_shapes_at_once() -> None:
    trt = pretended()
    load(trt)

    assert trt.strategy is fakes.Strategy.EAGER


@pytest.mark.parametrize("has_config", [True, False])
def test_library_without_the_features_of_rtx_runs_as_well(has_config: bool) -> None:
    trt = pretended(rtx=False, has_config=has_config)
    engine = load(trt)

    np.testing.assert_array_equal(engine.run({"x": X})["y"], X * 2)
    assert "jit" not in engine.facts


def test_runtime_cache_is_kept_in_its_file(tmp_path: Path) -> None:
    path, trt = tmp_path / "runtime.cache", pretended()

    load(trt, runtime_cache=path).close()
    assert path.read_bytes() == b"compiled"

    load(trt, runtime_cache=path).close()
    assert trt.caches == [b"compiled"]


def test_runtime_cache_is_written_only_where_it_grew_or_is_of_another_machine(tmp_path: Path) -> None:
    path, trt = tmp_path / "runtime.cache", pretended(cache_content=b"new")
    path.write_bytes(b"as large")

    load(trt, runtime_cache=path).close()
    assert path.read_bytes() == b"as large"

    trt.takes_cache = False
    load(trt, runtime_cache=path).close()
    assert path.read_bytes() == b"new"


def test_runtime_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trt = pretended()

    load(trt, runtime_cache=tmp_path / "gone" / "runtime.cache").close()

    assert "is not kept" in caplog.text
    assert trt.released


# ---- freeing -----------------------------------------------------------------------------------------------


def everything(trt: Any) -> None:
    """Load an engine, use all of it, and close it, whatever fails."""
    with load(trt) as engine:
        engine.run({"x": X})
        engine.bind({"x": np.ones((8, 3), np.float32)})()
        engine.run({"x": np.ones((4, 3), np.float32)})
        engine.run_on_device({"x": X}, stream=77)
        engine.run_on_device({"x": X})["y"].copy_to_host()


def test_closing_frees_everything_in_order_and_may_be_repeated() -> None:
    trt = pretended()
    engine = load(trt)
    engine.run({"x": X})
    call = engine.bind({"x": X})
    call()
    engine.run_on_device({"x": X})
    trt.cuda.calls.clear()

    engine.close()
    engine.close()

    assert trt.cuda.live == {}
    freed = [name for name in trt.cuda.calls if name.startswith("free")]
    assert freed[0] == "free graph"  # it uses the rest
    assert freed[-3:] == ["free device memory", "free event", "free stream"]
    assert trt.released == ["context", "cache", "engine", "runtime"]


@pytest.mark.parametrize("options", [{}, {"compute": positive, "deferred": ("y",)}])
def test_nothing_is_left_whichever_call_of_the_driver_fails(options: dict[str, Any]) -> None:
    complete = pretended(**options)
    everything(complete)
    count = complete.cuda._count
    assert count > 50

    for fail_at in range(1, count + 1):
        trt = pretended(**options)
        trt.cuda._fail_at = fail_at
        error = None
        try:
            everything(trt)
        except BackendError as e:
            error = str(e)

        assert trt.cuda.live == {}, f"{fail_at}: {error}"
        assert trt.cuda.entered == 0
        assert sorted(trt.released) == ["cache", "context", "engine", "runtime"], f"{fail_at}: {error}"


def test_an_engine_works_again_after_any_call_of_the_driver_failed() -> None:
    reference = pretended()
    engine = load(reference)
    start = reference.cuda._count
    engine.run({"x": X})
    engine.run_on_device({"x": X}, stream=77)

    for after in range(reference.cuda._count - start):
        trt = pretended()
        engine = load(trt)
        trt.cuda.allow(after)
        for _ in range(2):
            try:
                engine.run({"x": X})
                engine.run_on_device({"x": X}, stream=77)
            except BackendError:
                continue
        np.testing.assert_array_equal(engine.run({"x": X + 1})["y"], (X + 1) * 2)


# ---- the real libraries ------------------------------------------------------------------------------------


def test_all_that_is_used_of_the_real_library_is_there() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

    class Allocator(trt.IOutputAllocator):  # type: ignore[misc,name-defined]  # found at run time
        def __init__(self) -> None:
            trt.IOutputAllocator.__init__(self)

    Allocator()
    used = {
        trt.Runtime: "deserialize_cuda_engine get_engine_validity",
        trt.ICudaEngine: "num_io_tensors get_tensor_name get_tensor_dtype get_tensor_mode get_tensor_location "
        "create_execution_context create_runtime_config",
        trt.IRuntimeConfig: "create_runtime_cache set_runtime_cache dynamic_shapes_kernel_specialization_strategy "
        "set_execution_context_allocation_strategy",
        trt.ExecutionContextAllocationStrategy: "USER_MANAGED",
        trt.IRuntimeCache: "serialize deserialize",
        trt.IExecutionContext: "set_input_shape set_tensor_address infer_shapes get_tensor_shape set_output_allocator "
        "execute_async_v3 is_stream_capturable update_device_memory_size_for_shapes set_device_memory",
        trt.DataType: "FLOAT HALF INT8 INT32 INT64 UINT8 BOOL",
        trt.TensorIOMode: "INPUT OUTPUT",
        trt.TensorLocation: "HOST DEVICE",
        trt.EngineValidity: "VALID SUBOPTIMAL INVALID",
        trt.DynamicShapesKernelSpecializationStrategy: "EAGER",
    }
    missing = [
        f"{cls.__name__}.{name}" for cls, names in used.items() for name in names.split() if not hasattr(cls, name)
    ]
    assert missing == []
    bits = [int(getattr(trt.EngineInvalidityDiagnostics, str(flag.name))) for flag in fakes.Diagnostics]
    assert bits == [flag.value for flag in fakes.Diagnostics]
    assert tuple(trt.Dims((2, 3))) == (2, 3)


def test_damaged_plan_is_refused_by_the_real_library() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from dsc_split.engines.tensorrt._library import open_library

    library = open_library("tensorrt_rtx", "rtx")
    cuda = fakes.FakeCuda()

    with pytest.raises(EngineFileError, match=r"'model\.plan' cannot be loaded: its plan is damaged\. Build it again"):
        TensorRTEngine(
            fakes.PretendedBackend(),
            "model.plan",
            header(),
            memoryview(b"x" * 200)[50:],
            trt=library.trt,
            logger=library.logger,
            cuda=cuda,
        )
    assert cuda.live == {}
