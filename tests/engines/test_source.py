"""What reaches a library: the bytes that were checked, the bundle's own weights, and nothing that a graph points to."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper
from tests.support.full_bundles import list_file

from dsc_split._support.hashing import sha256_file
from dsc_split.bundle import Bundle
from dsc_split.bundles._onnx_scan import scan_graph
from dsc_split.bundles._records import FileEntry, WeightsEntry
from dsc_split.engines import EngineLike, EngineSource, SideEngines, get_backend
from dsc_split.engines import _source as source_module
from dsc_split.engines._source import GraphReader
from dsc_split.errors import BackendError, BundleError, DamagedError

X = np.random.default_rng(0).standard_normal((2, 3, 8, 8), dtype=np.float32)
SIZE = ["batch", 3, 8, 8]


def external(name: str, location: str, dims: list[int], offset: int = 0) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": str(offset), "length": str(4 * int(np.prod(dims)))}
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def model_of(*nodes: onnx.NodeProto, tensors: list[TensorProto] | None = None, **parts: Any) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None, 8, 8]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], tensors or [])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9, **parts)


def name_weights(bundle: Bundle) -> None:
    """Let the manifest say where the weights are."""
    with bundle.edit() as draft:
        draft.change(model=replace(draft.manifest.model, weights=WeightsEntry(path="onnx/weights.data")))


def move_weights_out(bundle: Bundle) -> Bundle:
    """Store the tiny bundle's weights as exports do: once, in a file beside the graphs."""
    model = onnx.load(bundle.model_path)
    data, places = b"", {}
    for tensor in model.graph.initializer:
        places[tensor.name] = (len(data), list(tensor.dims))
        data += tensor.raw_data
    list_file(bundle, "onnx/weights.data", data, "weights")
    name_weights(bundle)
    for path in ("onnx/model.onnx", "onnx/a.head.onnx", "onnx/a.tail.onnx"):
        graph = onnx.load(bundle.path / path, load_external_data=False)
        tensors = [
            external(item.name, "weights.data", places[item.name][1], places[item.name][0])
            for item in graph.graph.initializer
        ]
        del graph.graph.initializer[:]
        graph.graph.initializer.extend(tensors)
        list_file(bundle, path, graph.SerializeToString(), "graph")
    return Bundle.open(bundle.path)


@pytest.fixture
def stored(bundle: Bundle) -> Bundle:
    """The tiny bundle with weights in a file of their own."""
    return move_weights_out(bundle)


def load(bundle: Bundle, index: int = 0, side: str = "device") -> EngineLike:
    engines = SideEngines(bundle, side, "onnxruntime:cpu")
    return engines.load(engines.graphs[index], 1)


# ---- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("older", [False, True])
def test_weights_in_memory_give_the_very_results_of_weights_in_a_file(
    stored: Bundle, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    import onnxruntime

    expected = get_backend("onnxruntime:cpu").load(stored.model_path).run({"x": X})["y"]
    if older:  # a version that takes no weights from memory
        monkeypatch.delattr(onnxruntime.SessionOptions, "add_external_initializers_from_files_in_memory")

    engine = load(stored)
    shutil.rmtree(stored.path / "onnx")

    np.testing.assert_array_equal(engine.run({"x": X})["y"], expected)


def test_a_back_end_that_takes_paths_alone_gets_private_copies_which_go_away(stored: Bundle) -> None:
    with GraphReader(stored).read("onnx/model.onnx").written() as path:
        assert path.parent.stat().st_mode & 0o777 == 0o700
        for name in ("model.onnx", "weights.data"):
            assert (path.parent / name).read_bytes() == (stored.path / "onnx" / name).read_bytes()
    assert not path.parent.exists()


def test_engines_of_one_process_share_the_weights_which_are_read_once_and_freed_with_the_last(
    stored: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = type(stored.storage).open

    def count(storage: Any, name: str) -> Any:
        opened.append(name)
        return real(storage, name)

    monkeypatch.setattr(type(stored.storage), "open", count)
    head, tail = load(stored, 1), load(Bundle.open(stored.path), 1, "server")
    expected = head.run({"x": X})["a"]

    assert opened.count("onnx/weights.data") == 1
    assert len(source_module._IN_MEMORY) == 1
    (shared,) = source_module._IN_MEMORY.values()
    assert head._session.weights is tail._session.weights is shared  # type: ignore[attr-defined]
    call = head.bind({"x": X})
    head.close()
    tail.close()
    del head, tail, shared
    gc.collect()
    assert len(source_module._IN_MEMORY) == 1  # the bound call computes with them
    np.testing.assert_array_equal(call()[0], expected)  # type: ignore[index]
    del call
    gc.collect()
    assert len(source_module._IN_MEMORY) == 0


@pytest.mark.parametrize("path", ["onnx/weights.data", "onnx/model.onnx"])
def test_no_changed_byte_of_graph_or_weights_reaches_the_library(
    stored: Bundle, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    import onnxruntime

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("a session was made")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    file, dice = stored.path / path, random.Random(5)
    data = file.read_bytes()
    for _ in range(300):
        position, bit = dice.randrange(len(data)), 1 << dice.randrange(8)
        file.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
        with pytest.raises(BundleError, match="changed or damaged"):
            GraphReader(Bundle.open(stored.path)).read("onnx/model.onnx").read_weights()
    for length in (0, 1, len(data) - 1, len(data) + 1):
        file.write_bytes((data + b"x")[:length])
        with pytest.raises(BundleError):
            GraphReader(Bundle.open(stored.path)).read("onnx/model.onnx").read_weights()


def test_a_file_that_is_swapped_after_its_check_changes_nothing(stored: Bundle) -> None:
    engines = SideEngines(stored, "device", "onnxruntime:cpu")
    engine = engines.load(engines.graphs[0], 1)
    expected = engine.run({"x": X})["y"]

    weights = stored.path / "onnx/weights.data"
    weights.write_bytes(bytes(weights.stat().st_size))

    np.testing.assert_array_equal(engine.run({"x": X})["y"], expected)
    np.testing.assert_array_equal(engines.load(engines.graphs[0], 1).run({"x": X})["y"], expected)


def test_weights_with_holes_take_no_memory_for_them(bundle: Bundle) -> None:
    size = 256 * 2**20
    weights = bundle.path / "onnx/weights.data"
    with weights.open("wb") as file:
        file.truncate(size - 4)
        file.seek(0, os.SEEK_END)
        file.write(b"\0\0\x80?")
    tensors = [external("w", "weights.data", [1], size - 4)]
    with bundle.edit() as draft:
        listed = FileEntry(sha256=sha256_file(weights), size_bytes=size, role="weights")
        draft.change(files={**draft.manifest.files, "onnx/weights.data": listed})
    name_weights(bundle)
    list_file(
        bundle,
        "onnx/model.onnx",
        model_of(helper.make_node("Mul", ["x", "w"], ["y"]), tensors=tensors).SerializeToString(),
        "model",
    )
    before = resident_bytes()

    engine = load(bundle)

    np.testing.assert_array_equal(engine.run({"x": X})["y"], X)
    assert resident_bytes() - before < size / 8


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- what a graph points to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    ["other.data", "../weights.data", "/etc/passwd", "./weights.data", "*/_ORT_MEM_ADDR_/*", "weights.data/", ""],
)
def test_a_graph_that_points_to_another_file_is_refused_by_name(stored: Bundle, location: str) -> None:
    tensors = [external("w", location, [1])]
    list_file(
        stored,
        "onnx/model.onnx",
        model_of(helper.make_node("Mul", ["x", "w"], ["y"]), tensors=tensors).SerializeToString(),
        "model",
    )

    with pytest.raises(BundleError, match="is not the bundle's weights") as caught:
        load(stored)
    assert repr(location) in str(caught.value)


def test_weights_beyond_the_end_of_their_file_are_an_error(stored: Bundle) -> None:
    tensors = [external("w", "weights.data", [1], 10**12)]
    list_file(
        stored,
        "onnx/model.onnx",
        model_of(helper.make_node("Mul", ["x", "w"], ["y"]), tensors=tensors).SerializeToString(),
        "model",
    )

    with pytest.raises(BackendError, match="out of"):
        load(stored)


def hidden_in_a_subgraph(node: onnx.NodeProto) -> onnx.ModelProto:
    body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])
    inner = helper.make_graph(
        [helper.make_node("If", ["c"], ["b"], then_branch=body, else_branch=body)],
        "inner",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    return model_of(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))


def in_a_function(node: onnx.NodeProto) -> onnx.ModelProto:
    function = helper.make_function("own", "F", ["x"], ["b"], [node], [helper.make_opsetid("", 18)])
    return model_of(helper.make_node("F", ["x"], ["y"], domain="own"), functions=[function])


PLACES: list[Callable[[onnx.NodeProto], onnx.ModelProto]] = [model_of, hidden_in_a_subgraph, in_a_function]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("domain", ["com.microsoft", "", "elsewhere"])
def test_compiled_engines_in_a_graph_are_found_wherever_they_are(
    place: Callable[[onnx.NodeProto], onnx.ModelProto], domain: str
) -> None:
    inside = helper.make_node("EPContext", ["x"], ["b"], domain=domain, embed_mode=1, ep_cache_context=b"native")
    beside = helper.make_node("EPContext", ["x"], ["b"], domain=domain, embed_mode=0, ep_cache_context="../a.bin")
    silent = helper.make_node("EPContext", ["x"], ["b"], domain=domain)

    for node, files in ((inside, ()), (beside, ("../a.bin",)), (silent, ())):
        facts = scan_graph(place(node).SerializeToString())
        assert facts.has_ep_context
        assert facts.context_files == files


@pytest.mark.parametrize("place", PLACES)
def test_files_are_found_wherever_a_tensor_is(place: Callable[[onnx.NodeProto], onnx.ModelProto]) -> None:
    value = external("v", "elsewhere.data", [1])
    sparse = onnx.SparseTensorProto(values=value, indices=external("i", "indices.data", [1]), dims=[4])

    for attribute, expected in (
        ({"value": value}, ("elsewhere.data",)),
        ({"sparse_value": sparse}, ("elsewhere.data", "indices.data")),
    ):
        model = place(helper.make_node("Constant", [], ["b"], **attribute))
        assert scan_graph(model.SerializeToString()).locations == expected


def test_names_and_texts_are_no_engines() -> None:
    node = helper.make_node("Relu", ["x"], ["EPContext"], name="EPContext location", doc_string="location EPContext")

    facts = scan_graph(model_of(node).SerializeToString())

    assert not facts.has_ep_context
    assert facts.locations == facts.context_files == ()


def test_bytes_that_are_no_graph_are_an_error_of_ours_and_nothing_else() -> None:
    data = hidden_in_a_subgraph(
        helper.make_node("EPContext", ["x"], ["b"], embed_mode=0, ep_cache_context="location")
    ).SerializeToString()
    dice = random.Random(7)
    for _ in range(3000):
        changed = bytearray(data[: dice.randrange(1, len(data) + 1)])
        for _ in range(dice.randrange(4)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        with contextlib.suppress(DamagedError):
            scan_graph(bytes(changed))


def test_a_graph_that_nests_too_deep_is_refused() -> None:
    data = b"\x22\x09EPContext"
    for _ in range(60):
        for tag in (b"\x0a", b"\x32", b"\x2a"):  # a node in a graph, which is a graph's attribute of a node
            data = tag + length(data) + data
    data = b"\x0a" + length(data) + data

    with pytest.raises(DamagedError, match="deep"):
        scan_graph(b"\x3a" + length(data) + data)


def length(data: bytes) -> bytes:
    size, found = len(data), b""
    while size > 127:
        found, size = found + bytes([size & 127 | 128]), size >> 7
    return found + bytes([size])


def test_a_graph_whose_engine_lies_in_another_file_is_refused(bundle: Bundle) -> None:
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="a.bin")
    list_file(bundle, "onnx/model.onnx", model_of(node).SerializeToString(), "model")

    with pytest.raises(BundleError, match=r"names compiled engines in other files \(a\.bin\)"):
        load(bundle)


def test_a_source_without_weights_stands_alone(bundle: Bundle) -> None:
    data = bundle.model_path.read_bytes()
    source = EngineSource(name="model.onnx", data=data, sha256=hashlib.sha256(data).hexdigest())

    with source.written() as path:
        assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]
    assert get_backend("onnxruntime:cpu").load(source).run({"x": X})["y"].shape == (2, 4, 8, 8)
