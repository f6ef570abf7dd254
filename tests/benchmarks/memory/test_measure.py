import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from onnx import helper
from tests.support.manifests import document_of, targets_of, write_document
from tests.support.memory_reports import NONE, engine, held, make_table, report
from tests.support.tiny_bundles import A, X

from dsc_split._support.strict_json import body_digest
from dsc_split.benchmarks.memory import _measure as _residency_measure
from dsc_split.benchmarks.memory._budget import keep_within
from dsc_split.benchmarks.memory._measure import measure_memory
from dsc_split.benchmarks.memory._reports import MemoryReport, SetMemory, builder_memory, load_memory, save_memory
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import BuilderMemory, EngineEntry, FileEntry, TargetEntry
from dsc_split.errors import BackendError, BackendUnavailable, BundleError, DamagedError, UsageError
from dsc_split.lookup_table import Choice, Side

# ---- sums --------------------------------------------------------------------------------------------------


def test_what_is_shared_counts_once() -> None:
    memory = report("server", {"s1": 100, "s2": 90, "s3": 80}, held(170, "s1", "s2", "s3"))

    assert memory.shared_bytes == 50
    assert [memory.hold(names).memory_bytes for names in (["s1"], ["s1", "s2"], ["s2", "s3"])] == [100, 140, 120]
    assert memory.hold(["s1", "s2"]).source == "estimated"
    assert memory.hold(["s1"]).source == "measured"


def test_a_set_that_was_measured_is_not_estimated() -> None:
    memory = report("server", {"s1": 100, "s2": 90, "s3": 80}, held(170, "s1", "s2", "s3"), held(155, "s2", "s1"))

    assert memory.hold(["s1", "s2"]) == held(155, "s2", "s1")


def test_no_set_takes_more_than_a_larger_one_that_was_measured() -> None:
    memory = report("server", {"s1": 100, "s2": 90, "s3": 10}, held(120, "s1", "s2", "s3"))

    assert memory.hold(["s1", "s2"]).memory_bytes == 120


def test_memory_of_the_gpu_counts_where_there_is_one() -> None:
    engines = (engine("s1", 500, gpu_bytes=70), engine("s2", 400, gpu_bytes=30))
    memory = report("server", {}, engines=engines)

    assert memory.hold(["s1", "s2"]) == SetMemory(
        choices=("s1", "s2"), resident_bytes=None, gpu_bytes=100, source="estimated"
    )


# ---- files -------------------------------------------------------------------------------------------------


def test_a_report_is_read_as_it_was_written(bundle: Bundle) -> None:
    digest = bundle.graph_digest("onnx/model.onnx")
    written = report("device", {}, engines=(engine(NONE, 123, graph_digest=digest),))
    path = save_memory(bundle, written)

    assert path.relative_to(bundle.path) == Path("memory/device-ffffffffffff.json")
    assert MemoryReport.parse(path.read_bytes(), path.name) == written
    assert load_memory(bundle, "device", Side(target="onnxruntime:cpu", fingerprint="f" * 64)) == written
    assert load_memory(bundle, "server", Side(target="onnxruntime:cpu", fingerprint="f" * 64)) is None


def test_numbers_of_another_machine_of_the_same_kind_are_taken_and_others_are_not(bundle: Bundle) -> None:
    digest = bundle.graph_digest("onnx/model.onnx")
    save_memory(bundle, report("device", {}, engines=(engine(NONE, 123, graph_digest=digest),)))

    def found(**run_fingerprint: Any) -> MemoryReport | None:
        side = Side(target="onnxruntime:cpu", fingerprint="a" * 64, run_fingerprint=run_fingerprint)
        return load_memory(bundle, "device", side)

    assert found(host="there", threads=1) is not None
    assert found(host="there", threads=1, locked_sm_clock_mhz=900) is not None
    assert found(host="here", threads=2) is None


def test_engines_of_other_graphs_are_passed_over_with_their_sets(bundle: Bundle) -> None:
    digest = bundle.graph_digest("onnx/model.onnx")
    engines = (engine(NONE, 123, graph_digest=digest), engine("a", 100))
    save_memory(bundle, report("device", {}, held(200, NONE, "a"), engines=engines))

    found = load_memory(bundle, "device", Side(target="onnxruntime:cpu", fingerprint="f" * 64))

    assert found is not None
    assert ([item.choice for item in found.engines], found.sets) == ([NONE], ())


def test_a_report_that_is_sealed_is_read_as_it_was_sealed(tmp_path: Path, bundle: Bundle) -> None:
    digest = bundle.graph_digest("onnx/model.onnx")
    path = save_memory(bundle, report("device", {}, engines=(engine(NONE, 123, graph_digest=digest),)))
    data, name = path.read_bytes(), path.relative_to(bundle.path).as_posix()
    item = FileEntry(sha256=64 * "0", size_bytes=len(data), role="memory")
    bundle.manifest = replace(bundle.manifest, files={**bundle.manifest.files, name: item})

    with pytest.raises(BundleError, match="has SHA-256"):
        load_memory(bundle, "device", Side(target="onnxruntime:cpu", fingerprint="f" * 64))


def test_every_changed_byte_of_a_report_is_found(bundle: Bundle) -> None:
    path = save_memory(bundle, report("device", {NONE: 123, "a": 77}, held(150, NONE, "a")))
    data = path.read_bytes()

    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(DamagedError):
            MemoryReport.parse(path.read_bytes(), path.name)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("side", "both", "side: got 'both'"),
        ("engines", [{}], r"engines\[0\].choice: the key is missing"),
        (
            "sets",
            [{"choices": ["b"], "resident_bytes": 1, "gpu_bytes": None, "source": "measured"}],
            r"sets\[0\].choices\[0\]: got 'b'; expected",
        ),
        ("version", 2, "version 2"),
        ("format", "else", "'else'"),
    ],
)
def test_a_report_of_another_form_is_refused(bundle: Bundle, key: str, value: object, says: str) -> None:
    path = save_memory(bundle, report("device", {NONE: 123}))
    body = {**json.loads(path.read_text()), key: value}
    del body["body_sha256"]
    path.write_text(json.dumps({**body, "body_sha256": body_digest(body)}))

    with pytest.raises(DamagedError, match=says):
        MemoryReport.parse(path.read_bytes(), path.name)


# ---- the builder's numbers ---------------------------------------------------------------------------------


def build(bundle: Bundle) -> None:
    """Give the device engines, without a library that builds them."""
    told = BuilderMemory(activation_bytes={"1": 1000, "8": 8000}, scratch_bytes=1, weights_bytes=500)
    engines = [
        EngineEntry(
            graph=path,
            graph_digest=bundle.graph_digest(path),
            path=f"engines/{name}.plan",
            profile=(1, 8, 8),
            memory=told,
        )
        for name, path in (("model", "onnx/model.onnx"), ("a", "onnx/a.head.onnx"))
    ]
    entry = TargetEntry(target="tensorrt-rtx:sm86", fingerprint={}, id="rtx", engines=tuple(engines), failed=())
    with bundle.edit() as draft:
        draft.set_targets("device", [entry])


@pytest.mark.parametrize(("batch", "size_bytes"), [(1, 1500), (2, 8500), (8, 8500), (64, 8500), (None, 8500)])
def test_the_builder_told_weights_and_activations(bundle: Bundle, batch: int | None, size_bytes: int) -> None:
    build(bundle)

    told = builder_memory(bundle, "device", "tensorrt-rtx:sm86", batch)

    assert told is not None
    assert [(item.choice, item.gpu_bytes, item.source) for item in told.engines] == [
        (NONE, size_bytes, "builder"),
        ("a", size_bytes, "builder"),
    ]
    assert told.hold([NONE, "a"]) == SetMemory(
        choices=(NONE, "a"), resident_bytes=None, gpu_bytes=2 * size_bytes, source="builder"
    )


def test_where_nothing_runs_the_builders_numbers_are_the_answer(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*arguments: object) -> None:
        raise BackendUnavailable("no GPU is visible")

    monkeypatch.setattr(_residency_measure, "SideEngines", unavailable)
    with pytest.raises(BackendUnavailable, match="no GPU"):
        measure_memory(bundle, "device", target="tensorrt-rtx:sm86")
    build(bundle)

    told = measure_memory(bundle, "device", batch=1)

    assert [item.gpu_bytes for item in told.engines] == [1500, 1500]
    assert not (bundle.path / "memory").exists()
    assert load_memory(bundle, "device", Side(target="tensorrt-rtx:sm86", fingerprint="0" * 64)) is not None


@pytest.mark.parametrize("told", [{}, {"x": 1}, {"1": -1}, {"1": "many"}, []])
def test_numbers_in_the_manifest_that_are_none_are_refused(bundle: Bundle, told: object) -> None:
    build(bundle)
    document = document_of(bundle)
    targets_of(document, "device")[0]["engines"][0]["memory"]["activation_bytes"] = told
    write_document(bundle, document)

    with pytest.raises(BundleError, match=r"targets\.device\[0\]\.engines\[0\]\.memory\.activation_bytes"):
        Bundle.open(bundle.path)


# ---- measuring ---------------------------------------------------------------------------------------------


def test_memory_of_an_engine_is_what_its_weights_take_and_more(
    bundle: Bundle, replace_graph: Callable[..., Bundle]
) -> None:
    values = np.random.default_rng(0)
    weights = {"w0": (512, 3, 3, 3), "w1": (512, 512, 3, 3), "w2": (2, 512, 3, 3)}
    nodes = [
        helper.make_node("Conv", [source, weight], [result], pads=[1, 1, 1, 1])
        for source, weight, result in (("x", "w0", "p"), ("p", "w1", "q"), ("q", "w2", "a"))
    ]
    arrays = {name: values.standard_normal(shape, dtype=np.float32) for name, shape in weights.items()}
    bundle = replace_graph(bundle, "onnx/a.head.onnx", nodes, [X], [A], **arrays)
    weights_bytes = sum(array.nbytes for array in arrays.values())

    found = measure_memory(bundle, "device", batch=1)

    sizes = {item.choice: item.resident_bytes or 0 for item in found.engines}
    assert weights_bytes < sizes["a"] < 10 * weights_bytes
    assert sizes[NONE] < weights_bytes
    assert all((item.load_ms or 0) > 0 and (item.first_run_ms or 0) > 0 for item in found.engines)
    assert [item.choices for item in found.sets] == [(NONE, "a")]
    assert weights_bytes < (found.sets[0].resident_bytes or 0) <= 1.1 * sum(sizes.values())
    (path,) = (bundle.path / "memory").iterdir()
    assert MemoryReport.parse(path.read_bytes(), path.name) == found


@pytest.mark.slow
def test_an_engine_for_which_memory_ends_runs_half_as_many(bundle: Bundle, sabotage: Callable[[str], None]) -> None:
    sabotage(
        "from dsc_split.engines._base import Engine\n"
        "bind = Engine.bind\n"
        "def limited(self, inputs):\n"
        "    if any(len(array) > 2 for array in inputs.values()) and 'head' in self._name:\n"
        "        raise MemoryError\n"
        "    return bind(self, inputs)\n"
        "Engine.bind = limited\n"
    )

    found = measure_memory(bundle, "device", batch=5)

    assert {item.choice: item.batch for item in found.engines} == {NONE: 5, "a": 2}


@pytest.mark.slow
def test_an_engine_that_kills_its_process_is_named_with_the_reason(
    bundle: Bundle, sabotage: Callable[[str], None]
) -> None:
    sabotage(
        "import os, signal\n"
        "from dsc_split.engines._base import Engine\n"
        "bind = Engine.bind\n"
        "def deadly(self, inputs):\n"
        "    if 'head' in self._name:\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return bind(self, inputs)\n"
        "Engine.bind = deadly\n"
    )

    found = measure_memory(bundle, "device", batch=1)

    whole, head = found.engines
    assert whole.resident_bytes is not None
    assert (head.resident_bytes, head.gpu_bytes, head.load_ms) == (None, None, None)
    assert "SIGSEGV" in head.reason
    choices = [Choice(id=1, kind="split", name="a"), Choice(id=2, kind=NONE, name=NONE)]
    table = make_table(choices, {1: {"a": (5.0, 4.0, 10**5), NONE: (40.0, 0.0, 0)}})
    with pytest.raises(UsageError, match="'a' on the device is not known"):
        keep_within(table, {"device": found}, {"device": 10**9})


@pytest.mark.slow
def test_nothing_that_runs_is_an_error_with_the_reasons(bundle: Bundle, sabotage: Callable[[str], None]) -> None:
    sabotage(
        "from dsc_split.engines._base import Engine\n"
        "def broken(self, inputs):\n"
        "    raise RuntimeError('broken')\n"
        "Engine.bind = broken\n"
    )

    with pytest.raises(BackendError, match=r"no engine of the device could be run. no-offload: .*broken; a: .*broken"):
        measure_memory(bundle, "device", batch=1)
    assert not (bundle.path / "memory").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"side": "both"}, "side is 'both'"),
        ({"side": "device", "batch": 65}, "batch 65 is larger than 64"),
        ({"side": "device", "sets": [["a", "b"]]}, "choice 'b' has no engine on side 'device'"),
        ({"side": "server", "sets": [[NONE]]}, "choice 'no-offload' has no engine on side 'server'"),
        ({"side": "device", "target": "nonsense"}, "nonsense"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    bundle: Bundle, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        measure_memory(bundle, **arguments)
