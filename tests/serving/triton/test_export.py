"""The model repository that ``export_triton`` writes, with ONNX graphs."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from msgspec.structs import replace
from onnx import helper, numpy_helper
from tests.support.full_bundles import list_file
from tests.support.manifests import stated

from dsc_split._support.hashing import sha256_file
from dsc_split.bundle import Bundle
from dsc_split.bundles._records import WeightsEntry
from dsc_split.errors import BundleError, DscError, SignatureError, UsageError
from dsc_split.serving import export_triton, triton_model_name
from dsc_split.serving.triton._onnx import copy_pieces, detach_graph

Make = Callable[[str], Bundle]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def weights_of(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def replace_tail(bundle: Bundle, *nodes: onnx.NodeProto) -> Bundle:
    """Put nodes into the tail of the network of the batch on axis 1."""
    (split,) = bundle.splits
    path = bundle.file(split.tail)
    proto = onnx.load(path)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    path.write_bytes(proto.SerializeToString())
    list_file(bundle, split.tail, path.read_bytes(), "tail")
    return with_own_id(bundle)


def with_own_id(bundle: Bundle, **changes: object) -> Bundle:
    """Change fields of a bundle's manifest, and give it the pair_id that it then has."""
    bundle.manifest = replace(bundle.manifest, **changes)
    bundle.manifest = replace(bundle.manifest, pair_id=bundle.compute_pair_id())
    return bundle


def test_repository_has_a_model_for_each_choice_that_the_server_takes_part_in(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")

    result = export_triton(bundle, tmp_path / "models")

    digits = bundle.manifest.pair_id.removeprefix("sha256:")[:12]
    names = [
        f"two-branches-{digits}-full",
        f"two-branches-{digits}-scale_a-2-tail",
        f"two-branches-{digits}-scale_left______0_right-tail",
    ]
    assert [model.name for model in result.models] == names
    assert {path.parts[0] for path in map(Path, files_of(tmp_path / "models"))} == {
        *names,
        f"two-branches-{digits}.json",
    }
    assert [model.choice for model in result.models] == ["full-offload", *(split.name for split in bundle.splits)]
    assert [triton_model_name(bundle, model.choice) for model in result.models] == names
    assert not list(tmp_path.glob(".*"))


def test_models_read_their_own_copy_of_the_weights_and_no_others(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")

    result = export_triton(bundle, tmp_path / "models")

    whole = weights_of(bundle.model_path)
    sizes = []
    for model in result.models:
        path = tmp_path / "models" / model.name / "1" / "model.onnx"
        found = weights_of(path)
        assert found
        for name, value in found.items():
            np.testing.assert_array_equal(value, whole[name])
        data = path.with_name("weights.data")
        assert data.stat().st_nlink == 1
        assert data.stat().st_size - sum(value.nbytes for value in found.values() if value.nbytes >= 1024) < 64 * len(
            found
        )
        sizes.append(data.stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]


def test_models_run_from_where_they_are_as_the_bundles_graphs_do(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")
    result = export_triton(bundle, tmp_path / "models")
    values = np.random.default_rng(0)
    graphs = [bundle.model_path, *(bundle.file(split.tail) for split in bundle.splits)]

    for model, graph in zip(result.models, graphs, strict=True):
        ours = onnxruntime.InferenceSession(tmp_path / "models" / model.name / "1" / "model.onnx")
        theirs = onnxruntime.InferenceSession(graph)
        feeds = {
            item.name: values.standard_normal([4, *item.shape[1:]], dtype=np.float32) for item in ours.get_inputs()
        }
        for found, expected in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_list_of_models_says_what_a_client_has_to_know(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")
    (bundle.path / "table.json").write_bytes(b"{}")

    result = export_triton(bundle, tmp_path / "models")

    document = json.loads(result.index.read_text())
    assert document["pair_id"] == bundle.manifest.pair_id
    assert document["table_sha256"] == hashlib.sha256(b"{}").hexdigest()
    tail = document["models"][1]
    assert tail["choice"] == "scale+a-2"
    assert tail["inputs"] == [
        {"name": "scale", "datatype": "FP32", "shape": ["batch", 1]},
        {"name": "a", "datatype": "FP32", "shape": ["batch", 16, 16, 16]},
    ]
    assert [item["name"] for item in tail["outputs"]] == ["final", "label"]
    assert tail["passthrough"] == ["scale"]
    assert tail["early_outputs"] == ["early"]
    for path, digest in tail["files"].items():
        assert sha256_file(tmp_path / "models" / tail["name"] / path) == digest
        config = (tmp_path / "models" / tail["name"] / "config.pbtxt").read_text()
        assert f'  key: "dsc_split_sha256:{path}"\n  value {{ string_value: "{digest}" }}' in config


def test_two_exports_stand_side_by_side_and_the_same_one_is_replaced(make: Make, tmp_path: Path) -> None:
    models = tmp_path / "models"
    old = export_triton(make("branches"), models)
    before = files_of(models)
    new = export_triton(make("new-branches"), models)

    assert {model.name for model in old.models}.isdisjoint(model.name for model in new.models)
    assert {path: data for path, data in files_of(models).items() if path in before} == before

    export_triton(Bundle.open(tmp_path / "branches"), models, max_batch=4)
    after = files_of(models)
    changed = {path for path, data in before.items() if after[path] != data}
    assert changed == {f"{model.name}/config.pbtxt" for model in old.models} | {old.index.name}


def test_model_that_is_no_longer_asked_for_goes(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")
    export_triton(bundle, tmp_path / "models")
    other = tmp_path / "models" / f"{triton_model_name(bundle, 'full-offload')}-of-somebody"
    other.mkdir()
    bundle.manifest = replace(bundle.manifest, full_offload=False)

    result = export_triton(bundle, tmp_path / "models")

    assert [model.choice for model in result.models] == [split.name for split in bundle.splits]
    assert not (tmp_path / "models" / triton_model_name(bundle, "full-offload")).exists()
    assert other.is_dir()


def test_folder_of_the_same_name_that_is_not_ours_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")
    theirs = tmp_path / "models" / triton_model_name(bundle, "a")
    theirs.mkdir(parents=True)
    (theirs / "config.pbtxt").write_text('name: "theirs"')

    with pytest.raises(UsageError, match=re.escape(repr(str(theirs)))):
        export_triton(bundle, tmp_path / "models")

    assert files_of(tmp_path / "models") == {f"{theirs.name}/config.pbtxt": b'name: "theirs"'}


def test_shapes_are_taken_as_they_are_where_the_batch_is_on_another_axis(make: Make, tmp_path: Path) -> None:
    result = export_triton(make("sequence"), tmp_path / "models")

    assert [model.max_batch for model in result.models] == [0, 0]
    config = (tmp_path / "models" / result.models[1].name / "config.pbtxt").read_text()
    assert "max_batch_size: 0" in config
    assert "dims: [ 5, -1, 3 ]" in config


@pytest.mark.parametrize("damaged", ["onnx/weights.data", "onnx/model.onnx"])
def test_damaged_file_leaves_the_repository_as_it_was(make: Make, tmp_path: Path, damaged: str) -> None:
    bundle = make("branches")
    export_triton(bundle, tmp_path / "models")
    before = files_of(tmp_path / "models")
    path = bundle.path / damaged
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(BundleError, match=damaged):
        export_triton(bundle, tmp_path / "models", max_batch=4)

    assert files_of(tmp_path / "models") == before
    assert not list(tmp_path.glob(".*"))


def test_weights_that_overlap_stay_together(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")
    relative = bundle.manifest.model.path
    proto = onnx.load(bundle.model_path, load_external_data=False)
    first = next(tensor for tensor in proto.graph.initializer if tensor.name == "w4")
    entries = {entry.key: entry.value for entry in first.external_data}
    second = proto.graph.initializer.add()
    second.CopyFrom(first)
    second.name, second.dims[0] = "part", 2
    for entry in second.external_data:
        entry.value = {"offset": str(int(entries["offset"]) + 128), "length": "256"}.get(entry.key, entry.value)
    bundle.model_path.write_bytes(proto.SerializeToString())
    list_file(bundle, relative, bundle.model_path.read_bytes(), "model")

    names = ([info.name for info in tensors] for tensors in (bundle.inputs, bundle.outputs))
    lone = detach_graph(bundle, relative, *names)
    (tmp_path / "model.onnx").write_bytes(lone.data)
    copy_pieces(bundle, {tmp_path / lone.weights_name: lone.pieces})

    weights = weights_of(tmp_path / "model.onnx")
    np.testing.assert_array_equal(weights["part"], weights["w4"][1:3])


def test_weights_never_take_the_place_of_a_graph(make: Make, tmp_path: Path) -> None:
    bundle = make("branches")
    expected = export_triton(bundle, tmp_path / "models")
    manifest = bundle.manifest
    weights = stated(manifest.model.weights.path)
    graphs, files = manifest.graphs, dict(manifest.files)
    moved = dict(zip(graphs, [f"onnx/{index}.onnx" for index in range(len(graphs))], strict=True))
    moved[weights] = "onnx/model.onnx"
    for old, new in moved.items():
        data = bundle.file(old).read_bytes()
        if old in graphs:
            proto = onnx.ModelProto.FromString(data)
            for tensor in proto.graph.initializer:
                for entry in tensor.external_data:
                    entry.value = "model.onnx" if entry.key == "location" else entry.value
            data = proto.SerializeToString(deterministic=True)
        bundle.file(new).write_bytes(data)
        files[new] = replace(files.pop(old), sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    whole = replace(manifest.model, path=moved[manifest.model.path], weights=WeightsEntry(path=moved[weights]))
    splits = tuple(replace(split, head=moved[split.head], tail=moved[split.tail]) for split in manifest.splits)
    with_own_id(bundle, files=files, model=whole, splits=splits)

    result = export_triton(bundle, tmp_path / "others")

    assert [model.files for model in result.models] == [model.files for model in expected.models]
    for model in result.models:
        for path, digest in model.files.items():
            assert sha256_file(tmp_path / "others" / model.name / path) == digest


@pytest.mark.parametrize("said", ["/../../evil_", "that of another export"])
def test_pair_id_that_the_graphs_do_not_have_is_refused(make: Make, tmp_path: Path, said: str) -> None:
    export_triton(make("branches"), tmp_path / "out" / "models")
    before = files_of(tmp_path / "out")
    bundle = make("new-branches")
    if said.startswith("that"):
        said = Bundle.open(tmp_path / "branches").manifest.pair_id
    bundle.manifest = replace(bundle.manifest, pair_id=said)

    with pytest.raises(BundleError, match=re.escape(repr(said))):
        export_triton(bundle, tmp_path / "out" / "models")

    assert files_of(tmp_path / "out") == before
    assert "/" not in triton_model_name(bundle, "full-offload")


def change_crossing(bundle: Bundle, **changes: str) -> None:
    """Change what the manifest says of the tensor that crosses the only cut."""
    (split,) = bundle.splits
    (tensor,) = split.tensors
    changed = replace(split, tensors=(replace(tensor, **changes),))
    bundle.manifest = replace(bundle.manifest, splits=(changed,))


def test_graph_with_another_border_than_the_manifest_says_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")
    change_crossing(bundle, name="b")

    with pytest.raises(BundleError, match=r"inputs \['a'\].*\['b'\]"):
        export_triton(bundle, tmp_path / "models")


def test_graph_with_a_compiled_engine_is_exported_only_when_trusted(make: Make, tmp_path: Path) -> None:
    context = helper.make_node(
        "EPContext", ["a"], ["y"], domain="com.microsoft", embed_mode=1, ep_cache_context=b"engine"
    )
    bundle = replace_tail(make("sequence"), context)

    assert len(export_triton(bundle, tmp_path / "models").models) == 2

    bundle.trusted = False
    with pytest.raises(SignatureError, match="EPContext"):
        export_triton(bundle, tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_choice_with_a_tensor_that_triton_does_not_carry_is_left_out(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")
    change_crossing(bundle, dtype="float8e5m2")

    result = export_triton(bundle, tmp_path / "models")

    assert [model.choice for model in result.models] == ["full-offload"]
    assert "float8e5m2" in result.left_out["a"]


def test_bundle_without_anything_to_serve_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = with_own_id(make("sequence"), full_offload=False, splits=())

    with pytest.raises(UsageError, match="nothing to serve"):
        export_triton(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_devices_part_is_refused(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")
    bundle.manifest = replace(bundle.manifest, side="device")

    with pytest.raises(UsageError, match="device's part"):
        export_triton(bundle, tmp_path / "models")


def test_graph_that_a_part_leaves_out_is_named(make: Make, tmp_path: Path) -> None:
    bundle = make("sequence")
    tail = bundle.splits[0].tail
    files = dict(bundle.manifest.files)
    bundle.manifest = replace(bundle.manifest, side="server", left_out={tail: files.pop(tail)}, files=files)

    with pytest.raises(BundleError, match="--with-onnx"):
        export_triton(bundle, tmp_path / "models")


def test_folder_that_is_or_lies_in_a_bundle_is_refused(make: Make) -> None:
    bundle = make("sequence")

    for folder in (bundle.path, bundle.path / "models"):
        with pytest.raises(UsageError, match="bundle"):
            export_triton(bundle, folder)


def test_mount_point_is_refused_with_what_will_do(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: True)

    with pytest.raises(UsageError, match=re.escape(str(tmp_path / "models" / "models"))):
        export_triton(make("sequence"), tmp_path / "models")


def test_full_disk_leaves_the_repository_as_it_was(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make("branches")
    export_triton(bundle, tmp_path / "models")
    before = files_of(tmp_path / "models")

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dsc_split.serving.triton._export.write_bytes", full)
    with pytest.raises(DscError, match="No space left"):
        export_triton(bundle, tmp_path / "models", max_batch=4)

    assert files_of(tmp_path / "models") == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "--max-batch"),
        ({"max_batch": 65}, "--max-batch"),
        ({"instances": 0}, "--instances"),
        ({"max_queue_delay_us": -1}, "--max-queue-delay"),
        ({"backend": "pytorch"}, "pytorch"),
        ({"backend": "onnxruntime", "target": "tensorrt"}, "--target"),
        ({"expect_trt": "10.16.0.72"}, "--expect-trt"),
    ],
)
def test_options_that_do_not_fit_are_refused(make: Make, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_triton(make("sequence"), tmp_path / "models", **options)

    assert not (tmp_path / "models").exists()


def test_names_of_models_are_safe_and_differ(make: Make) -> None:
    bundle = make("branches")
    model = replace(bundle.manifest.model, name="../näme with/blanks")
    splits = [replace(split, name=name) for split, name in zip(bundle.splits, ["a+b", "a_b"], strict=True)]
    bundle.manifest = replace(bundle.manifest, model=model, splits=tuple(splits))

    names = [triton_model_name(bundle, choice) for choice in ("full-offload", "a+b", "a_b")]

    assert len({name.lower() for name in names}) == 3
    assert all(re.fullmatch(r"n_me_with_blanks-[0-9a-f]{12}-[A-Za-z0-9._-]+", name) for name in names)
    with pytest.raises(UsageError, match="'no-offload'"):
        triton_model_name(bundle, "no-offload")
