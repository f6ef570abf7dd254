from __future__ import annotations

import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from tests.support.paths import DATA

from dsc_split.errors import BackendUnavailable, ExportError, ModelFileError, UsageError
from dsc_split.partitioner.sources._options import LoadedModel, SourceOptions, parse_input_shapes
from dsc_split.partitioner.sources._sources import load_source

NETS = str(DATA / "source_nets.py")


def load(source: str, *shapes: str, weights: str | None = None, sample: Path | None = None) -> LoadedModel:
    return load_source(source, SourceOptions(input_shapes=shapes, weights=weights, sample=sample, max_batch=8))


def test_input_shapes_put_the_batch_in_front_or_where_the_word_stands() -> None:
    first, second = parse_input_shapes(("3,224,224", "x=16,batch,8"))
    assert (first.name, first.at(2), first.batch_axis) == (None, (2, 3, 224, 224), 0)
    assert (second.name, second.at(5), second.batch_axis) == ("x", (16, 5, 8), 1)


@pytest.mark.parametrize(
    "text", ["", "3,,4", "x=", "=3", "3,-1", "0,3", "3.5", "batch,batch", "x=3,none", "9999999999"]
)
def test_a_malformed_input_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--input-shape"):
        parse_input_shapes((text,))


def test_two_shapes_for_one_input_are_refused() -> None:
    with pytest.raises(UsageError, match="2 times for input 'x'"):
        parse_input_shapes(("x=3", "x=4"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("torchvision:resnet81", "torchvision has no model 'resnet81'. Did you mean 'resnet18'"),
        ("timm:efficientnet_bo", "timm has no model 'efficientnet_bo'. Did you mean 'efficientnet_b"),
        ("timm:resnet18.no_such_tag", "Did you mean 'resnet18."),
        ("torchvison:resnet18", "no module named 'torchvison'.*Did you mean the source 'torchvision:NAME'"),
        ("resnet18", "unknown source 'resnet18'.*with its library, 'torchvision:resnet18'"),
        ("a/b:c", "unknown source"),
        ("torchvision:", "unknown source"),
        ("none.onnx", "no such model file: 'none.onnx'"),
        ("none.pt2", "no such model file"),
        ("none.py:make", "no such file: 'none.py'"),
        ("no_such_package.nets:make", "no module named 'no_such_package.nets'"),
        (f"{NETS}:plan", "has no function 'plan'. Did you mean 'plain'"),
        (f"{NETS}:not_callable", "is a value of type int; a function was expected"),
        (f"{NETS}:no_module", "returned a value of type int; a torch.nn.Module was expected"),
        (f"{NETS}:fails", r"function 'fails'.*raised KeyError: 'no luck' \(source_nets.py, line \d+\)"),
    ],
)
def test_a_source_that_is_none_is_wrong_usage(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(source)


def test_a_file_that_does_not_compile_is_wrong_usage(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("def make(:\n")
    with pytest.raises(UsageError, match="raised SyntaxError"):
        load(f"{path}:make")


def test_weights_do_not_go_with_a_model_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="its weights are in the model file"):
        load(str(path), weights="w.pth")


def test_published_weights_do_not_go_with_a_function() -> None:
    with pytest.raises(UsageError, match="a function loads its own weights"):
        load(f"{NETS}:plain", weights="pretrained")


def test_a_damaged_program_is_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    for content in (b"", b"garbage", b"PK\x03\x04garbage"):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match="cannot be read as an exported program"):
            load(str(path))


def test_a_missing_package_is_named_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'dsc-split\[models\]'"):
        load("torchvision:resnet18")


def test_a_shape_that_is_not_known_is_asked_for() -> None:
    with pytest.raises(UsageError, match=r"shape of input 'image'.*--input-shape SHAPE"):
        load(f"{NETS}:plain")
    with pytest.raises(UsageError, match=r"shape of input 'tokens'.*--input-shape tokens=SHAPE"):
        load(f"{NETS}:encoder_alone", "mask=6")


def test_an_input_that_there_is_none_of_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no input 'picture'; its inputs are 'image'"):
        load(f"{NETS}:plain", "picture=3,8,8")
    np.savez(tmp_path / "s.npz", words=np.zeros(3))
    with pytest.raises(UsageError, match="no input 'words'; its inputs are 'tokens', 'mask'"):
        load(f"{NETS}:encoder", sample=tmp_path / "s.npz")


def test_a_shape_without_a_name_is_refused_where_there_are_several_inputs() -> None:
    with pytest.raises(UsageError, match=r"inputs 'tokens', 'mask'\. Give NAME=SHAPE"):
        load(f"{NETS}:encoder", "6")


def test_a_shape_that_the_model_does_not_run_on_is_refused_with_the_reason() -> None:
    with pytest.raises(
        UsageError, match=r"does not run on inputs image \[2, 5, 8, 8\] float32.*channels.*--input-shape"
    ):
        load(f"{NETS}:plain", "5,8,8")


def test_integer_inputs_that_were_taken_for_floats_are_refused_with_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"tokens .* float32.*indices.*--sample"):
        load(f"{NETS}:encoder_alone", "tokens=6")


def test_a_sample_of_another_kind_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", tokens=np.zeros((2, 6)))
    with pytest.raises(ModelFileError, match="'tokens' is float64"):
        load(f"{NETS}:encoder", sample=tmp_path / "s.npz")


def test_control_flow_on_values_is_refused_with_the_line() -> None:
    with pytest.raises(ExportError, match=r"depends on values \(source_nets.py, line \d+: if x.sum\(\) > 0:\)"):
        load(f"{NETS}:steered")


def test_an_operator_without_counterpart_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match=r"operator aten\._linalg_svd has no ONNX counterpart"):
        load(f"{NETS}:decomposes")


def test_weights_that_cannot_be_downloaded_are_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(ModelFileError, match=r"weights of 'torchvision:alexnet' cannot be loaded: URL.*no network"):
        load("torchvision:alexnet", weights="pretrained")
