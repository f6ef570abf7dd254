from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace
from onnx import helper

from dsc_split.bundle import Bundle
from dsc_split.bundles._records import FileEntry, WeightsEntry
from dsc_split.engines import build_engines
from dsc_split.errors import BundleBusyError, BundleError, UsageError

SHAPE = ["batch", 3, 8, 8]


def test_every_graph_of_the_side_is_loaded_and_the_target_recorded(bundle: Bundle) -> None:
    result = build_engines(bundle, "server", "onnxruntime")

    assert [row.graph for row in result.rows] == ["onnx/model.onnx", "onnx/a.tail.onnx"]
    assert not result.failed
    (recorded,) = Bundle.open(bundle.path).manifest.targets.server
    assert recorded.target == "onnxruntime:cpu"
    assert recorded.id == result.id
    assert recorded.library == "onnxruntime"


def test_full_offload_that_is_excluded_leaves_the_server_without_the_whole_model(
    make_bundle: Callable[..., Bundle],
) -> None:
    result = build_engines(make_bundle(full_offload=False), "server", "onnxruntime")

    assert [row.graph for row in result.rows] == ["onnx/a.tail.onnx"]


def test_a_target_that_is_recorded_again_moves_to_the_end(bundle: Bundle) -> None:
    for target in ("onnxruntime:cpu,threads=1", "onnxruntime", "onnxruntime,threads=1"):
        build_engines(bundle, "device", target)

    assert Bundle.open(bundle.path).targets("device") == ("onnxruntime:cpu", "onnxruntime:cpu,threads=1")


def test_a_graph_that_fails_is_a_row_with_its_reason(bundle: Bundle, replace_graph: Callable[..., Bundle]) -> None:
    node = helper.make_node("Mystery", ["x"], ["a"], domain="org.example")
    bundle = replace_graph(bundle, "onnx/a.head.onnx", [node], [("x", SHAPE)], [("a", SHAPE)])

    result = build_engines(bundle, "device", "onnxruntime")

    assert [bool(row.reason) for row in result.rows] == [False, True]
    assert "org.example:Mystery" in result.failed[0].reason
    assert Bundle.open(bundle.path).targets("device") == ("onnxruntime:cpu",)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "was changed or damaged"),
        (lambda path: path.unlink(), "lacks 'onnx/a.head.onnx'"),
    ],
)
def test_a_graph_that_was_changed_or_lost_is_refused(bundle: Bundle, damage: Callable[[Any], None], words: str) -> None:
    damage(bundle.path / "onnx/a.head.onnx")

    with pytest.raises(BundleError, match=words):
        build_engines(bundle, "device", "onnxruntime")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"12345678", None), (b"1234567", "has 7 bytes; the manifest says 8"), (None, "is missing; the manifest says 8")],
)
def test_weights_that_were_cut_short_or_lost_are_refused(
    bundle: Bundle, content: bytes | None, words: str | None
) -> None:
    with bundle.edit() as draft:
        listed = FileEntry(sha256=64 * "0", size_bytes=8, role="weights")
        model = replace(draft.manifest.model, weights=WeightsEntry(path="onnx/weights.data"))
        draft.change(model=model, files={**draft.manifest.files, "onnx/weights.data": listed})
    if content is not None:
        (bundle.path / "onnx/weights.data").write_bytes(content)

    if words is None:
        assert build_engines(bundle, "device", "onnxruntime").failed == ()
    else:
        with pytest.raises(BundleError, match=words):
            build_engines(bundle, "device", "onnxruntime")


def test_unknown_side_and_busy_bundle_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="side is 'cloud'"):
        build_engines(bundle, "cloud", "onnxruntime")
    with bundle.lock(), pytest.raises(BundleBusyError):
        build_engines(Bundle.open(bundle.path), "device", "onnxruntime")


def make_part(bundle: Bundle) -> Bundle:
    """Make a device's part of a bundle, without its graphs, as it is when it is unpacked."""
    with bundle.edit() as draft:
        graphs = draft.manifest.files
        draft.change(files={}, side="device", left_out=graphs)
    for path in graphs:
        (bundle.path / path).unlink()
    return Bundle.open(bundle.path)


def test_a_part_of_a_bundle_says_what_it_lacks(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    part = make_part(bundle)

    for side, words, code in (
        ("device", "was left out of it", 6),
        ("server", "is the device's part of a bundle; side 'server' was asked for", 2),
    ):
        done = dsc("build", part.path, "--side", side, "--target", "onnxruntime:cpu")
        assert done.exit_code == code
        assert words in " ".join(done.stderr.split())
