"""Timing again what does not hold here, one side at a time, and parts of a bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from tests.support.fake_executor import FakeExecutor
from tests.support.tiny_bundles import tiny_bundle

from dsc_split._support.hashing import sha256_file
from dsc_split.benchmarks import BenchSettings, CellStore, bench_bundle, write_tables
from dsc_split.bundle import Bundle
from dsc_split.bundles._manifest import ENVELOPE, encode_manifest
from dsc_split.bundles._records import FileEntry
from dsc_split.engines import Backend
from dsc_split.errors import UsageError

ONE = "onnxruntime:cpu,threads=1"
pytestmark = pytest.mark.usefixtures("fake_executor")
OPTIONS = ["--precision-goal", "1000", "--time-limit", "0.2"]


@pytest.fixture(scope="module")
def timed_once(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that was timed here, both sides, at batch 2."""
    bundle = tiny_bundle(tmp_path_factory.mktemp("timed") / "bundle")
    settings = BenchSettings(precision_goal=1e6, time_limit_s=0.2)
    executor = FakeExecutor()
    bench_bundle(bundle, device=f"{ONE},slowdown=6", server=ONE, batches=[2], settings=settings, executor=executor)
    write_tables(bundle)
    return bundle


@pytest.fixture
def timed(timed_once: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the bundle that was timed here."""
    return Bundle.open(shutil.copytree(timed_once.path, tmp_path / "copy"))


@pytest.fixture
def change(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let this machine be another one: ``change(power_mode="15W")``."""
    fingerprint = Backend.run_fingerprint

    def apply(**facts: Any) -> None:
        monkeypatch.setattr(Backend, "run_fingerprint", lambda self: {**fingerprint(self), **facts})

    return apply


def test_times_that_hold_are_not_taken_again(
    timed: Bundle, dsc: Callable[..., Any], change: Callable[..., None]
) -> None:
    before = (timed.path / "table.json").read_bytes()
    change(host="a twin of this machine")

    done = dsc("bench", timed.path, "--side", "both", "--stale", *OPTIONS)

    assert (done.exit_code, done.stdout) == (0, "")
    assert "nothing is stale" in done.stderr
    assert json.loads(dsc("bench", timed.path, "--side", "both", "--stale", "--json").stdout)["cells"] == []
    assert (timed.path / "table.json").read_bytes() == before


def test_after_a_change_of_power_mode_one_command_times_that_side_again(
    timed: Bundle, dsc: Callable[..., Any], change: Callable[..., None]
) -> None:
    before = Bundle.open(timed.path).table()
    change(power_mode="15W")

    done = dsc("bench", timed.path, "--side", "device", "--stale", *OPTIONS)

    assert done.exit_code == 0, done.stderr
    assert "2 cells (2 ok; 0 of them reused)" in done.stdout
    after = Bundle.open(timed.path).table()
    assert after.device.run_fingerprint is not None
    assert after.device.run_fingerprint["power_mode"] == "15W"
    assert (after.server, [item.batch for item in after.batches]) == (before.server, [2])
    assert after.device.fingerprint != before.device.fingerprint
    assert len(list((timed.path / "tables").iterdir())) == 2
    assert "nothing is stale" in dsc("bench", timed.path, "--side", "device", "--stale", *OPTIONS).stderr


def test_going_back_to_a_state_that_was_timed_before_brings_its_table_back_without_timing(
    timed: Bundle, dsc: Callable[..., Any], change: Callable[..., None]
) -> None:
    found = []
    for power_mode, reused in (("15W", 0), ("25W", 0), ("15W", 2)):
        change(power_mode=power_mode)
        done = dsc("bench", timed.path, "--side", "device", "--stale", *OPTIONS)
        assert f"{reused} of them reused" in done.stdout, done.stderr
        found.append(Bundle.open(timed.path).table().device.fingerprint)

    assert found[0] == found[2] != found[1]


def test_stale_without_a_table_says_how_to_make_one(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    assert "say which one is to be timed" in dsc("bench", bundle.path, "--stale").stderr
    done = dsc("bench", bundle.path, "--side", "both", "--stale")

    assert done.exit_code == 2
    assert "has no table.json" in done.stderr


def test_a_part_is_timed_on_its_own_side_alone(timed: Bundle, dsc: Callable[..., Any], quick: BenchSettings) -> None:
    with timed.edit() as draft:
        draft.change(side="device")
    shutil.rmtree(timed.path / "cells")
    before = Bundle.open(timed.path).table()

    done = dsc("bench", timed.path, "--batches", "2", *OPTIONS, "--json")

    assert done.exit_code == 0, done.stderr
    assert list(json.loads(done.stdout).get("targets")) == ["device"]
    after = Bundle.open(timed.path).table()
    assert [row.tail_ms for row in after.batches[0].rows] == [row.tail_ms for row in before.batches[0].rows]
    with pytest.raises(UsageError, match="is the device's part of a bundle: it has not what the server runs"):
        bench_bundle(timed, sides=["server"], settings=quick)


def test_a_table_is_of_the_target_the_id_or_the_fingerprint_that_is_asked_for(
    timed: Bundle, dsc: Callable[..., Any], change: Callable[..., None]
) -> None:
    first = Bundle.open(timed.path).table().device.fingerprint
    change(power_mode="15W")
    dsc("bench", timed.path, "--side", "device", "--batches", "2", *OPTIONS)
    second = Bundle.open(timed.path).table().device.fingerprint
    target_id = Bundle.open(timed.path).manifest.targets.device[0].id

    def device_of(asked: str) -> str:
        done = dsc("table", timed.path, "--device", asked, "--json")
        assert done.exit_code == 0, done.stderr
        fingerprint: str = json.loads(done.stdout)["device"]["fingerprint"]
        return fingerprint

    assert device_of(first[:6]) == first
    assert device_of(second) == second
    assert device_of(target_id) == device_of(f"{ONE},slowdown=6") == second
    wrong = dsc("table", timed.path, "--device", "0123456789abcdef")
    assert wrong.exit_code == 2
    assert first[:12] in wrong.stderr
    assert second[:12] in wrong.stderr


def test_timing_a_sealed_bundle_opens_it(timed: Bundle, quick: BenchSettings) -> None:
    files = dict(timed.manifest.files)
    for path in [*timed.path.glob("cells/*.json"), *timed.path.glob("tables/*.json"), timed.path / "table.json"]:
        name = path.relative_to(timed.path).as_posix()
        role = "cell" if "cells" in name else "table"
        files[name] = FileEntry(sha256=sha256_file(path), size_bytes=path.stat().st_size, role=role)
    manifest = replace(timed.manifest, sealed=True, files=files)
    (timed.path / "manifest.json").write_bytes(encode_manifest(manifest))
    (timed.path / ENVELOPE).write_text("{}")
    sealed = Bundle.open(timed.path)

    bench_bundle(sealed, batches=[2], settings=quick)
    assert Bundle.open(timed.path).manifest.sealed is True
    assert (timed.path / ENVELOPE).exists()
    (cell, *_) = CellStore(sealed).all()
    Path(timed.path / CellStore.name(cell.question)).write_text("{}")
    assert cell.question not in {item.question for item in CellStore(sealed).all()}
    bench_bundle(sealed, batches=[2], settings=quick)

    assert Bundle.open(timed.path).manifest.sealed is False
    assert not (timed.path / ENVELOPE).exists()


def test_where_engines_cannot_run_the_onnx_pair_is_timed_if_that_is_wished(
    bundle: Bundle, dsc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'dsc-split[rtx]'")
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(tmp_path / "cache"))
    assert dsc("build", bundle.path, "--side", "device", "--target", "tensorrt-rtx:sm75").exit_code == 0
    options = ["--side", "device", "--batches", "2", *OPTIONS]

    refused = dsc("bench", bundle.path, *options)
    done = dsc("bench", bundle.path, *options, "--fallback", "--json")

    assert refused.exit_code in (5, 6)
    assert done.exit_code == 0, done.stderr
    (target,) = json.loads(done.stdout).get("targets").values()
    assert target.startswith("onnxruntime:")
    assert Bundle.open(bundle.path).targets("device")[-1] == target
