from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import UNSET
from msgspec.structs import replace
from onnx import helper
from tests.support.manifests import stated

from dsc_split.bundle import Bundle
from dsc_split.engines import BuildOptions, build_engines, check_engines, get_backend
from dsc_split.errors import BundleError, DscError, UsageError

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
    (entry,) = Bundle.open(bundle.path).manifest.targets.device
    assert entry.check == result.finite()
    assert stated(entry.check).rows[0].max_rel_error is None


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


def test_a_manifest_that_says_nothing_of_its_samples_will_do(bundle: Bundle) -> None:
    with bundle.edit() as draft:
        draft.change(samples=UNSET)

    assert [row.passed for row in check_engines(bundle, "device").rows] == [True, True]


def test_damaged_samples_are_refused(bundle: Bundle) -> None:
    (bundle.path / "samples/model.npz").write_bytes(b"PK\x03\x04 no zip")

    with pytest.raises(BundleError, match="cannot be read"):
        check_engines(bundle, "device")


# ---- one side's tensors through the other side's engines -----------------------------------------------------


SHAPES: dict[str, list[int | str]] = {
    name: ["batch", int(size), 8, 8] for name, size in zip("xaey", "3224", strict=True)
}
NODES = {
    "a": helper.make_node("Conv", ["x", "w1"], ["a"], pads=[1, 1, 1, 1]),
    "e": helper.make_node("Relu", ["a"], ["e"]),
    "c": helper.make_node("Conv", ["a", "w2"], ["c"], pads=[1, 1, 1, 1]),
    "p": helper.make_node("Conv", ["x", "w3"], ["p"]),
    "y": helper.make_node("Add", ["c", "p"], ["y"]),
}


def weights(seed: int, *names: str) -> dict[str, np.ndarray]:
    sizes = {"w1": (2, 3, 3, 3), "w2": (4, 2, 3, 3), "w3": (4, 3, 1, 1)}
    values = np.random.default_rng(seed)
    made = {name: values.standard_normal(size, dtype=np.float32) for name, size in sizes.items()}
    return {name: made[name] for name in names}


def entry(name: str) -> dict[str, Any]:
    size = int(np.prod([size for size in SHAPES[name] if isinstance(size, int)]))
    return {"name": name, "dtype": "float32", "shape": SHAPES[name], "elements_by_batch": [size, 0], "itemsize": 4}


def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    with get_backend("onnxruntime:cpu").load(path) as engine:  # type: ignore[attr-defined]
        outputs: dict[str, np.ndarray] = engine.run(inputs)
    return outputs


Replace = Callable[..., Bundle]


def put(bundle: Bundle, replace_graph: Replace, path: str, seed: int = 0) -> Bundle:
    """Put a graph of the branching model into a bundle, with weights of a seed."""
    kinds: dict[str, tuple[str, str, str]] = {
        "onnx/model.onnx": ("aecpy", "x", "ye"),
        "onnx/a.head.onnx": ("ae", "x", "ae"),
        "onnx/a.tail.onnx": ("cpy", "ax", "y"),
    }
    nodes, inputs, outputs = kinds[path]
    ends = ([(name, SHAPES[name]) for name in names] for names in (inputs, outputs))
    used = [name for node in nodes for name in NODES[node].input if name.startswith("w")]
    return replace_graph(bundle, path, [NODES[node] for node in nodes], *ends, **weights(seed, *used))


@pytest.fixture
def branching(make_bundle: Callable[..., Bundle], replace_graph: Replace) -> Bundle:
    """A bundle whose head gives the early output ``e``, and whose tail takes the input ``x`` again."""
    split = {
        "name": "a",
        "tensors": [{**entry("a"), "passthrough": False}, {**entry("x"), "passthrough": True}],
        "head": "onnx/a.head.onnx",
        "tail": "onnx/a.tail.onnx",
        "early_outputs": ["e"],
        "compressive": True,
        "ratio": 1.667,
    }
    bundle = make_bundle(outputs=[entry("y"), entry("e")], splits=[split])
    for path in ("onnx/model.onnx", "onnx/a.head.onnx", "onnx/a.tail.onnx"):
        bundle = put(bundle, replace_graph, path)
    x = np.random.default_rng(1).standard_normal((2, 3, 8, 8), dtype=np.float32)
    whole, head = run(bundle.model_path, x=x), run(bundle.path / "onnx/a.head.onnx", x=x)
    save(bundle.path / "samples/model.npz", {"input:x": x, "output:y": whole["y"], "output:e": whole["e"]})
    save(bundle.path / "samples/a.npz", {"cut:a": head["a"], "early:e": head["e"]})
    return bundle


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    np.savez(path, **arrays)  # type: ignore[arg-type]  # stub flaw


@pytest.fixture
def device_file(branching: Bundle, tmp_path: Path) -> Path:
    """What the heads of the branching bundle give."""
    check_engines(branching, "device", save_tensors=tmp_path / "device.npz")
    return tmp_path / "device.npz"


def test_early_outputs_and_passthrough_tensors_are_checked(branching: Bundle) -> None:
    for side in ("device", "server"):
        assert [row.reason for row in check_engines(branching, side).rows] == ["", ""]


def test_heads_and_tails_of_two_machines_are_proven_together(branching: Bundle, device_file: Path) -> None:
    with np.load(device_file) as saved:
        assert sorted(saved) == ["a/a", "pair_id"]  # the input was the device's to begin with

    result = check_engines(branching, "server", "onnxruntime:cpu,threads=1", against=device_file)

    assert result.passed
    assert result.against == "device.npz"
    assert [row.label for row in result.rows] == ["whole model", "tail a"]


def test_tails_are_fed_with_what_the_heads_gave_and_not_with_the_golden_samples(
    branching: Bundle, replace_graph: Replace, tmp_path: Path
) -> None:
    branching = put(branching, replace_graph, "onnx/a.head.onnx", seed=1)
    device = check_engines(branching, "device", save_tensors=tmp_path / "device.npz")

    server = check_engines(branching, "server", against=tmp_path / "device.npz")

    assert [row.passed for row in device.rows] == [True, False]
    assert [row.passed for row in server.rows] == [True, False]
    assert "'y' is off by" in server.rows[1].reason
    assert check_engines(branching, "server").passed


def test_a_tail_that_computes_something_else_does_not_pass(
    branching: Bundle, device_file: Path, replace_graph: Replace
) -> None:
    branching = put(branching, replace_graph, "onnx/a.tail.onnx", seed=1)

    for against in (None, device_file):
        result = check_engines(branching, "server", against=against)
        assert [row.passed for row in result.rows] == [True, False]
        assert "'y' is off by" in result.rows[1].reason


def test_an_early_output_that_is_wrong_does_not_pass(branching: Bundle) -> None:
    with np.load(branching.path / "samples/a.npz") as saved:
        save(branching.path / "samples/a.npz", {"cut:a": saved["cut:a"], "early:e": saved["early:e"] + 1})

    (_, head) = check_engines(branching, "device").rows

    assert "'e' is off by" in head.reason


def test_tensors_of_other_pairs_are_refused_with_the_command_that_writes_them(
    branching: Bundle, device_file: Path
) -> None:
    branching.manifest = replace(branching.manifest, pair_id="sha256:" + 64 * "1")

    with pytest.raises(BundleError, match=r"from pairs sha256:0+; this bundle has sha256:1+\. .*--save-tensors FILE"):
        check_engines(branching, "server", against=device_file)


def test_a_tensor_that_the_file_lacks_is_a_row_that_does_not_pass(branching: Bundle, device_file: Path) -> None:
    with np.load(device_file) as saved:
        save(device_file, {"pair_id": saved["pair_id"]})

    whole, tail = check_engines(branching, "server", against=device_file).rows

    assert whole.passed
    assert tail.max_rel_error is None
    assert tail.reason == "the file to check against has no tensor 'a' of 'a'."


@pytest.mark.parametrize("crossing", [np.ones((2, 2, 8, 8)), np.ones(3, np.float32), np.ones((2, 5, 8, 8), np.float32)])
def test_a_tensor_that_does_not_fit_is_a_row_that_does_not_pass(
    branching: Bundle, device_file: Path, crossing: np.ndarray
) -> None:
    with np.load(device_file) as saved:
        save(device_file, {"pair_id": saved["pair_id"], "a/a": crossing})

    (_, tail) = check_engines(branching, "server", against=device_file).rows

    assert not tail.passed
    assert "a" in tail.reason


def test_tensors_are_saved_on_the_device_and_used_on_the_server(branching: Bundle, device_file: Path) -> None:
    with pytest.raises(UsageError, match=r"holds what heads gave: feed it to the tails, with --side server"):
        check_engines(branching, "device", against=device_file)
    other = device_file.with_name("other.npz")
    for side, against in (("server", None), ("device", device_file)):
        with pytest.raises(UsageError, match="--side device, and no --against"):
            check_engines(branching, side, against=against, save_tensors=other)
    assert not other.exists()


def test_tensors_that_cannot_be_written_are_an_error(branching: Bundle, tmp_path: Path) -> None:
    with pytest.raises(DscError, match=r"gone/device\.npz"):
        check_engines(branching, "device", save_tensors=tmp_path / "gone/device.npz")


# ---- what is noted -------------------------------------------------------------------------------------------


def test_errors_are_noted_beside_their_target(bundle: Bundle) -> None:
    build_engines(bundle, "device", "onnxruntime:cpu,threads=1")
    build_engines(bundle, "device", "onnxruntime:cpu")

    result = check_engines(bundle, "device", "onnxruntime:cpu,threads=1")

    first, last = Bundle.open(bundle.path).manifest.targets.device
    assert first.check == result
    assert (result.rows[1].max_rel_error or 0.0) <= 1e-5
    assert last.check is UNSET
    assert last.target == "onnxruntime:cpu"


def test_a_target_that_was_not_recorded_is_noted_and_the_last_one_stays_last(bundle: Bundle) -> None:
    build_engines(bundle, "device", "onnxruntime:cpu,threads=1")

    check_engines(bundle, "device", "onnxruntime:cpu")
    check_engines(bundle, "device", "onnxruntime:cpu")

    opened = Bundle.open(bundle.path)
    assert opened.targets("device") == ("onnxruntime:cpu", "onnxruntime:cpu,threads=1")
    assert stated(opened.manifest.targets.device[0].check).passed
    assert check_engines(bundle, "device").target == "onnxruntime:cpu,threads=1"


def test_a_bundle_that_another_command_writes_is_checked_all_the_same(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    with Bundle.open(bundle.path).lock():
        assert check_engines(bundle, "device").passed

    assert "the errors are not noted in the manifest: bundle" in caplog.text
    assert "is being written by another dsc-split" in caplog.text
    assert Bundle.open(bundle.path).targets("device") == ()


def test_a_bundle_that_cannot_be_written_is_checked_all_the_same(bundle: Bundle, dsc: Callable[..., Any]) -> None:
    (bundle.path / ".lock").mkdir()  # nobody can lock this, not even root

    outcome = dsc("check", bundle.path, "--side", "device")

    assert outcome.exit_code == 0, outcome.stderr
    assert "whole model: passed" in outcome.stdout
    assert "warning: the errors are not noted in the manifest" in outcome.stderr
    assert "cannot be locked for writing" in outcome.stderr


# ---- the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_one_document(branching: Bundle, dsc: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "device.npz"
    device = dsc("check", branching.path, "--side", "device", "--save-tensors", file, "--json")
    server = dsc("check", branching.path, "--side", "server", "--against", file, "--json")

    assert (device.exit_code, server.exit_code) == (0, 0), device.stderr + server.stderr
    assert json.loads(device.stdout)["against"] == "golden samples"
    document = json.loads(server.stdout)
    assert document["against"] == "device.npz"
    assert document["passed"]
    assert [row["graph"] for row in document["rows"]] == ["onnx/model.onnx", "onnx/a.tail.onnx"]


def test_the_command_fails_where_an_engine_does_not_pass(
    branching: Bundle, replace_graph: Replace, dsc: Callable[..., Any]
) -> None:
    branching = put(branching, replace_graph, "onnx/a.tail.onnx", seed=1)

    plain = dsc("check", branching.path, "--side", "server")
    document = dsc("check", branching.path, "--side", "server", "--json")

    assert plain.exit_code == document.exit_code == 4
    assert "whole model: passed" in plain.stdout
    assert "tail a: 'y' is off by" in plain.stdout
    assert "1 of 2 engines did not pass; see above" in plain.stderr
    assert [row["passed"] for row in json.loads(document.stdout)["rows"]] == [True, False]


def test_a_side_on_which_nothing_runs_is_said_to_be_empty(
    make_bundle: Callable[..., Bundle], dsc: Callable[..., Any]
) -> None:
    bundle = make_bundle(full_offload=False, splits=[])

    outcome = dsc("check", bundle.path, "--side", "server")

    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert "server: no graph of this bundle runs there, so nothing was checked." in outcome.stderr


def test_engines_that_are_not_there_are_an_error_at_once(
    bundle: Bundle, dsc: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed: pip install 'dsc-split[rtx]'")
    monkeypatch.setenv("DSC_SPLIT_CACHE", str(tmp_path / "cache"))
    build_engines(bundle, "device", "tensorrt-rtx:sm89", BuildOptions(batches=(1, 2)))
    bundle = Bundle.open(bundle.path)
    (entry,) = bundle.manifest.targets.device
    command = f"dsc-split build {bundle.path} --side device --target tensorrt-rtx:sm89 --batches 1,2"

    bundle.file(entry.built[1].path).unlink()
    gone = dsc("check", bundle.path, "--side", "device")
    with bundle.edit() as draft:
        draft.set_targets("device", [replace(entry, engines=())])
    cut_anew = dsc("check", bundle.path, "--side", "device")

    assert (gone.exit_code, gone.stdout, cut_anew.exit_code, cut_anew.stdout) == (6, "", 2, "")
    assert "/a.head.plan', which its manifest lists" in gone.stderr
    assert "has no engines for target 'tensorrt-rtx:sm89'" in cut_anew.stderr
    assert command in gone.stderr
    assert command in cut_anew.stderr


@pytest.mark.parametrize("target", [None, "onnxruntime:cpu"])
def test_an_unknown_side_is_refused(bundle: Bundle, dsc: Callable[..., Any], target: str | None) -> None:
    outcome = dsc("check", bundle.path, "--side", "both", *(("--target", target) if target else ()))

    assert outcome.exit_code == 2
    assert "side is 'both'; 'device' or 'server' was expected" in outcome.stderr
