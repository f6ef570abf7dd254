"""Exports of small modules; every graph is run against the module it came from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tests.support.paths import DATA, ROOT

from dsc_split.bundle import TensorInfo
from dsc_split.bundles._samples import load_sample, make_inputs
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions
from dsc_split.partitioner.sources._sources import load_source

NETS = str(DATA / "source_nets.py")

Shapes = dict[str, tuple[int | str, ...]]


def load(source: str, *shapes: str, sample: Path | None = None, calibrate: bool = True, seed: int = 0) -> LoadedModel:
    options = SourceOptions(input_shapes=shapes, max_batch=8, sample=sample, calibrate=calibrate, seed=seed)
    return load_source(source, options)


def shapes_of(values: list[ir.Value]) -> Shapes:
    return {
        str(value.name): tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape or ())
        for value in values
    }


def infos(loaded: LoadedModel) -> list[TensorInfo]:
    result = []
    for value in loaded.model.graph.inputs:
        assert value.dtype is not None
        (shape,) = shapes_of([value]).values()
        size = int(np.prod([dim for dim in shape if isinstance(dim, int)]))
        free = any(isinstance(dim, str) for dim in shape)
        result.append(
            TensorInfo(
                name=str(value.name),
                dtype=value.dtype.numpy().name,
                shape=shape,
                elements_by_batch=(size, 0) if free else (0, size),
                itemsize=int(value.dtype.itemsize),
            )
        )
    return result


def assert_agrees(loaded: LoadedModel, *batches: int, sample: Path | None = None) -> None:
    """ONNX Runtime computes what PyTorch computes, to 1e-5 of the largest value."""
    session = onnxruntime.InferenceSession(ir.to_proto(loaded.model).SerializeToString())
    assert loaded.reference is not None
    for batch in batches:
        feeds = make_inputs(infos(loaded), batch, 3, load_sample(sample) if sample else None)
        wanted = loaded.reference(feeds)
        found = session.run(None, feeds)
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
            assert b.any()


@pytest.fixture(scope="module")
def plain() -> LoadedModel:
    return load(f"{NETS}:plain", "3,8,8")


def test_the_batch_is_a_symbol_and_names_are_those_of_forward(plain: LoadedModel) -> None:
    graph = plain.model.graph
    assert shapes_of(list(graph.inputs)) == {"image": ("batch", 3, 8, 8)}
    assert shapes_of(list(graph.outputs)) == {"output": ("batch", 4)}
    assert (plain.batch_symbol, plain.max_batch, plain.notes) == ("batch", 8, ())
    assert plain.name == graph.name == "source_nets_plain"
    assert_agrees(plain, 1, 2, 3, 8)


def test_every_node_knows_its_module_call_and_nothing_else(plain: LoadedModel) -> None:
    paths = [dict(node.metadata_props) for node in plain.model.graph]
    assert all(set(path) == {"dsc_split.module"} for path in paths)
    found = [path["dsc_split.module"] for path in paths]
    assert {"stem.act", "shared.act", "shared@1.act@1", "fc"} <= set(found)
    assert found.index("shared.act") < found.index("shared@1.act@1")
    classes = json.loads(plain.model.metadata_props["dsc_split.module_classes"])
    assert classes["stem.act"] == classes["shared@1.act@1"] == "torch.nn.modules.activation.ReLU"
    assert classes["shared@1"].endswith(".Block")
    assert all(path in classes for path in found)


def test_no_path_of_this_machine_is_in_the_graph(plain: LoadedModel) -> None:
    data = ir.to_proto(plain.model).SerializeToString()
    for folder in (str(ROOT), str(Path(torch.__file__).parent), str(Path.home())):
        assert folder.encode() not in data
    assert b"stack_trace" not in data
    assert b"pkg.torch" not in data


def test_batch_norm_is_recalibrated_and_the_origin_says_so(plain: LoadedModel) -> None:
    assert plain.weights_origin == "as made by plain of source_nets.py (seed 0), BatchNorm statistics recalibrated"
    rough = load(f"{NETS}:plain", "3,8,8", calibrate=False)
    assert rough.weights_origin == "as made by plain of source_nets.py (seed 0)"
    feeds = make_inputs(infos(plain), 2, 0)
    assert plain.reference is not None
    assert rough.reference is not None
    assert not np.allclose(plain.reference(feeds)[0], rough.reference(feeds)[0])


def test_the_seed_decides_the_weights_and_leaves_the_users_generator_alone(plain: LoadedModel) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again, other = load(f"{NETS}:plain", "3,8,8"), load(f"{NETS}:plain", "3,8,8", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    feeds = make_inputs(infos(plain), 2, 0)
    outputs = [model.reference(feeds)[0] for model in (plain, again, other) if model.reference is not None]
    assert np.array_equal(outputs[0], outputs[1])
    assert not np.allclose(outputs[0], outputs[2])


def test_nothing_reaches_the_terminal(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    levels = {name: logging.getLogger(name).level for name in ("torch", "onnxscript", "torch.onnx")}
    with caplog.at_level(logging.DEBUG, logger="dsc_split"):
        load(f"{NETS}:plain", "3,8,8", calibrate=False)
    assert capfd.readouterr() == ("", "")
    assert "the user's own print" in caplog.text
    assert "UserWarning: the user's own warning" in caplog.text
    assert {name: logging.getLogger(name).level for name in levels} == levels


def test_state_has_its_batch_on_the_axis_that_the_module_runs_with() -> None:
    loaded = load(f"{NETS}:recurrent")
    graph = loaded.model.graph
    state = (2, "batch", 6)
    assert shapes_of(list(graph.inputs)) == {"x": ("batch", 5, 4), "state_0": state, "state_1": state}
    assert shapes_of(list(graph.outputs)) == {"last": ("batch", 6), "state_0_out": state, "state_1_out": state}
    assert_agrees(loaded, 1, 3)


def test_the_batch_lies_where_the_user_says() -> None:
    loaded = load(f"{NETS}:scan", "x=5,batch,4")
    assert shapes_of(list(loaded.model.graph.inputs)) == {"x": (5, "batch", 4)}
    assert shapes_of(list(loaded.model.graph.outputs)) == {"output": (5, "batch", 6)}
    assert_agrees(loaded, 1, 3)


def test_keyword_inputs_come_in_the_order_of_forward_and_dataclass_fields_name_outputs() -> None:
    loaded = load(f"{NETS}:encoder")
    graph = loaded.model.graph
    assert [(value.name, value.dtype) for value in graph.inputs] == [
        ("tokens", ir.DataType.INT64),
        ("mask", ir.DataType.BOOL),
    ]
    assert shapes_of(list(graph.outputs)) == {"hidden": ("batch", 6, 8), "pooled": ("batch", 8)}
    assert_agrees(loaded, 1, 3)


def test_a_sample_gives_shapes_types_and_values(tmp_path: Path) -> None:
    path = tmp_path / "sample.npz"
    np.savez(path, tokens=np.arange(14).reshape(2, 7))
    loaded = load(f"{NETS}:encoder_alone", sample=path)
    assert shapes_of(list(loaded.model.graph.inputs)) == {"tokens": ("batch", 7)}
    assert_agrees(loaded, 1, 3, sample=path)


def test_a_batch_that_the_module_fixes_is_fixed_with_the_reason() -> None:
    loaded = load(f"{NETS}:iterates")
    assert shapes_of(list(loaded.model.graph.inputs)) == {"x": (1, 3)}
    assert (loaded.batch_symbol, loaded.max_batch) == (None, 1)
    (note,) = loaded.notes
    assert "The batch is fixed at 1, because" in note
    assert "specialized it to be a constant" in note
    assert_agrees(loaded, 1)


def test_outputs_may_be_inputs_constants_and_twins_and_share_names_with_inputs() -> None:
    loaded = load(f"{NETS}:swaps")
    graph = loaded.model.graph
    assert [value.name for value in graph.inputs] == ["output_0", "y"]
    assert [value.name for value in graph.outputs] == ["output_0_out", "output_1", "output_2", "output_5"]
    assert all(value.producer() is not None for value in graph.outputs)
    assert_agrees(loaded, 1, 3)


def test_an_exported_program_keeps_its_modules_names_and_range(tmp_path: Path) -> None:
    batch = torch.export.Dim("anything", min=1, max=4)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)).eval()
    path = tmp_path / "mlp.pt2"
    torch.export.save(torch.export.export(net, (torch.randn(2, 3),), dynamic_shapes=({0: batch},)), path)
    loaded = load(str(path))
    assert (loaded.name, loaded.weights_origin, loaded.max_batch) == ("mlp", "from the model file", 4)
    assert shapes_of(list(loaded.model.graph.inputs)) == {"input": ("batch", 3)}
    assert [node.metadata_props["dsc_split.module"] for node in loaded.model.graph] == ["0", "1", "2"]
    assert_agrees(loaded, 1, 3)


def test_an_exported_program_of_one_batch_size_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "mlp.pt2"
    torch.export.save(torch.export.export(torch.nn.Linear(3, 5).eval(), (torch.randn(4, 3),)), path)
    loaded = load(str(path))
    assert shapes_of(list(loaded.model.graph.inputs)) == {"input": (4, 3)}
    assert loaded.batch_symbol is None
    assert "Guard failed" in loaded.notes[0]
    assert_agrees(loaded, 4)


def test_a_function_of_an_importable_module_is_found_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_nets").mkdir()
    (tmp_path / "my_nets" / "tiny.py").write_text(
        "import torch\n\ndef make():\n    return torch.nn.Linear(3, 2), torch.ones(1, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load("my_nets.tiny:make")
    assert loaded.name == "my_nets.tiny.make"
    assert_agrees(loaded, 1, 3)


def test_weights_of_torchvision_come_from_the_local_cache_when_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    net = models.squeezenet1_1(weights=None)
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / Path(weights.url).name)
    loaded = load("torchvision:squeezenet1_1", "3,32,32")
    assert loaded.weights_origin == "torchvision weights IMAGENET1K_V1 from the local cache"
    assert loaded.normalisation == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    stored = loaded.model.graph.initializers["features.0.weight"].const_value
    assert stored is not None
    assert np.array_equal(stored.numpy(), net.features[0].weight.detach().numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "shape"),
    [
        ("torchvision:resnet18", ("batch", 3, 224, 224)),
        ("timm:vit_tiny_patch16_224", ("batch", 3, 224, 224)),
        ("timm:efficientnet_b0", ("batch", 3, 224, 224)),
    ],
)
def test_a_known_model_is_exported_at_its_own_size(source: str, shape: tuple[int | str, ...]) -> None:
    loaded = load(source)
    assert list(shapes_of(list(loaded.model.graph.inputs)).values()) == [shape]
    assert loaded.weights_origin.startswith("seeded initialisation (seed 0)")
    assert_agrees(loaded, 1, 3)


@pytest.mark.slow
def test_a_detector_is_refused_with_the_true_reason() -> None:
    from dsc_split.errors import ExportError

    with pytest.raises(ExportError, match="control flow depends on values: Could not guard on data-dependent"):
        load("torchvision:ssdlite320_mobilenet_v3_large", "3,320,320")
