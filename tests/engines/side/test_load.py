"""Which engine is loaded for a graph and a batch, and commands in messages that do what they promise."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from dsc_split._support.hashing import sha256_file
from dsc_split._support.records import read_record, to_document
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import RecordedOptions, TargetEntry
from dsc_split.engines import (
    BuildJob,
    BuildOptions,
    BuiltEngine,
    EngineFacts,
    EngineLike,
    EngineSource,
    SideEngines,
    Target,
    build_engines,
    check_engines,
    get_backend,
)
from dsc_split.errors import BackendError, BundleError, EngineMismatch, UsageError

TARGET = "tensorrt-rtx:sm89"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One engine cache for all tests: nearly all of them build the same."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(cache))


@pytest.fixture
def rtx() -> None:
    """Skip where engines cannot be built."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'dsc-split[rtx]'")


def build(bundle: Bundle, side: str = "device", target: str = TARGET, **options: Any) -> None:
    """Build a side's engines."""
    assert not build_engines(bundle, side, target, BuildOptions(**{"batches": (1, 4, 8), **options})).failed


def open_side(bundle: Bundle, side: str = "device", target: Any = None) -> SideEngines:
    """Open a side's engines as they lie on disk."""
    return SideEngines(Bundle.open(bundle.path), side, target)


def loaded(engines: SideEngines, *batches: int) -> list[str]:
    """Name the files that are loaded for the second graph, the head or the tail, by batch."""
    found: list[Any] = []
    engines.backend.load = lambda path, *, sha256=None, digest=None: found.append(path)  # type: ignore[method-assign, assignment, return-value]
    for batch in batches:
        engines.load(engines.graphs[1], batch)
    return [path.name for path in found]


def command_of(error: BaseException) -> list[str]:
    """Return the command at the end of a message, without the program's name."""
    program, *words = shlex.split(str(error).rpartition(": ")[2])
    assert program == "dsc-split"
    return words


# ---- which engine ----------------------------------------------------------------------------------------------


def test_one_engine_is_loaded_for_every_batch_up_to_its_largest(bundle: Bundle, rtx: None) -> None:
    build(bundle)

    assert loaded(open_side(bundle), 1, 3, 8) == ["a.head.plan"] * 3


def test_the_engine_of_a_batch_or_the_next_larger_one_is_loaded(bundle: Bundle, rtx: None) -> None:
    build(bundle, per_batch=True)

    names = loaded(open_side(bundle), 1, 2, 4, 5, 8)
    assert names == [f"a.head.b{batch}.plan" for batch in (1, 4, 4, 8, 8)]


def test_an_engine_that_failed_at_one_batch_is_replaced_by_the_next_larger_one(bundle: Bundle, rtx: None) -> None:
    build(bundle, per_batch=True)
    bundle = Bundle.open(bundle.path)
    with bundle.edit() as draft:
        (entry,) = draft.manifest.targets.device
        kept = tuple(engine for engine in entry.built if not engine.path.endswith("a.head.b4.plan"))
        draft.set_targets("device", [replace(entry, engines=kept)])

    assert loaded(open_side(bundle), 1, 4) == ["a.head.b1.plan", "a.head.b8.plan"]


def test_the_digests_of_the_file_and_of_the_graph_are_handed_on(bundle: Bundle, rtx: None) -> None:
    build(bundle)
    engines = open_side(bundle)
    digests: list[str | None] = []
    engines.backend.load = lambda path, *, sha256=None, digest=None: digests.extend((sha256, digest))  # type: ignore[method-assign, assignment, return-value]

    engines.load(engines.graphs[0], 1)

    file = sha256_file(next(bundle.path.glob("engines/*/model.plan")))
    assert digests == [file, bundle.graph_digest("onnx/model.onnx")]


def test_an_engine_file_in_the_place_of_another_one_is_refused_before_a_device_is_asked_for(
    bundle: Bundle, rtx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_device(**_: object) -> None:
        raise AssertionError("a device was asked for")

    build(bundle)
    bundle = Bundle.open(bundle.path)
    with bundle.edit() as draft:
        (entry,) = draft.manifest.targets.device
        model, head = entry.built
        swapped = (replace(model, path=head.path), replace(head, path=model.path))
        draft.set_targets("device", [replace(entry, engines=swapped)])
    engines = open_side(bundle)
    monkeypatch.setattr("dsc_split.engines.gpu._cuda.open_cuda", no_device)

    with pytest.raises(EngineMismatch, match=r"another graph.*Build it again: dsc-split build") as caught:
        engines.load(engines.graphs[1], 1)
    assert command_of(caught.value)[0] == "build"


def test_graphs_are_not_needed_where_engines_are(bundle: Bundle, rtx: None) -> None:
    build(bundle)
    shutil.rmtree(bundle.path / "onnx")

    assert loaded(open_side(bundle), 1) == ["a.head.plan"]
    with pytest.raises(BundleError, match=r"lacks 'onnx/model\.onnx'"):
        open_side(bundle, "server")


# ---- two targets -------------------------------------------------------------------------------------------------


def test_two_targets_of_one_side_have_engines_of_their_own(bundle: Bundle, rtx: None) -> None:
    build(bundle, target="tensorrt-rtx:sm86", batches=(1, 2))
    build(bundle, batches=(1, 4))

    ampere, ada = open_side(bundle, target="tensorrt-rtx:sm86"), open_side(bundle)
    assert str(ada.backend.target) == TARGET
    assert [engines.backend.options and engines.backend.options.batches for engines in (ampere, ada)] == [
        (1, 2),
        (1, 4),
    ]
    paths = [engines.load(engines.graphs[0], 1) for engines in map(recording, (ampere, ada))]
    assert str(paths[0]) != str(paths[1])
    with pytest.raises(BackendError, match=r"batch 4 is larger than 2.*--target tensorrt-rtx:sm86 --batches 1,2,4$"):
        ampere.load(ampere.graphs[0], 4)


def recording(engines: SideEngines) -> SideEngines:
    """Let a back-end give the path of what it should load."""
    engines.backend.load = lambda path, *, sha256=None, digest=None: path  # type: ignore[method-assign, assignment, return-value]
    return engines


def test_a_target_that_is_built_again_leaves_the_other_one_alone(bundle: Bundle, rtx: None) -> None:
    build(bundle, target="tensorrt-rtx:sm86")
    before = sorted(bundle.path.glob("engines/*sm86*/*.plan"))
    build(bundle)
    build(bundle, batches=(1, 2))

    assert sorted(bundle.path.glob("engines/*sm86*/*.plan")) == before
    assert loaded(open_side(bundle, target="tensorrt-rtx:sm86"), 8) == ["a.head.plan"]
    assert Bundle.open(bundle.path).targets("device") == ("tensorrt-rtx:sm86", TARGET)


def test_targets_that_differ_in_how_they_run_have_engines_of_their_own(bundle: Bundle, rtx: None) -> None:
    build(bundle)
    build(bundle, target=f"{TARGET},io=mapped")

    for target in (TARGET, f"{TARGET},io=mapped"):
        assert str(open_side(bundle, target=target).backend.target) == target
    build(bundle, batches=(1, 2))
    assert loaded(open_side(bundle, target=f"{TARGET},io=mapped"), 8) == ["a.head.plan"]


# ---- messages and their commands -----------------------------------------------------------------------------------


def other_version(bundle: Bundle, entry: TargetEntry) -> None:
    change(bundle, replace(entry, fingerprint={**entry.fingerprint, "version": "1.4.0.76"}))


def other_graph(bundle: Bundle, entry: TargetEntry) -> None:
    model, tail = entry.built
    change(bundle, replace(entry, engines=(model, replace(tail, graph_digest=64 * "0"))))


def not_listed(bundle: Bundle, entry: TargetEntry) -> None:
    with bundle.edit() as draft:
        gone = entry.built[1].path
        draft.change(files={path: listed for path, listed in draft.manifest.files.items() if path != gone})


def no_file(bundle: Bundle, entry: TargetEntry) -> None:
    bundle.file(entry.built[1].path).unlink()


def cut_anew(bundle: Bundle, entry: TargetEntry) -> None:
    change(bundle, replace(entry, engines=(), failed=()))


def never_built(bundle: Bundle, entry: TargetEntry) -> None:
    change(bundle)


def change(bundle: Bundle, *entries: TargetEntry) -> None:
    """Let the server have other targets."""
    with bundle.edit() as draft:
        draft.set_targets("server", entries)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (other_version, EngineMismatch),
        (other_graph, EngineMismatch),
        (not_listed, BundleError),
        (cut_anew, UsageError),
        (no_file, BundleError),
        (never_built, UsageError),
    ],
)
def test_the_command_in_the_message_mends_the_fault(
    bundle: Bundle,
    rtx: None,
    dsc: Callable[..., Any],
    fault: Callable[[Bundle, TargetEntry], None],
    error: type[Exception],
) -> None:
    options: dict[str, Any] = {"opt_batch": 4, "gemm": "fp16", "workspace_bytes": 2**30, "device_memory_bytes": 2**33}
    build(bundle, "server", **options)
    bundle = Bundle.open(bundle.path)
    (before,) = bundle.manifest.targets.server
    fault(bundle, before)

    with pytest.raises(error) as caught:
        loaded(open_side(bundle, "server", TARGET), 8)
    words = command_of(caught.value)
    outcome = dsc(*words)

    assert words[:6] == ["build", str(bundle.path), "--side", "server", "--target", TARGET]
    assert outcome.exit_code == 0, outcome.stderr
    assert loaded(open_side(bundle, "server", TARGET), 8) == ["a.tail.plan"]
    if fault is not never_built:
        (entry,) = Bundle.open(bundle.path).manifest.targets.server
        assert entry.options == before.options
        assert entry.fingerprint == before.fingerprint


@pytest.mark.parametrize("per_batch", [False, True])
def test_the_command_for_a_larger_batch_keeps_the_smaller_ones(
    bundle: Bundle, rtx: None, dsc: Callable[..., Any], per_batch: bool
) -> None:
    build(bundle, "server", per_batch=per_batch)
    engines = open_side(bundle, "server")

    with pytest.raises(BackendError, match="tail a: batch 16 is larger than 8, the largest") as caught:
        engines.load(engines.graphs[1], 16)
    dsc(*command_of(caught.value))

    names = ["a.tail.b1.plan", "a.tail.b16.plan"] if per_batch else ["a.tail.plan"] * 2
    assert loaded(open_side(bundle, "server"), 1, 16) == names


def test_a_pinned_timing_cache_stands_in_the_command() -> None:
    options = BuildOptions(batches=(1, 2), timing_cache=Path("t.cache"), timing_cache_sha256=64 * "a")

    command = BuildOptions.of_record(options.recorded()).command()

    assert command == f"--batches 1,2 --timing-cache FILE --timing-cache-sha256 {64 * 'a'}"


@pytest.mark.parametrize(
    "changes",
    [
        {"batches": (4, 1)},
        {"batches": (1, 1)},
        {"opt_batch": 16},
        {"opt_batch": 4, "per_batch": True},
        {"timing_cache_sha256": 64 * "a"},
    ],
    ids=str,
)
def test_options_in_the_manifest_that_do_not_fit_are_a_damaged_bundle(
    bundle: Bundle, rtx: None, changes: dict[str, Any]
) -> None:
    options = replace(BuildOptions(batches=(1, 4)).recorded(), **changes)
    entry = TargetEntry(target=TARGET, fingerprint={}, id="a", options=options, engines=(), failed=())
    with bundle.edit() as draft:
        draft.set_targets("device", [entry])

    with pytest.raises(BundleError, match=r"manifest\.json'") as caught:
        open_side(bundle)

    assert command_of(caught.value) == ["build", str(bundle.path), "--side", "device", "--target", TARGET]


def test_options_that_are_not_known_are_left_alone() -> None:
    options = BuildOptions(batches=(1, 4), gemm="conv", workspace_bytes=2**20)
    document = {**to_document(options.recorded()), "since_then": 1, "timing_cache": "x"}

    assert BuildOptions.of_record(read_record(document, RecordedOptions)) == options


@pytest.mark.parametrize("batches", [(1.5,), (True,), ("a",), ("a", 1), (None,), (0,), (2, 1), ()])
def test_batches_that_are_no_ascending_whole_numbers_are_misuse(batches: Any) -> None:
    with pytest.raises(UsageError, match=r"batches are .*; ascending whole numbers from 1 were expected"):
        BuildOptions(batches=batches)


@pytest.mark.parametrize("name", ["opt_batch", "workspace_bytes", "device_memory_bytes"])
@pytest.mark.parametrize("value", [1.5, True, "1", 0])
def test_a_number_that_is_no_whole_number_is_misuse(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=r"is .*; a whole number from 1 was expected"):
        BuildOptions(**{"batches": (1, 4), name: value})


@pytest.mark.parametrize("target", [None, "onnxruntime:cpu"])
def test_an_unknown_side_is_refused(bundle: Bundle, target: str | None) -> None:
    with pytest.raises(UsageError, match="side is 'both'; 'device' or 'server' was expected"):
        SideEngines(bundle, "both", target)


# ---- back-ends of one's own ------------------------------------------------------------------------------------


class Reference:
    """A back-end that is none of ours, and loads graphs as they are."""

    target = Target.parse("onnxruntime:cpu,threads=2")
    compiles = False
    options: BuildOptions | None = None

    def __init__(self) -> None:
        self.loaded: list[tuple[str, str | None]] = []

    def build_fingerprint(self) -> dict[str, Any]:
        return {"library": "mine", "version": "1", "architecture": "cpu"}

    def run_fingerprint(self) -> dict[str, Any]:
        return self.build_fingerprint()

    def live_state(self) -> dict[str, Any]:
        return {}

    def build(self, job: BuildJob) -> BuiltEngine | None:
        return None

    def load(self, source: Path | EngineSource, *, sha256: str | None = None, digest: str | None = None) -> EngineLike:
        self.loaded.append((source.name, sha256))
        return get_backend("onnxruntime:cpu").load(source)


class Compiler(Reference):
    """A back-end that is none of ours, and whose engines are copies of the graphs that take few batch sizes."""

    compiles = True

    def __init__(self) -> None:
        super().__init__()
        self.profiles: dict[str, tuple[int, int, int]] = {}
        self.batches: list[int] = []
        self.closed = 0

    def load(self, source: Path | EngineSource, *, sha256: str | None = None, digest: str | None = None) -> EngineLike:
        engine: Any = super().load(source, sha256=sha256, digest=digest)
        run, close, (smallest, _, largest) = engine.run, engine.close, self.profiles[source.name]

        def run_within(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            (batch,) = {len(array) for array in inputs.values()}
            assert smallest <= batch <= largest
            self.batches.append(batch)
            outputs: dict[str, np.ndarray] = run(inputs)
            return outputs

        def count_and_close() -> None:
            self.closed += 1
            close()

        engine.run, engine.close = run_within, count_and_close
        loaded: EngineLike = engine
        return loaded

    def build(self, job: BuildJob) -> BuiltEngine | None:
        self.profiles[job.output.name] = job.profile
        shutil.copy(job.graph, job.output)
        size_bytes = job.output.stat().st_size
        facts = EngineFacts(profile=job.profile)
        return BuiltEngine(
            path=job.output, sha256=sha256_file(job.output), size_bytes=size_bytes, facts=facts, cached=False
        )


def run(engines: SideEngines) -> Iterator[tuple[int, ...]]:
    """Run every engine; gives the shapes of their outputs."""
    for graph in engines.graphs:
        engine = engines.load(graph, 5)
        for output in engine.run({"x": np.ones((5, 3, 8, 8), np.float32)}).values():
            yield output.shape
        engine.close()


def test_a_backend_of_ones_own_loads_the_graphs(bundle: Bundle) -> None:
    backend = Reference()
    engines = SideEngines(bundle, "device", backend)

    assert engines.backend is backend
    assert list(run(engines)) == [(5, 4, 8, 8), (5, 2, 8, 8)]
    assert backend.loaded == [("model.onnx", None), ("a.head.onnx", None)]
    assert check_engines(bundle, "device", backend).passed
    assert Bundle.open(bundle.path).manifest.targets.device[0].library == "mine"


def test_a_backend_of_ones_own_that_compiles_loads_what_it_built(bundle: Bundle) -> None:
    backend = Compiler()
    with pytest.raises(UsageError, match=r"no engines for target 'onnxruntime:cpu,threads=2' on side 'device'"):
        SideEngines(bundle, "device", backend)

    result = build_engines(bundle, "device", backend, BuildOptions(batches=(1, 8)))

    assert not result.failed
    assert list(run(open_side(bundle, target=backend))) == [(5, 4, 8, 8), (5, 2, 8, 8)]
    digests = [sha256_file(bundle.path / str(row.path)) for row in result.rows]
    assert backend.loaded == list(zip(("model.plan", "a.head.plan"), digests, strict=True))
    assert check_engines(bundle, "device", backend).passed


COUNTER = itertools.count()


class Restless(Compiler):
    """Builds another file each time, as TensorRT does."""

    def build(self, job: BuildJob) -> BuiltEngine | None:
        built = super().build(job)
        assert built is not None
        with built.path.open("ab") as file:
            file.write(b"%d" % next(COUNTER))
        return dataclasses.replace(built, sha256=sha256_file(built.path), size_bytes=built.path.stat().st_size)


def test_an_engine_that_is_built_again_is_listed_with_the_digest_of_its_new_file(bundle: Bundle) -> None:
    listed = []
    for _ in range(2):
        (row, _head) = build_engines(bundle, "device", Restless(), BuildOptions(batches=(1, 8))).rows
        listed.append(Bundle.open(bundle.path).manifest.files[str(row.path)].sha256)

    assert listed[0] != listed[1] == sha256_file(bundle.path / str(row.path))


@pytest.mark.parametrize("side", ["device", "server"])
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"batches": (1,)}, [1, 1]),
        ({"batches": (1, 2, 4)}, [2]),
        ({"batches": (4, 8)}, [4]),
        ({"batches": (1,), "per_batch": True}, [1, 1]),
        ({"batches": (4, 8), "per_batch": True}, [2]),
    ],
)
def test_engines_for_other_batches_than_that_of_the_samples_are_checked(
    bundle: Bundle, side: str, options: dict[str, Any], batches: list[int]
) -> None:
    backend = Compiler()
    build_engines(bundle, side, backend, BuildOptions(**options))

    result = check_engines(bundle, side, backend)

    assert [row.reason for row in result.rows] == ["", ""]
    assert backend.batches == batches * 2
    assert backend.closed == len(backend.loaded) == 2


def test_samples_that_an_engine_takes_one_by_one_are_all_checked(bundle: Bundle, tmp_path: Path) -> None:
    backend = Compiler()
    build_engines(bundle, "device", backend, BuildOptions(batches=(1,)))
    with np.load(bundle.path / "samples/model.npz") as saved:
        samples = dict(saved)
    samples["output:y"][1] += 1
    np.savez(bundle.path / "samples/model.npz", **samples)

    whole, head = check_engines(bundle, "device", backend, save_tensors=tmp_path / "device.npz").rows

    assert "'y' is off by" in whole.reason
    assert head.passed
    with np.load(tmp_path / "device.npz") as saved:
        assert saved["a/a"].shape == (2, 2, 8, 8)
