"""What stands after a command was killed, and what is refused of a bundle that was damaged since."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dsc_split._support.hashing import sha256_file
from dsc_split.bundle import Bundle
from dsc_split.errors import BundleError, CutError, DscError, UsageError
from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, cut_bundle, export_bundle
from dsc_split.partitioner import _recut as _pairs

Save = Callable[[str], Path]

# x -Mul= a -Add(Relu)= c -Neg= d -Exp- y      the weights are large enough to lie in their file
NET = """<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, 512] x) => (float[batch, 512] y) <float[512] w = {WEIGHTS}> {
    a = Mul(x, w)
    b = Relu(a)
    c = Add(a, b)
    d = Neg(c)
    y = Exp(d)
}""".replace("WEIGHTS", ", ".join(["0.5"] * 512))

KILLED = """
import os, signal, sys
from dsc_split.partitioner import *
def kill(step):
    if step.stage == "cut":
        os.kill(os.getpid(), signal.SIGKILL)
export_bundle(sys.argv[1], sys.argv[2], ExportOptions(source=SourceOptions(max_batch=3)), progress=kill)
"""


@pytest.fixture
def bundle(save: Save, tmp_path: Path) -> Bundle:
    return export_bundle(str(save(NET)), tmp_path / "out", options())


def options() -> ExportOptions:
    return ExportOptions(source=SourceOptions(max_batch=3), cut=CutOptions(cuts="all"))


def digests(folder: Path) -> dict[Path, str]:
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_killed_export_leaves_the_old_bundle_and_its_litter_goes_with_the_next(bundle: Bundle, save: Save) -> None:
    before = digests(bundle.path)
    command = [sys.executable, "-c", KILLED, str(save(NET)), str(bundle.path)]

    process = subprocess.run(command, check=False)

    assert process.returncode == -signal.SIGKILL
    assert digests(bundle.path) == before
    assert len(list(bundle.path.parent.glob(".out.*.partial"))) == 1

    export_bundle(str(save(NET)), bundle.path, options())

    assert sorted(path.name for path in bundle.path.parent.iterdir()) == ["net.onnx", "out"]


def test_export_that_is_still_running_is_not_taken_for_litter(bundle: Bundle, save: Save) -> None:
    inner: list[Bundle] = []

    def export_meanwhile(step: object) -> None:
        if not inner and list(bundle.path.parent.glob(".out.*.partial")):
            inner.append(bundle)
            inner.append(export_bundle(str(save(NET)), bundle.path, options()))

    outer = export_bundle(str(save(NET)), bundle.path, options(), progress=export_meanwhile)

    assert len(inner) == 2
    assert digests(outer.path) == digests(bundle.path)


@pytest.mark.parametrize("failing", ["store_bytes", "write_bytes"])
def test_cut_that_fails_half_way_leaves_the_bundle_as_it_was(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    before = digests(bundle.path)
    real = getattr(_pairs, failing)
    calls = []

    def fail(*arguments: object) -> object:
        calls.append(arguments)
        if failing == "write_bytes" or len(calls) == 3:
            raise DscError("cannot write: no space left")
        return real(*arguments)

    monkeypatch.setattr(_pairs, failing, fail)
    with pytest.raises(DscError, match="no space left"):
        cut_bundle(bundle, CutOptions(cuts="all", max_tensors=2, prove=False))

    assert digests(bundle.path) == before


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_damaged_weights_in_a_bundle_are_refused_before_they_are_proven_right(bundle: Bundle, damage: str) -> None:
    weights = bundle.path / "onnx" / "weights.data"
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.unlink()
    if damage != "missing":
        weights.write_bytes(data[:-1] if damage == "short" else data)

    with pytest.raises(BundleError, match=r"weights.data' (cannot be read|is not what the manifest lists)"):
        cut_bundle(bundle)


def test_pattern_that_matches_nothing_does_not_take_the_pairs_away(bundle: Bundle) -> None:
    before = digests(bundle.path)

    with pytest.raises(CutError, match=r"--modules 'block\.\*'"):
        cut_bundle(bundle, CutOptions(modules="block.*"))

    assert digests(bundle.path) == before


def test_name_in_the_wrong_case_is_recognised(bundle: Bundle) -> None:
    with pytest.raises(CutError, match="Did you mean 'd'"):
        cut_bundle(bundle, CutOptions(cuts="D"))


def test_the_current_folder_is_not_replaced(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(NET)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    for name in (".", os.fspath(tmp_path / "empty")):
        with pytest.raises(UsageError, match="current folder"):
            export_bundle(str(source), name, options())


def test_samples_of_strings_are_plain_text(save: Save, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 3]>
    net (float[batch, 2] x) => (string[batch] y) {
        a = Neg(x)
        i = ArgMax<axis = 1, keepdims = 0>(a)
        y = ai.onnx.ml.LabelEncoder<keys_int64s = [0, 1], values_strings = ["cat", "mouse"]>(i)
    }"""

    bundle = export_bundle(str(save(text)), tmp_path / "out", options())

    assert [split.max_abs_error for split in bundle.splits] == [0, 0]
    with np.load(bundle.path / "samples" / "model.npz", allow_pickle=False) as arrays:
        assert set(arrays["output:y"]) <= {"cat", "mouse"}
