from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from dsc_split.bundle import Bundle
from dsc_split.engines import build_engines, check_engines
from dsc_split.errors import BundleError, UsageError

X, A = ("x", ["batch", 3, 8, 8]), ("a", ["batch", 2, 8, 8])


def wrong_head(bundle: Bundle, replace_graph: Callable[..., Bundle]) -> Bundle:
    weights = np.ones((2, 3, 3, 3), np.float32)
    node = helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1])
    return replace_graph(bundle, "onnx/a.head.onnx", [node], [X], [A], w1=weights)


@pytest.mark.parametrize("side", ["device", "server"])
def test_engines_that_compute_what_they_should_pass(bundle: Bundle, side: str) -> None:
    result = check_engines(bundle, side)

    assert result.passed
    assert result.target == "onnxruntime:cpu"
    assert [row.label for row in result.rows] == ["whole model", "head a" if side == "device" else "tail a"]
    assert all(row.max_rel_error is not None and row.max_rel_error <= 1e-5 for row in result.rows)


def test_an_engine_that_computes_something_else_does_not_pass(
    bundle: Bundle, replace_graph: Callable[..., Bundle]
) -> None:
    result = check_engines(wrong_head(bundle, replace_graph), "device")

    assert [row.passed for row in result.rows] == [True, False]
    assert "'a' is off by" in result.rows[1].reason


def test_the_last_recorded_target_is_checked(bundle: Bundle) -> None:
    build_engines(bundle, "device", "onnxruntime:cpu,threads=1")

    assert check_engines(bundle, "device").target == "onnxruntime:cpu,threads=1"
    assert check_engines(bundle, "device", "onnxruntime").target == "onnxruntime:cpu"


@pytest.mark.parametrize("side", ["device", "server"])
def test_against_a_file_the_whole_pair_is_compared(
    bundle: Bundle, replace_graph: Callable[..., Bundle], tmp_path: Path, side: str
) -> None:
    samples = dict(np.load(bundle.path / "samples/model.npz"))
    np.savez(tmp_path / "own.npz", **samples)

    assert check_engines(bundle, side, against=tmp_path / "own.npz").passed
    result = check_engines(wrong_head(bundle, replace_graph), side, against=tmp_path / "own.npz")
    assert [row.passed for row in result.rows] == [True, False]


def test_nan_in_the_outputs_does_not_pass_and_the_result_is_still_json(bundle: Bundle, tmp_path: Path) -> None:
    samples = dict(np.load(bundle.path / "samples/model.npz"))
    samples["output:y"][0, 0, 0, 0] = np.nan
    np.savez(tmp_path / "own.npz", **samples)

    result = check_engines(bundle, "device", against=tmp_path / "own.npz")

    assert not result.passed
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["rows"][0]["max_rel_error"] is None


def test_files_to_compare_with_are_checked_first(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        check_engines(bundle, "device", against=tmp_path / "gone.npz")
    np.savez(tmp_path / "other.npz", **{"input:z": np.ones(1)})  # type: ignore[arg-type]  # stub flaw
    with pytest.raises(BundleError, match="'input:x'"):
        check_engines(bundle, "device", against=tmp_path / "other.npz")
    (tmp_path / "cut.npz").write_bytes((bundle.path / "samples/model.npz").read_bytes()[:200])
    with pytest.raises(BundleError, match="cannot be read"):
        check_engines(bundle, "device", against=tmp_path / "cut.npz")


def test_a_pair_without_samples_does_not_pass_and_says_why(bundle: Bundle) -> None:
    (bundle.path / "samples/a.npz").unlink()

    result = check_engines(bundle, "device")

    assert [row.passed for row in result.rows] == [True, False]
    assert "no golden samples for 'a'" in result.rows[1].reason


def test_damaged_samples_are_refused(bundle: Bundle) -> None:
    (bundle.path / "samples/model.npz").write_bytes(b"PK\x03\x04 no zip")

    with pytest.raises(BundleError, match="cannot be read"):
        check_engines(bundle, "device")
