"""Real engines of TensorRT for RTX, built without a GPU."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper
from tests.support.full_bundles import list_file
from tests.support.manifests import edited, stated, targets_of

from dsc_split._support.hashing import sha256_file
from dsc_split._support.progress import Progress
from dsc_split._support.records import to_document
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import FileEntry, TargetEntry
from dsc_split.engines import BuildOptions, BuildRow, SideEngines, build_engines, get_backend
from dsc_split.engines._engine_file import PlanProfile, PlanTensor, ShapeBounds, read_header, read_plan
from dsc_split.errors import (
    BackendError,
    BackendUnavailable,
    BundleError,
    DscError,
    EngineFileError,
    EngineMismatch,
    OutOfMemoryError,
    UsageError,
)
from dsc_split.partitioner import cut_bundle

pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'dsc-split[rtx]'")

SMALL = BuildOptions(batches=(1, 4))
SHAPE: list[str | int | None] = ["batch", 3, 8, 8]


@pytest.fixture(autouse=True)
def engine_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(bundle: Bundle, target: str = "tensorrt-rtx:sm89", side: str = "device", **options: Any) -> list[BuildRow]:
    """Build, and give the rows."""
    return list(build_engines(bundle, side, target, BuildOptions(**{"batches": (1, 4), **options})).rows)


def options_of(entry: TargetEntry) -> dict[str, Any]:
    """Return the options of the build that a fingerprint states."""
    options: dict[str, Any] = to_document(entry)["fingerprint"]["options"]
    return options


def only_reason(bundle: Bundle, target: str = "tensorrt-rtx:sm89", **options: Any) -> str:
    """Build, and give the reason why the whole model's engine failed."""
    return build(bundle, target, **options)[0].reason


def replace_model(bundle: Bundle, data: bytes) -> Bundle:
    """Put other bytes in the place of the whole model, as if they had been exported."""
    list_file(bundle, "onnx/model.onnx", data, "graph")
    return Bundle.open(bundle.path)


def model_of(*nodes: onnx.NodeProto, **weights: np.ndarray) -> bytes:
    """Serialise ``x -> nodes -> y``, both of ``SHAPE`` or of what shape inference finds."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [x], [y], tensors)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("org.example", 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())


# ---- what is built -----------------------------------------------------------------------------------------


def test_every_engine_lies_in_the_bundle_with_its_own_description(bundle: Bundle) -> None:
    result = build_engines(bundle, "device", "tensorrt-rtx:sm89", SMALL)

    assert [row.label for row in result.rows] == ["whole model", "head a"]
    assert not result.failed
    manifest = Bundle.open(bundle.path).manifest
    (entry,) = manifest.targets.device
    assert entry.target == "tensorrt-rtx:sm89"
    assert entry.library == "tensorrt_rtx"
    assert options_of(entry)["profile"] == [1, 4, 4]
    for engine, name in zip(entry.built, ("model.plan", "a.head.plan"), strict=True):
        assert engine.path == f"engines/{result.id}/{name}"
        path = bundle.path / engine.path
        sha256, size_bytes = sha256_file(path), path.stat().st_size
        assert manifest.files[engine.path] == FileEntry(sha256=sha256, size_bytes=size_bytes, role="engine")
        assert engine.memory.activations[4] > 0
        precision = stated(engine.precision)
        assert precision.tf32 is False
        assert precision.compute_layers == {"float32": 1 if "head" in name else 2}


def test_the_header_tells_what_it_was_built_from_and_for(bundle: Bundle) -> None:
    row = build(bundle)[1]

    header = read_header(bundle.path / str(row.path))
    assert header.architecture == "sm89"
    assert header.graph_digest == bundle.graph_digest("onnx/a.head.onnx")
    assert header.inputs == (PlanTensor(name="x", dtype="float32", shape=("batch", 3, 8, 8)),)
    assert header.outputs == (PlanTensor(name="a", dtype="float32", shape=("batch", 2, 8, 8)),)
    shapes = ShapeBounds(min=(1, 3, 8, 8), opt=(4, 3, 8, 8), max=(4, 3, 8, 8))
    assert header.profile == PlanProfile(min=1, opt=4, max=4, shapes={"x": shapes})
    plan = read_plan(bundle.path / str(row.path)).plan
    assert header.plan_sha256 == hashlib.sha256(plan).hexdigest()
    assert bytes(plan[:4]) == b"vtrt"


def test_an_engine_per_batch_size_is_a_file_each(bundle: Bundle) -> None:
    rows = build(bundle, per_batch=True)

    assert [Path(str(row.path)).name for row in rows] == [
        "model.b1.plan",
        "model.b4.plan",
        "a.head.b1.plan",
        "a.head.b4.plan",
    ]
    assert [row.profile for row in rows[:2]] == [(1, 1, 1), (1, 4, 4)]


def test_the_best_batch_is_the_one_asked_for(bundle: Bundle) -> None:
    (row, _) = build(bundle, batches=(1, 2, 4, 8), opt_batch=2)

    assert row.profile == (1, 2, 8)


def test_what_was_built_for_the_target_before_is_replaced(bundle: Bundle) -> None:
    first = build(bundle)
    second = build(bundle, opt_batch=1)

    assert first[0].path != second[0].path
    assert not (bundle.path / str(first[0].path)).exists()
    assert str(first[0].path) not in Bundle.open(bundle.path).manifest.files


def test_two_sides_with_one_target_share_the_whole_model(bundle: Bundle) -> None:
    device, server = build(bundle, side="device"), build(bundle, side="server")

    assert device[0].path == server[0].path
    assert server[0].cached
    build(bundle, side="device", opt_batch=1)
    assert (bundle.path / str(server[0].path)).exists()


def test_phases_of_the_builder_are_told(bundle: Bundle) -> None:
    steps: list[Progress] = []

    build_engines(bundle, "device", "tensorrt-rtx:sm89", SMALL, progress=steps.append)

    assert "whole model: Building engine" in [step.label for step in steps]
    assert {step.total for step in steps} == {2}


# ---- the cache ---------------------------------------------------------------------------------------------


def test_a_second_build_builds_nothing(bundle: Bundle) -> None:
    first = build(bundle)
    before = (bundle.path / str(first[0].path)).read_bytes()
    second = build(bundle)

    assert [row.cached for row in first] == [False, False]
    assert [row.cached for row in second] == [True, True]
    assert (bundle.path / str(second[0].path)).read_bytes() == before


def test_another_weight_target_or_profile_is_built_anew(bundle: Bundle) -> None:
    build(bundle)
    model = onnx.load(bundle.model_path)
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    changed = replace_model(bundle, model.SerializeToString())

    assert [row.cached for row in build(changed)] == [False, True]
    assert [row.cached for row in build(changed, "tensorrt-rtx:sm86")] == [False, False]
    assert [row.cached for row in build(changed, opt_batch=1)] == [False, False]


def test_an_engine_of_a_bundle_that_was_cut_anew_is_gone(bundle: Bundle) -> None:
    (row, _) = build(bundle)

    cut_bundle(Bundle.open(bundle.path))

    manifest = Bundle.open(bundle.path).manifest
    (entry,) = manifest.targets.device
    assert (entry.is_compiled, entry.built) == (True, ())
    assert row.path not in manifest.files


# ---- what the GPU does not have ----------------------------------------------------------------------------


GEMM = helper.make_node("Gemm", ["f", "w"], ["y"], name="classifier")
FLATTEN = helper.make_node("Flatten", ["x"], ["f"])
WEIGHT = np.random.default_rng(0).standard_normal((192, 5)).astype(np.float32)


@pytest.fixture
def classifier(bundle: Bundle) -> Bundle:
    """The tiny bundle, its whole model being a classifier with a float32 Gemm."""
    (output,) = bundle.outputs
    with bundle.edit() as draft:
        draft.change(outputs=(replace(output, shape=("batch", 5), elements_by_batch=(5, 0)),))
    return replace_model(bundle, model_of(FLATTEN, GEMM, w=WEIGHT))


def test_a_float32_product_becomes_an_equal_convolution_for_sm75(classifier: Bundle) -> None:
    (row, _) = build(classifier, "tensorrt-rtx:sm75")

    assert row.reason == ""
    assert row.notes == ("1 became equal convolutions",)
    header = read_header(classifier.path / str(row.path))
    rewritten = stated(header.rewritten)
    assert rewritten.converted == ("classifier",)
    assert stated(rewritten.max_rel_error) <= 1e-5
    assert len(stated(rewritten.graph_sha256)) == 64
    assert build(classifier, "tensorrt-rtx:sm89")[0].notes == ()


ATTENTION = [
    helper.make_node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
    helper.make_node("MatMul", ["x", "t"], ["y"], name="scores"),
]


def test_a_product_of_two_computed_tensors_is_no_convolution_and_the_ways_out_are_told(bundle: Bundle) -> None:
    bundle = replace_model(bundle, model_of(*ATTENTION))

    reason = only_reason(bundle, "tensorrt-rtx:sm75", gemm="conv")
    assert "MatMul node 'scores': SM75 has no float32 form of this product" in reason
    assert "--gemm sum, --gemm fp16, --precision fp16" in reason
    assert only_reason(bundle, "tensorrt-rtx:sm75", gemm="fp16") == ""
    assert only_reason(bundle, "tensorrt-rtx:sm75", gemm="sum") == ""


def converted(*, kept: list[str | None]) -> dict[str, Any]:
    """What the manifest says of a conversion to float16 that left some nodes float32."""
    return {
        "from": "fp32",
        "io_precision": "fp16",
        "max_abs_error": 0.0,
        "max_rel_error": 0.0,
        **dict.fromkeys(("weights_converted", "weights_overflowed", "weights_vanished"), 0),
        "kept_float32": [{"name": name, "op_type": "Conv", "reason": "it must"} for name in kept],
    }


TWO_CONVOLUTIONS = [
    helper.make_node("Conv", ["x", "w"], ["h"], name="_conv"),
    helper.make_node("Conv", ["h", "w"], ["y"], name="_conv_1"),
]


@pytest.mark.parametrize(
    ("kept", "wide"), [(["_conv"], "1 layers compute in float32, '_conv_1'"), ([None], "2 layers")]
)
def test_only_the_nodes_that_were_left_float32_may_be_so(
    make_bundle: Callable[..., Bundle], kept: list[str | None], wide: str
) -> None:
    bundle = make_bundle(precision="fp16", conversion=converted(kept=kept))
    bundle = replace_model(bundle, model_of(*TWO_CONVOLUTIONS, w=np.ones((3, 3, 1, 1), np.float32)))

    assert wide in only_reason(bundle)


def test_layers_of_nodes_that_were_left_float32_pass(make_bundle: Callable[..., Bundle]) -> None:
    bundle = make_bundle(precision="fp16", conversion=converted(kept=["_conv", "_conv_1"]))
    bundle = replace_model(bundle, model_of(*TWO_CONVOLUTIONS, w=np.ones((3, 3, 1, 1), np.float32)))

    assert only_reason(bundle) == ""


def test_asking_for_float16_and_getting_float32_is_an_error(make_bundle: Callable[..., Bundle]) -> None:
    bundle = make_bundle(precision="fp16", conversion=converted(kept=[]))

    assert "float16 was asked for, and 2 layers compute in float32" in only_reason(bundle)


# ---- bad input ---------------------------------------------------------------------------------------------


def test_garbage_that_the_parser_takes_is_caught(bundle: Bundle) -> None:
    whole = bundle.model_path.read_bytes()

    assert "it is empty" in only_reason(replace_model(bundle, b""))
    assert "no ONNX model" in only_reason(replace_model(bundle, b"garbage"))
    assert "no ONNX model" in only_reason(replace_model(bundle, whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (
            helper.make_node("Mystery", ["x"], ["y"], name="riddle", domain="org.example"),
            "no operator 'Mystery' (node 'ri",
        ),
        (helper.make_node("Unique", ["x"], ["y"], name="once"), "cannot do Unique node 'once'"),
        (helper.make_node("Add", ["x", "h"], ["y"], name="sum"), "Add node 'sum'"),
    ],
)
def test_an_operator_that_cannot_be_parsed_is_named(bundle: Bundle, node: onnx.NodeProto, words: str) -> None:
    weights = {"h": np.ones(8, np.float16)} if node.op_type == "Add" else {}

    assert words in only_reason(replace_model(bundle, model_of(node, **weights)))


def test_bfloat16_is_refused_for_sm75(bundle: Bundle) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Sigmoid", ["b"], ["s"], name="half"),
        helper.make_node("Cast", ["s"], ["y"], to=TensorProto.FLOAT),
    ]

    reason = only_reason(replace_model(bundle, model_of(*nodes)), "tensorrt-rtx:sm75")

    assert "bfloat16" in reason


def test_a_graph_that_fails_is_a_row_and_the_rest_goes_on(bundle: Bundle) -> None:
    rows = build(replace_model(bundle, b""))

    assert [bool(row.reason) for row in rows] == [True, False]
    (entry,) = Bundle.open(bundle.path).manifest.targets.device
    assert [failed.graph for failed in entry.failures] == ["onnx/model.onnx"]
    engines = SideEngines(Bundle.open(bundle.path), "device", "tensorrt-rtx:sm89")
    with pytest.raises(BackendError, match=r"whole model: there is no engine: .*it is empty"):
        engines.load(engines.graphs[0], 1)


def test_a_workspace_that_is_too_small_says_what_is_needed(bundle: Bundle) -> None:
    assert "the workspace of 10 bytes is too small" in only_reason(bundle, workspace_bytes=10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opt_batch": 8}, "--opt-batch is 8; a batch size from 1 to 4"),
        ({"batches": ()}, "batches are"),
        ({"batches": (0, 1)}, "batches are"),
        ({"opt_batch": 1, "per_batch": True}, "has no meaning with --engine-per-batch"),
        ({"gemm": "int8"}, "--gemm is 'int8'"),
        ({"workspace_bytes": 0}, "workspace_bytes is 0"),
        ({"timing_cache_sha256": "0"}, "name it with --timing-cache"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        BuildOptions(**{"batches": (1, 4), **options})


def test_a_batch_beyond_the_bundle_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="batch 128 is larger than 64"):
        build(bundle, batches=(1, 128))


def test_an_unknown_gpu_is_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="no architecture 'sm90'"):
        build(bundle, "tensorrt-rtx:sm90")
    with pytest.raises(UsageError, match="name the GPU that it is for"):
        build(bundle, "tensorrt-rtx")


def test_weights_that_were_changed_never_reach_the_cache(make_bundle: Callable[..., Bundle]) -> None:
    bundle = make_bundle()
    list_file(bundle, "onnx/weights.data", b"abcd", "weights")
    with edited(bundle) as document:
        document["model"]["weights"]["path"] = "onnx/weights.data"
    (bundle.path / "onnx/weights.data").write_bytes(b"abcx")

    with pytest.raises(BundleError, match=r"weights\.data.* was changed or damaged"):
        build(bundle)


def test_an_interrupted_build_stops_and_records_nothing(bundle: Bundle) -> None:
    def interrupt(step: Progress) -> None:
        if "Optimizing graph" in step.label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, "device", "tensorrt-rtx:sm89", SMALL, progress=interrupt)

    assert Bundle.open(bundle.path).manifest.targets.device == ()
    assert list(bundle.path.glob("engines/*/*")) == []


INTERRUPT = """
import os, signal, sys
from dsc_split.bundle import Bundle
from dsc_split.engines import BuildOptions, build_engines

def interrupt(step):
    if "Optimizing graph" in step.label:
        os.kill(os.getpid(), signal.SIGINT)

options = BuildOptions(batches=(1, 4))
try:
    build_engines(Bundle.open(sys.argv[1]), "device", "tensorrt-rtx:sm89", options, progress=interrupt)
except KeyboardInterrupt:
    print("interrupted")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_one_interrupt_from_outside_is_enough(bundle: Bundle) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPT, bundle.path], capture_output=True, text=True, check=False)

    assert done.stdout == "interrupted\nTrue\n", done.stderr
    assert done.stderr == ""
    assert Bundle.open(bundle.path).manifest.targets.device == ()


# ---- memory ------------------------------------------------------------------------------------------------


def test_an_engine_that_does_not_fit_is_built_for_smaller_batches(bundle: Bundle) -> None:
    sizes = {
        row.profile[2]: row.memory for row in build(bundle, batches=(1, 16, 64), per_batch=True)[:3] if row.profile
    }
    memory = stated(sizes[16])
    between = memory.activations[16] + stated(memory.weights_bytes)
    (row, _) = build(bundle, batches=(1, 16, 64), device_memory_bytes=between)

    assert row.profile == (1, 16, 16)
    assert row.lowered is not None
    assert row.lowered.startswith("batch 64 needs")
    engines = SideEngines(Bundle.open(bundle.path), "device")
    with pytest.raises(OutOfMemoryError, match="was built for batches up to 16: batch 64 needs"):
        engines.load(engines.graphs[0], 64)


def test_memory_at_every_batch_size_is_told_on_request(bundle: Bundle) -> None:
    (row, _) = build(bundle, batches=(1, 16, 64), memory_per_batch=True)

    assert row.profile == (1, 16, 64)
    sizes = stated(row.memory).activations
    assert sorted(sizes) == [1, 16, 64]
    assert sizes[1] < sizes[16] < sizes[64]


def test_an_engine_that_fits_at_no_batch_is_an_error(bundle: Bundle) -> None:
    assert "not even batch 1 fits" in only_reason(bundle, device_memory_bytes=100)


# ---- loading without a GPU ---------------------------------------------------------------------------------


@pytest.fixture
def built(bundle: Bundle) -> Bundle:
    """The tiny bundle with engines for SM89."""
    build(bundle)
    return Bundle.open(bundle.path)


def load(bundle: Bundle, batch: int = 1) -> None:
    engines = SideEngines(bundle, "device")
    engines.load(engines.graphs[0], batch)


def engine_path(bundle: Bundle) -> Path:
    return bundle.file(bundle.manifest.targets.device[0].built[0].path)


@pytest.mark.parametrize("position", [0, 9, 40, 2000, -1])
def test_a_flipped_byte_is_found_before_anything_is_loaded(built: Bundle, position: int) -> None:
    data = bytearray(engine_path(built).read_bytes())
    data[position] ^= 1
    engine_path(built).write_bytes(bytes(data))

    with pytest.raises(EngineFileError, match="SHA-256"):
        load(built)


def test_a_file_cut_short_is_refused(built: Bundle) -> None:
    engine_path(built).write_bytes(engine_path(built).read_bytes()[:-10])

    with pytest.raises(EngineFileError):
        load(built)


def test_an_engine_of_another_version_is_refused_with_the_command_that_rebuilds_it(built: Bundle) -> None:
    with edited(built) as document:
        targets_of(document, "device")[0]["fingerprint"]["version"] = "1.4.0.76"

    with pytest.raises(
        EngineMismatch, match=r"built for version '1\.4\.0\.76'; found .* dsc-split build .* --side device"
    ):
        load(built)


def test_an_engine_for_another_gpu_is_refused(built: Bundle) -> None:
    path = engine_path(built)

    with pytest.raises(EngineMismatch, match="was built for architecture sm89; found architecture sm86"):
        get_backend("tensorrt-rtx:sm86").load(path)


def test_an_engine_of_another_graph_is_refused(built: Bundle) -> None:
    with built.edit() as draft:
        (entry,) = draft.manifest.targets.device
        model, head = entry.built
        draft.set_targets("device", [replace(entry, engines=(replace(model, graph_digest=64 * "0"), head))])

    with pytest.raises(EngineMismatch, match=r"was built from another 'onnx/model\.onnx'"):
        load(built)


def test_a_batch_outside_the_profile_is_refused_with_the_command(built: Bundle) -> None:
    with pytest.raises(BackendError, match=r"batch 8 is larger than 4, .*--batches 1,4,8"):
        load(built, 8)


def test_a_target_without_engines_is_refused_with_the_command(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match=r"has no engines for target 'tensorrt-rtx:sm89'.*dsc-split build"):
        SideEngines(bundle, "device", "tensorrt-rtx:sm89")


def has_gpu() -> bool:
    try:
        get_backend("tensorrt-rtx:sm89").run_fingerprint()
    except DscError:
        return False
    return True


@pytest.mark.skipif(has_gpu(), reason="there is a GPU here")
def test_without_a_driver_engines_are_built_and_not_run(built: Bundle, dsc: Callable[..., Any]) -> None:
    with pytest.raises(BackendUnavailable, match="'tensorrt-rtx:sm89' cannot be used: no NVIDIA driver"):
        load(built)
    for command in ("check", "bench"):
        outcome = dsc(command, built.path, "--side", "device")
        assert outcome.exit_code == 5, outcome.stderr
        assert "no NVIDIA driver" in outcome.stderr


# ---- the command -------------------------------------------------------------------------------------------


def test_the_command_shows_engines_and_writes_bare_plans(
    bundle: Bundle, dsc: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = ("build", bundle.path, "--side", "device", "--target", "tensorrt-rtx:sm89", "--batches", "1,4")
    outcome = dsc(*arguments, "--raw", tmp_path / "raw")

    assert outcome.exit_code == 0, outcome.stderr
    assert "head a" in outcome.stdout
    assert "1 to 4" in outcome.stdout
    assert (tmp_path / "raw/a.head.plan").read_bytes()[:4] == b"vtrt"
    again = dsc(*arguments, "--json")
    assert [row["cached"] for row in json.loads(again.stdout)["rows"]] == [True, True]


def test_a_build_that_failed_for_one_engine_exits_with_4(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    replace_model(bundle, b"")

    outcome = dsc("build", bundle.path, "--side", "device", "--target", "tensorrt-rtx:sm89")

    assert outcome.exit_code == 4
    assert "1 of 2 engines cannot be built" in outcome.stderr
    assert "failed: device: whole model: " in outcome.stderr


def test_a_graph_newer_than_the_parser_is_refused_by_name(bundle: Bundle) -> None:
    with edited(bundle) as document:
        document["model"]["opset"] = {"": 99}

    with pytest.raises(UsageError, match=r"opset 99; tensorrt_rtx .* reads up to 25"):
        build(bundle)


def test_an_engine_that_lies_in_the_bundle_stays_as_it_is(bundle: Bundle, engine_cache: Path) -> None:
    first = build(bundle)
    before = (bundle.path / str(first[0].path)).stat()
    for path in (engine_cache / "engines").iterdir():
        path.unlink()

    assert [row.cached for row in build(bundle)] == [True, True]
    after = (bundle.path / str(first[0].path)).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_engine_of_another_graph_in_the_cache_is_not_taken(bundle: Bundle, engine_cache: Path) -> None:
    model, _ = build(bundle)
    records = {json.loads(path.read_text())["label"]: path for path in (engine_cache / "engines").glob("*.json")}
    wrong = records["head a"].with_suffix(".plan").read_bytes()
    record = json.loads(records["whole model"].read_text())
    record |= {"sha256": hashlib.sha256(wrong).hexdigest(), "size_bytes": len(wrong)}
    records["whole model"].write_text(json.dumps(record))
    records["whole model"].with_suffix(".plan").write_bytes(wrong)
    (bundle.path / str(model.path)).unlink()

    assert [row.cached for row in build(bundle)] == [False, True]
    assert read_header(bundle.path / str(model.path)).label == "whole model"


def test_an_engine_per_batch_that_does_not_fit_is_an_error_of_its_own(bundle: Bundle) -> None:
    sizes = {row.profile[2]: row.memory for row in build(bundle, per_batch=True)[:2] if row.profile and row.memory}
    between = sizes[1].activations[1] + stated(sizes[1].weights_bytes)
    rows = build(bundle, per_batch=True, device_memory_bytes=between)

    assert [bool(row.reason) for row in rows[:2]] == [False, True]
    assert "batch 4 needs" in rows[1].reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gemm", "foo", "--device", "tensorrt-rtx:sm89"), "--gemm is 'foo'"),
        (("--batches", "128", "--device", "tensorrt-rtx:sm89"), "--batches 128 is more than --max-batch 64"),
        (("--opt-batch", "7", "--batches", "1,4", "--device", "tensorrt-rtx:sm89"), "--opt-batch is 7"),
        (("--engine-per-batch",), "--engine-per-batch: no engines are built without --device or --server"),
    ],
)
def test_an_export_refuses_what_cannot_be_built_before_it_begins(
    dsc: Callable[..., Any], tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    outcome = dsc("export", "torchvision:no_such_model", "--output", tmp_path / "b", *options)

    assert outcome.exit_code == 2
    assert words in outcome.stderr
