"""Engines that cannot be used here: of another kind of machine, damaged, not trusted; and what runs instead."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.full_bundles import list_file
from tests.support.manifests import edited, stated, targets_of
from tests.support.own_backend import OwnBackend

from dsc_split.bundle import Bundle
from dsc_split.engines import SideEngines, build_engines, check_engines
from dsc_split.engines.side._inputs import engine_inputs
from dsc_split.errors import (
    BackendUnavailable,
    BundleError,
    EngineFileError,
    EngineMismatch,
    SignatureError,
    UsageError,
)
from dsc_split.packing import Trust, generate_key, pack_bundle

X = np.ones((1, 3, 8, 8), np.float32)


def build(bundle: Bundle, backend: OwnBackend, side: str = "device") -> None:
    """Build a side's engines, and read the manifest that this leaves."""
    assert not build_engines(bundle, side, backend).failed
    bundle.manifest = Bundle.open(bundle.path).manifest


def kinds(bundle: Bundle) -> list[tuple[str, str, str]]:
    """Name target, GPU and version of what is recorded for the device."""
    entries = Bundle.open(bundle.path).manifest.targets.device
    return [(entry.target, str(entry.fingerprint.get("gpu")), str(entry.fingerprint["version"])) for entry in entries]


def make_whole(bundle: Bundle) -> None:
    """List the samples, too, and say which pairs these are."""
    for path in ("samples/model.npz", "samples/a.npz"):
        list_file(bundle, path, (bundle.path / path).read_bytes(), "sample")
    with bundle.edit() as draft:
        draft.change(pair_id=bundle.compute_pair_id())


@pytest.fixture
def built(bundle: Bundle) -> Bundle:
    """The tiny bundle with engines for the device."""
    make_whole(bundle)
    build(bundle, OwnBackend())
    return bundle


# ---- several kinds of machine under one target -------------------------------------------------------------------


def test_kinds_of_machine_live_side_by_side_under_one_target(bundle: Bundle) -> None:
    orin, thor = OwnBackend(gpu="Orin"), OwnBackend(gpu="Thor")
    build(bundle, orin)
    build(bundle, thor)

    assert kinds(bundle) == [("tensorrt:cuda", "Orin", "1"), ("tensorrt:cuda", "Thor", "1")]
    for backend in (orin, thor):
        engines = SideEngines(Bundle.open(bundle.path), "device", backend)
        engines.load(engines.graphs[0], 1).close()
        assert check_engines(Bundle.open(bundle.path), "device", backend).passed
    checked = Bundle.open(bundle.path).manifest.targets.device
    assert [stated(entry.check).passed for entry in checked] == [True, True]


def test_a_build_for_one_kind_again_replaces_that_one_alone_and_moves_it_to_the_end(bundle: Bundle) -> None:
    for backend in (OwnBackend(gpu="Orin"), OwnBackend(gpu="Thor")):
        build(bundle, backend)
    thor = set(bundle.path.glob("engines/*/*"))
    build(bundle, OwnBackend(gpu="Orin", version="2"))

    assert kinds(bundle) == [("tensorrt:cuda", "Thor", "1"), ("tensorrt:cuda", "Orin", "2")]
    assert len(set(bundle.path.glob("engines/*/*")) & thor) == 2
    assert len(set(bundle.path.glob("engines/*/*"))) == 4


def test_on_a_kind_that_nothing_was_built_for_the_newest_is_refused_by_name(bundle: Bundle) -> None:
    for gpu in ("Orin", "Thor"):
        build(bundle, OwnBackend(gpu=gpu))

    with pytest.raises(EngineMismatch, match="built for gpu 'Thor'; found gpu 'Nano'"):
        SideEngines(bundle, "device", OwnBackend(gpu="Nano"))


# ---- a build that is stopped ---------------------------------------------------------------------------------------


class StoppedError(Exception):
    """What a test raises in place of a killed process."""


def test_a_build_that_is_stopped_before_the_manifest_is_written_leaves_the_old_engines_whole(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path, data: bytes) -> None:
        raise StoppedError

    before = (built.path / "manifest.json").read_bytes()
    monkeypatch.setattr("dsc_split.bundles._bundle.write_bytes", stop)
    with pytest.raises(StoppedError):
        build_engines(built, "device", OwnBackend())
    monkeypatch.undo()

    assert (built.path / "manifest.json").read_bytes() == before
    after = Bundle.open(built.path)
    engines = [path for path in after.manifest.files if path.startswith("engines/")]
    assert len(engines) == 2
    assert all(after.read(path) for path in engines)
    assert check_engines(after, "device", OwnBackend()).passed


def test_the_next_build_removes_what_a_stopped_one_left_and_nothing_else(built: Bundle) -> None:
    (folder,) = built.path.glob("engines/*")
    for name in ("model.7.plan", ".model.plan.abc.partial", "own.txt"):
        (folder / name).write_bytes(b"x")
    outside = built.path.parent / "outside"
    outside.mkdir()
    (outside / "own.plan").write_bytes(b"x")
    (built.path / "engines/linked").symlink_to(outside)

    for _ in range(3):
        build(built, OwnBackend())

    listed = {path for path in built.manifest.files if path.startswith(f"engines/{folder.name}/")}
    assert {f"engines/{folder.name}/{path.name}" for path in folder.iterdir()} == {
        *listed,
        f"engines/{folder.name}/own.txt",
    }
    assert (outside / "own.plan").exists()


def test_recording_a_target_again_writes_nothing_and_keeps_its_check(built: Bundle) -> None:
    from dsc_split.engines.side._sides import record_target

    check_engines(built, "device", OwnBackend())
    before = (built.path / "manifest.json").read_bytes()
    with built.lock():
        record_target(built, "device", OwnBackend())
    assert (built.path / "manifest.json").read_bytes() == before

    build_engines(built, "device", "onnxruntime:cpu")
    with built.lock():
        record_target(built, "device", OwnBackend())
    entry = Bundle.open(built.path).manifest.targets.device[-1]
    assert entry.target == "tensorrt:cuda"
    assert stated(entry.check).passed


# ---- the graphs instead --------------------------------------------------------------------------------------------


def damage(bundle: Bundle) -> None:
    for path in bundle.path.glob("engines/*/*.plan"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")


def lose(bundle: Bundle) -> None:
    shutil.rmtree(bundle.path / "engines")


def fit_another_version(bundle: Bundle) -> None:
    with edited(bundle) as document:
        targets_of(document, "device")[0]["fingerprint"]["version"] = "0"


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (damage, EngineFileError, "is damaged"),
        (lose, BundleError, "lacks 'engines/"),
        (fit_another_version, EngineMismatch, "were built for version '0'; found version '1'"),
    ],
)
def test_the_graphs_run_where_engines_cannot_and_one_warning_says_why(
    built: Bundle, caplog: pytest.LogCaptureFixture, fault: Callable[[Bundle], None], error: type[Exception], words: str
) -> None:
    fault(built)
    opened = Bundle.open(built.path)

    with pytest.raises(error, match=words) as caught:
        open_and_load(opened, fallback=False)
    engines = open_and_load(opened, fallback=True)

    assert str(engines.backend.target) == "onnxruntime:cpu"
    assert engines.fallback_reason == str(caught.value)
    assert caplog.text.count("the graphs run on onnxruntime:cpu instead") == 1
    result = check_engines(opened, "device", OwnBackend(), fallback=True)
    assert (result.passed, result.target, result.fallback_reason) == (True, "onnxruntime:cpu", str(caught.value))


def open_and_load(bundle: Bundle, *, fallback: bool) -> SideEngines:
    engines = SideEngines(bundle, "device", OwnBackend(), fallback=fallback)
    for graph in engines.graphs:
        engine = engines.load(graph, 1)
        engine.run(engine_inputs(bundle, graph, ["x"], 1))
        engine.close()
    return engines


def test_engines_that_can_be_used_are_used(built: Bundle) -> None:
    engines = open_and_load(built, fallback=True)

    assert isinstance(engines.backend, OwnBackend)
    assert engines.backend.loaded == ["model.plan", "a.head.plan"]
    assert engines.fallback_reason is None


def test_a_library_that_is_not_there_is_fallen_back_from(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)

    with pytest.raises(BackendUnavailable):
        SideEngines(built, "device", "tensorrt:cuda")
    engines = SideEngines(built, "device", "tensorrt:cuda", fallback=True)

    assert "tensorrt" in str(engines.fallback_reason)
    assert engines.load(engines.graphs[0], 1).run({"x": X})["y"].shape == (1, 4, 8, 8)


def test_without_graphs_the_error_names_both_reasons(built: Bundle) -> None:
    damage(built)
    shutil.rmtree(built.path / "onnx")

    with pytest.raises(
        EngineFileError, match=r"is damaged.*Nor can the graphs be run instead: .*lacks 'onnx/model.onnx'"
    ):
        open_and_load(Bundle.open(built.path), fallback=True)


def test_a_graph_that_is_damaged_is_not_fallen_back_to(built: Bundle) -> None:
    damage(built)
    (built.path / "onnx/a.head.onnx").write_bytes(b"x")

    with pytest.raises(EngineFileError, match=r"Nor can the graphs be run.*'onnx/a.head.onnx'.*changed or damaged"):
        open_and_load(Bundle.open(built.path), fallback=True)


def test_the_command_falls_back_where_it_is_asked_to(
    built: Bundle, dsc: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)

    refused = dsc("check", built.path, "--side", "device")
    done = dsc("check", built.path, "--side", "device", "--fallback", "--json")

    assert refused.exit_code == 5
    assert done.exit_code == 0, done.stderr
    assert "the graphs run on onnxruntime:cpu instead" in done.stderr
    document = json.loads(done.stdout)
    assert document["target"] == "onnxruntime:cpu"
    assert not document["fit"]["loadable"]


# ---- packed bundles and parts ------------------------------------------------------------------------------------


@pytest.fixture
def packed(built: Bundle) -> Path:
    """The bundle as one file, unsigned."""
    return Path(pack_bundle(Bundle.open(built.path), built.path.parent / "b.dscb").path)


def test_engines_of_a_packed_bundle_are_loaded_only_where_they_are_trusted(
    built: Bundle, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tmp_path / "release.key"
    generate_key(key)
    signed = Path(pack_bundle(Bundle.open(built.path), tmp_path / "signed.dscb", sign=[key]).path)
    trust = Trust(keys=(tmp_path / "release.key.pub",))

    with pytest.raises(SignatureError, match="--trust PUBLIC_KEY"):
        SideEngines(Bundle.open(packed), "device", OwnBackend())
    for bundle in (Bundle.open(signed, trust=trust), Bundle.open(packed, trust=Trust(allow_unsigned=True))):
        assert bundle.is_packed
        assert check_engines(bundle, "device", OwnBackend()).passed
        assert open_and_load(bundle, fallback=False).fallback_reason is None
    assert caplog.text.count("is packed, and is not written to") == 2


def test_an_untrusted_packed_bundle_falls_back_to_its_graphs_and_says_so(
    packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backend = OwnBackend()

    engines = SideEngines(Bundle.open(packed), "device", backend, fallback=True)

    assert engines.load(engines.graphs[0], 1).run({"x": X})["y"].shape == (1, 4, 8, 8)
    assert backend.loaded == []
    assert "--trust PUBLIC_KEY" in str(engines.fallback_reason)
    assert "--trust PUBLIC_KEY" in caplog.text


def test_a_compiled_engine_within_a_graph_of_a_packed_bundle_needs_trust_as_well(bundle: Bundle) -> None:
    import onnx
    from onnx import helper

    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=1, ep_cache_context=b"native")
    model = onnx.load(bundle.model_path)
    del model.graph.node[:]
    model.graph.node.append(node)
    data = model.SerializeToString()
    list_file(bundle, "onnx/model.onnx", data, "model")
    make_whole(bundle)
    packed = pack_bundle(bundle, bundle.path.parent / "b.dscb").path

    engines = SideEngines(Bundle.open(packed), "device", "onnxruntime:cpu")
    with pytest.raises(SignatureError, match=r"EPContext.*native code"):
        engines.load(engines.graphs[0], 1)


def test_a_packed_bundle_is_checked_by_the_command_and_never_built(packed: Path, dsc: Callable[..., Any]) -> None:
    done = dsc("check", packed, "--side", "server")
    refused = dsc("build", packed, "--side", "server", "--target", "onnxruntime:cpu")

    assert done.exit_code == 0, done.stderr
    assert "tail a: passed" in done.stdout
    assert "engines for this machine: yes" in done.stdout
    assert refused.exit_code == 2
    assert "Unpack it: dsc-split unpack" in refused.stderr


def test_a_part_refuses_the_other_side_and_says_how_to_get_its_graphs(built: Bundle, dsc: Callable[..., Any]) -> None:
    path = pack_bundle(Bundle.open(built.path), built.path.parent / "device.dscb", side="device").path
    part = Bundle.open(path, trust=Trust(allow_unsigned=True))

    assert check_engines(part, "device", OwnBackend()).passed
    with pytest.raises(UsageError, match=r"is the device's part of a bundle; side 'server' was asked for"):
        SideEngines(part, "server", "onnxruntime:cpu")
    with pytest.raises(BundleError, match=r"the device's part.*was left out.*--with-onnx"):
        SideEngines(part, "device", "onnxruntime:cpu")
    with pytest.raises(EngineMismatch, match=r"Nor can the graphs be run instead.*--with-onnx"):
        SideEngines(part, "device", OwnBackend(version="9"), fallback=True)
