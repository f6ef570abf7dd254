from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dsc_split.errors import ModelFileError, UsageError
from dsc_split.partitioner.sources._torch_weights import fill_zero_layers, is_untrained, load_weights, recalibrate


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(tmp_path: Path, suffix: str) -> None:
    source, path = net(), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, path)
    else:
        save_file(source.state_dict(), path)
    target = net()
    assert load_weights(target, path) == f"weights file weights{suffix}"
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_weights_that_do_not_fit_are_refused_by_name_and_change_nothing(tmp_path: Path) -> None:
    weights = {name: tensor + 1 for name, tensor in net().state_dict().items()}
    del weights["0.weight"]
    weights["head.bias"] = torch.zeros(1)
    weights["0.bias"] = torch.zeros(9)
    save_file(weights, tmp_path / "w.safetensors")
    target = net()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ModelFileError) as caught:
        load_weights(target, tmp_path / "w.safetensors")
    for words in ("1 missing (0.weight)", "not of this model (head.bias)", "0.bias [9] instead of [4]"):
        assert words in str(caught.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_weights_are_refused(tmp_path: Path, name: str) -> None:
    for content in (b"", b"garbage"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelFileError, match=r"cannot be read|hold other Python objects"):
            load_weights(net(), tmp_path / name)


def test_a_pickled_module_is_not_loaded(tmp_path: Path) -> None:
    torch.save(net(), tmp_path / "w.pth")
    with pytest.raises(ModelFileError, match="other Python objects"):
        load_weights(net(), tmp_path / "w.pth")


def test_a_file_of_another_kind_or_none_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such weights file"):
        load_weights(net(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"give a \.safetensors or \.pth file"):
        load_weights(net(), tmp_path / "w.onnx")


def test_recalibration_gives_activations_a_usual_size() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(child for _ in range(6) for child in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))))
    module.eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        before = module(x).std()
        assert is_untrained(module)
        recalibrate(module, lambda seed: module(x + seed))
        after = module(x).std()
    assert before < 0.2 < 0.5 < after < 2
    assert not is_untrained(module)
    assert not any(child.training for child in module.modules())
    assert module[1].momentum == 0.1


def test_recalibration_leaves_dropout_off() -> None:
    module = net()
    seen: list[bool] = []
    module[2].register_forward_hook(lambda child, args, result: seen.append(child.training))
    recalibrate(module, lambda seed: module(torch.randn(2, 3, 8, 8)))
    assert seen == [False] * 3


def test_recalibration_that_fails_changes_nothing() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_mean = torch.full((4,), 3.0)
    module = nn.Sequential(norm).eval()
    with pytest.raises(ValueError, match="more than 1 value"):
        recalibrate(module, lambda seed: module(torch.randn(1, 4)))
    assert norm.running_mean.tolist() == [3] * 4
    assert not module.training


def test_a_net_without_batch_norm_needs_no_recalibration() -> None:
    assert not is_untrained(nn.Linear(2, 2))


def test_layers_of_zeros_are_filled_from_the_seed() -> None:
    def made(seed: int) -> nn.Linear:
        layer = nn.Linear(4, 4).requires_grad_(False)
        layer.weight.zero_()
        assert fill_zero_layers(layer, seed) == 1
        return layer

    assert made(0).weight.any()
    assert torch.equal(made(0).weight, made(0).weight)
    assert not torch.equal(made(0).weight, made(1).weight)
    assert fill_zero_layers(nn.Linear(4, 4), 0) == 0
