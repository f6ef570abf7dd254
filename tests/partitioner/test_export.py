"""Bundles: what is in them, and what stands after something went wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from msgspec import UNSET

from dsc_split._support.hashing import sha256_file
from dsc_split._support.progress import Progress
from dsc_split.bundle import Bundle
from dsc_split.bundles._lock import lock_folder
from dsc_split.bundles._records import WeightsEntry
from dsc_split.errors import BundleBusyError, BundleError, CutError, DscError, ExportError, UsageError
from dsc_split.partitioner import (
    CutOptions,
    ExportOptions,
    SourceOptions,
    _export,
    cut_bundle,
    export_bundle,
)
from dsc_split.partitioner._load import load_model
from dsc_split.partitioner.cuts._cut import Cutter
from dsc_split.partitioner.proof import _proof

Save = Callable[[str], Path]

# x(64) -Conv= a(128) -MaxPool= b(32) -Relu= c(32) -MaxPool= d(8) -Flatten= e(8) -Neg- y
NET = """<ir_version: 8, opset_import: ["" : 17], producer_name: "test", metadata_props: ["task" : "shapes"]>
net (float[batch, 1, 8, 8] x) => (float[batch, 8] y) <float[2, 1, 1, 1] w = {0.5, -2.0}> {
    a = Conv(x, w)
    b = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
    c = Relu(b)
    d = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)
    e = Flatten(d)
    y = Neg(e)
}"""


def options(cuts: str | None = None, **more: Any) -> ExportOptions:
    return ExportOptions(source=SourceOptions(max_batch=3), cut=CutOptions(cuts=cuts), **more)


def run(path: Path, feed: dict[str, Any]) -> dict[str, Any]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def digests(folder: Path) -> dict[Path, str]:
    """Hash every file of a bundle but the lock, which says nothing."""
    return {path: sha256_file(path) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_bundle_holds_what_the_manifest_lists(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())

    assert [split.name for split in bundle.splits] == ["b", "d"]
    assert bundle.manifest.failed_splits == ()
    listed = bundle.manifest.files
    present = {str(path.relative_to(bundle.path)) for path in bundle.path.rglob("*") if path.is_file()}
    assert present == {*listed, "manifest.json"}
    for path, entry in listed.items():
        assert sha256_file(bundle.path / path) == entry.sha256
        assert (bundle.path / path).stat().st_size == entry.size_bytes
    assert bundle.manifest.model.weights == WeightsEntry(path=None, origin="from the model file")
    assert str(tmp_path) not in (bundle.path / "manifest.json").read_text()


def test_head_then_tail_by_hand_is_the_whole_at_a_batch_that_was_not_proven(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options("all"))
    x = np.random.default_rng(9).standard_normal((7, 1, 8, 8)).astype("f4")
    expected = run(bundle.model_path, {"x": x})["y"]

    assert len(bundle.splits) == 5
    for split in bundle.splits:
        crossing = run(bundle.file(split.head), {"x": x})
        assert sum(value.nbytes for value in crossing.values()) == split.size_bytes(7)
        np.testing.assert_array_equal(run(bundle.file(split.tail), crossing)["y"], expected)


def test_golden_samples_hold_inputs_outputs_and_what_crosses(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())
    whole = np.load(bundle.path / "samples" / "model.npz")
    part = np.load(bundle.path / "samples" / "b.npz")

    assert bundle.manifest.sample_batch == 2
    assert whole["input:x"].shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(run(bundle.model_path, {"x": whole["input:x"]})["y"], whole["output:y"])
    np.testing.assert_array_equal(run(bundle.file("onnx/b.tail.onnx"), {"b": part["cut:b"]})["y"], whole["output:y"])


def test_useful_metadata_is_kept_and_what_leaks_is_not(save: Save, tmp_path: Path) -> None:
    path = save(NET)
    model = onnx.load(str(path))
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/me/secret.py")
    model.graph.node[0].doc_string = "/home/me"
    model.metadata_props.add(key="pkg.torch.export.graph", value="/home/me")
    onnx.save(model, str(path))

    bundle = export_bundle(str(path), tmp_path / "out", options())

    for file in (bundle.path / "onnx").iterdir():
        assert b"/home/me" not in file.read_bytes()
        part = onnx.load(str(file))
        assert part.producer_name == "test"
        assert {"task": "shapes"}.items() <= {item.key: item.value for item in part.metadata_props}.items()


def test_export_twice_gives_the_same_graphs_and_keeps_the_cells(save: Save, tmp_path: Path) -> None:
    first = export_bundle(str(save(NET)), tmp_path / "out", options())
    (first.path / "cells").mkdir()
    (first.path / "cells" / "k.json").write_text("{}")
    (first.path / "table.json").write_text("{}")

    second = export_bundle(str(save(NET)), tmp_path / "out", options("all"))

    assert (second.path / "cells" / "k.json").read_text() == "{}"
    assert not (second.path / "table.json").exists()  # it was of the old pairs
    assert first.manifest.files["onnx/b.head.onnx"] == second.manifest.files["onnx/b.head.onnx"]
    assert first.manifest.pair_id != second.manifest.pair_id
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith((".partial", ".old"))] == []


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_output_that_is_no_bundle_is_not_touched(save: Save, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("years")
    elif kind == "file":
        output.write_text("years")
    else:
        (tmp_path / "elsewhere").mkdir()
        output.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(UsageError, match="not overwritten"):
        export_bundle(str(save(NET)), output, options())

    assert "years" in [(output / "thesis.tex").read_text() if kind == "folder" else "years"]
    assert kind != "file" or output.read_text() == "years"


def test_empty_folder_may_be_the_output(save: Save, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()

    assert export_bundle(str(save(NET)), tmp_path / "out", options()).splits


def test_no_useful_cut_is_no_error(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options(input_bytes=8, cuts="compressive"))

    assert bundle.splits == ()
    assert bundle.input_bytes(3) == 24


def test_stated_input_bytes_or_no_full_offload_make_frontier_the_default(save: Save, tmp_path: Path) -> None:
    stated = export_bundle(str(save(NET)), tmp_path / "a", options(input_bytes=8))
    private = export_bundle(str(save(NET)), tmp_path / "b", options(full_offload=False))

    assert [split.name for split in stated.splits] == [split.name for split in private.splits] == ["a", "b", "d"]
    assert not private.full_offload


def test_cutting_again_replaces_the_pairs_and_removes_the_old_files(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())
    (bundle.path / "table.json").write_text("{}")

    again = cut_bundle(bundle, CutOptions(cuts="a, e"))

    assert [split.name for split in again.splits] == ["a", "e"]
    assert not (bundle.path / "table.json").exists()  # it named pairs that are gone
    assert sorted(path.name for path in (bundle.path / "onnx").iterdir()) == [
        "a.head.onnx", "a.tail.onnx", "e.head.onnx", "e.tail.onnx", "model.onnx",
    ]  # fmt: skip
    assert again.splits[0].max_abs_error == 0


def test_cut_without_proof_says_so(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())

    again = cut_bundle(bundle, CutOptions(cuts="d", prove=False))

    assert again.splits[0].max_abs_error is None
    assert again.splits[0].proof is UNSET
    assert again.manifest.sample_paths == {}


def test_unknown_cut_leaves_the_bundle_as_it_was(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())
    before = digests(bundle.path)

    with pytest.raises(CutError, match="nothing"):
        cut_bundle(bundle, CutOptions(cuts="nothing"))

    assert digests(bundle.path) == before


def test_pair_that_fails_its_proof_is_left_out_and_listed(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "b")

    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())

    assert [split.name for split in bundle.splits] == ["d"]
    assert bundle.manifest.failed_splits[0].name == "b"
    assert "at most 1e-05 is expected of fp32" in bundle.manifest.failed_splits[0].reason
    assert not (bundle.path / "onnx" / "b.head.onnx").exists()


def test_no_pair_that_passes_is_an_error_and_leaves_nothing(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "b", "d")

    with pytest.raises(CutError, match="no pair passed its proof"):
        export_bundle(str(save(NET)), tmp_path / "out", options())

    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def spoil(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make the tail of a pair compute something else."""
    cut = Cutter.cut

    def wrong(self: Any, each: Any) -> Any:
        pair = cut(self, each)
        if each.name in names:
            pair.tail.graph.node[-1].op_type = "Abs"
        return pair

    monkeypatch.setattr(Cutter, "cut", wrong)


def test_uint8_input_puts_the_normalisation_into_the_graph(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options(uint8_input=True, mean=(0.5,), std=(0.25,)))
    image = np.arange(128, dtype=np.uint8).reshape(2, 1, 8, 8)
    plain = export_bundle(str(save(NET)), tmp_path / "plain", options())

    assert bundle.input_bytes(1) == 64
    assert bundle.splits[0].ratio == 8 * 4 / 64
    expected = run(plain.model_path, {"x": ((image / 255 - 0.5) / 0.25).astype("f4")})["y"]
    np.testing.assert_allclose(run(bundle.model_path, {"x": image})["y"], expected, rtol=1e-5, atol=1e-5)


def test_uint8_input_without_known_mean_asks_for_it(save: Save, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--mean"):
        export_bundle(str(save(NET)), tmp_path / "out", options(uint8_input=True))


def test_graph_that_disagrees_with_pytorch_is_refused(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(
        _export,
        "load_model",
        lambda *args, **kw: replace(
            load_model(*args, **kw), reference=lambda feed: [np.zeros((len(feed["x"]), 8), "f4") + 1]
        ),
    )

    with pytest.raises(ExportError, match="does not compute what the model computes: output 'y'"):
        export_bundle(str(save(NET)), tmp_path / "out", options())


def test_two_writers_at_once_are_kept_apart(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())

    with (
        lock_folder(bundle.path),
        pytest.raises(BundleBusyError, match=f"process {os.getpid()}"),
    ):
        cut_bundle(bundle, CutOptions(cuts="a"))
    with lock_folder(bundle.path), pytest.raises(BundleBusyError):
        export_bundle(str(save(NET)), bundle.path, options())

    assert [split.name for split in Bundle.open(bundle.path).splits] == ["b", "d"]


@pytest.mark.parametrize("stage", ["export", "prove", "cut"])
def test_interruption_leaves_nothing_half_written(save: Save, tmp_path: Path, stage: str) -> None:
    def interrupt(step: Progress) -> None:
        if step.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(str(save(NET)), tmp_path / "out", options(), progress=interrupt)

    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


FULL_DISK = """
import resource, signal, sys
from dsc_split.errors import DscError
from dsc_split.partitioner import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    export_bundle(sys.argv[1], sys.argv[2], ExportOptions(source=SourceOptions(max_batch=3)))
except DscError as e:
    print(e); sys.exit(e.exit_code)
"""


@pytest.mark.parametrize("room_bytes", [10, 700, 2500])
def test_file_that_cannot_be_written_leaves_the_old_bundle(save: Save, tmp_path: Path, room_bytes: int) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())
    before = digests(bundle.path)

    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(save(NET)), str(tmp_path / "out"), str(room_bytes)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert process.returncode == 1, process.stderr
    assert "cannot write" in process.stdout
    assert digests(bundle.path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.onnx", "out"]


def test_damaged_model_in_a_bundle_is_refused(save: Save, tmp_path: Path) -> None:
    bundle = export_bundle(str(save(NET)), tmp_path / "out", options())
    data = bytearray(bundle.model_path.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.model_path.write_bytes(data)

    with pytest.raises(BundleError, match="SHA-256 differs"):
        cut_bundle(bundle, CutOptions(prove=False))


def test_largest_batch_is_lowered_when_memory_ends(save: Save, tmp_path: Path) -> None:
    # One activation has 16 MiB per sample.
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 4] x) => (float[batch, 4] y) <int64[3] shape = {1, 1048576, 1}, int64[3] back = {0, 1, 4}> {
        r = Reshape(x, back)
        a = Expand(r, shape)
        y = ReduceMax<axes = [1], keepdims = 0>(a)
    }"""
    bundle = export_bundle(str(save(text)), tmp_path / "out", options("all"))

    largest, reason = _proof.largest_batch(bundle.model_path, bundle.inputs, 64, memory_bytes=1000 * 2**20)

    assert 4 <= largest < 64
    assert "ran out of memory" in reason


def test_folder_that_cannot_be_made_is_an_error_of_ours(save: Save, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(DscError, match="cannot make a folder"):
        export_bundle(str(save(NET)), tmp_path / "file" / "out", options())
