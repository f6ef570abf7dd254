"""Networks of many kinds, from PyTorch to proven pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.manifests import stated
from tests.support.paths import DATA

from dsc_split.bundle import Bundle
from dsc_split.partitioner import CutOptions, ExportOptions, SourceOptions, bundle_cuts, export_bundle, list_cuts

NETS = DATA / "split_nets.py"


def export(folder: Path, source: str, *shapes: str, cuts: str | None = "all", max_tensors: int = 1) -> Bundle:
    options = ExportOptions(
        source=SourceOptions(input_shapes=shapes, weights=None if ".py:" in source else "random", max_batch=3),
        cut=CutOptions(cuts=cuts, max_tensors=max_tensors),
    )
    return export_bundle(source, folder / "bundle", options)


def test_unet_is_cut_across_its_skip_connections(tmp_path: Path) -> None:
    one = export(tmp_path, f"{NETS}:unet")
    three = export(tmp_path, f"{NETS}:unet", max_tensors=3)

    assert [split.name for split in one.splits][:2] == ["down1.0", "down1"]
    assert max(len(split.tensors) for split in three.splits) == 3
    assert three.manifest.failed_splits == ()


def test_lstm_state_comes_in_and_goes_out(tmp_path: Path) -> None:
    shapes = ("x=6,batch,5", "h=1,batch,16", "c=1,batch,16")

    bundle = export(tmp_path, f"{NETS}:lstm", *shapes, max_tensors=3)

    splits = {split.name: split for split in bundle.splits}
    assert splits["rnn"].early_outputs == ("output_1", "output_2")
    assert any(split.passthrough == ("h", "c") for split in bundle.splits)
    assert bundle.manifest.failed_splits == ()


def test_transformer_encoder_with_a_mask_is_cut_with_the_mask_as_passthrough(tmp_path: Path) -> None:
    bundle = export(tmp_path, f"{NETS}:encoder", max_tensors=2)

    crossing = {split.name: split for split in bundle.splits}
    assert "layers.layers.0" in crossing
    # What is computed from the mask, or the mask itself, goes along with the tokens' activations.
    assert len(crossing["layers.layers.0"].tensors) == 2
    assert bundle.manifest.failed_splits == ()
    assert {info.dtype for info in bundle.inputs} == {"int64", "bool"}


def test_early_exit_stays_on_the_device(tmp_path: Path) -> None:
    bundle = export(tmp_path, f"{NETS}:early_exit")

    splits = {split.name: split for split in bundle.splits}
    assert splits["stage2"].early_outputs == ("early",)
    assert bundle.output_bytes(3, without=("early",)) == 3 * 2 * 4


# Networks with the number of their single-tensor cuts, where it is known from elsewhere: 43 and 47 there count the
# input and the logits too, which are no cuts.
ZOO = [
    ("torchvision:convnext_tiny", 41, ["features.4", "features.6", "avgpool@ReduceMean"]),
    ("torchvision:swin_t", 45, ["features.4", "features.6", "avgpool@ReduceMean"]),
    ("torchvision:resnet50", None, ["layer4.0@Add", "avgpool"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "count", "names"), ZOO, ids=[row[0] for row in ZOO])
def test_known_network_is_cut_and_proven(tmp_path: Path, source: str, count: int | None, names: list[str]) -> None:
    bundle = export(tmp_path, source, cuts="compressive")

    assert bundle.manifest.failed_splits == ()
    assert all(stated(split.max_rel_error) <= 1e-5 for split in bundle.splits)
    assert [split.name for split in bundle.splits] == names
    if count is not None:
        assert len(bundle_cuts(bundle).cuts) == count


@pytest.mark.slow
def test_vit_has_no_natural_cut_before_the_class_token() -> None:
    found = list_cuts("torchvision:vit_b_16", SourceOptions(weights="random", calibrate=False))

    natural = [cut for cut in found.cuts if cut.natural]
    assert all(cut.elements == 768 for cut in natural)  # one token is left
    assert len(found.cuts) > 20


@pytest.mark.slow
def test_efficientnet_b4_has_the_known_cuts_and_is_stored_once(tmp_path: Path) -> None:
    bundle = export(tmp_path, "torchvision:efficientnet_b4", cuts=None)

    def size(*names: str) -> int:
        return sum((bundle.path / "onnx" / name).stat().st_size for name in names)

    everything = sum(path.stat().st_size for path in (bundle.path / "onnx").iterdir())
    assert everything < 1.15 * size("model.onnx", "weights.data")
    assert [split.name for split in bundle.splits] == [
        "features.2.0", "features.3.0", "features.4.0", "features.6.0", "avgpool",
    ]  # fmt: skip
    assert all(stated(split.max_rel_error) <= 1e-5 for split in bundle.splits)

    found = bundle_cuts(bundle).cuts
    # 72 and 51 with the logits, which are a graph output and no cut.
    assert len(found) == 71
    assert sum(cut.natural for cut in found) == 50
    assert [round(cut.ratio, 4) for cut in found if cut.compressive] == [0.6667, 0.2978, 0.1489, 0.0904, 0.0041]
