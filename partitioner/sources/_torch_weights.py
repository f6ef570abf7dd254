"""Load the weights of PyTorch modules from a file, and make an untrained net return numbers of useful size."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.optional import require
from dsc_split.errors import ModelFileError, UsageError
from dsc_split.partitioner.sources._torch_model import describe

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["fill_zero_layers", "is_untrained", "load_weights", "recalibrate"]

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which checkpoints keep the weights, beside the optimiser and other data."""

CALIBRATION_RUNS = 3


def load_weights(module: nn.Module, path: Path) -> str:
    """Load a weights file into ``module``, and return in words where the weights came from.

    Args:
        module: Changed in place, or not at all.
        path: A ``.safetensors`` file, or a ``.pth``, ``.pt`` or ``.bin`` file with tensors only.

    Raises:
        UsageError: There is no such file, or it has another ending.
        ModelFileError: The file is damaged, has other objects than tensors, or does not fit the module.
    """
    weights = _find_weights(_read_file(path), path)
    expected = module.state_dict()
    optional = {name for name in expected if name.endswith(".num_batches_tracked")}
    faults = {
        "missing": [name for name in expected if name not in weights and name not in optional],
        "not of this model": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} {list(weights[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and weights[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        raise ModelFileError(
            f"weights {str(path)!r} do not fit the model: "
            + "; ".join(f"{len(names)} {fault} ({_first(names)})" for fault, names in faults.items() if names)
            + ". Give the weights of this very model."
        )
    module.load_state_dict(weights, strict=False)
    return f"weights file {path.name}"


def _read_file(path: Path) -> object:
    import torch

    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise UsageError(f"--weights {str(path)!r}: give a .safetensors or .pth file, 'pretrained' or 'random'.")
    if not path.is_file():
        raise UsageError(f"no such weights file: {str(path)!r}.")
    safetensors = require("safetensors.torch", extra="export", purpose="read .safetensors files")
    try:
        if suffix == ".safetensors":
            return safetensors.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ModelFileError(
            f"weights {str(path)!r} hold other Python objects than tensors, and are not loaded: they could run any "
            "code. Save them with torch.save(module.state_dict(), path)."
        ) from e
    except Exception as e:
        raise ModelFileError(f"weights {str(path)!r} cannot be read: {describe(e)}.") from e


def _find_weights(found: object, path: Path) -> dict[str, torch.Tensor]:
    """Find the weights in a checkpoint, and drop the prefix that DataParallel gives their names."""
    import torch

    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ModelFileError(
            f"weights {str(path)!r} hold {type(found).__name__}, not tensors by name. "
            "Save them with torch.save(module.state_dict(), path)."
        )
    weights = {str(name): value for name, value in found.items()}
    if weights and all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def fill_zero_layers(module: nn.Module, seed: int) -> int:
    """Give random weights to layers that start as zeros, as many classifiers do; return the number of layers.

    A net that always returns zero would pass every comparison.
    """
    import torch
    from torch import nn

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    zeros = [child for child in module.modules() if isinstance(child, kinds) and not child.weight.any()]
    generator = torch.Generator().manual_seed(seed)
    for layer in zeros:
        nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
    return len(zeros)


def is_untrained(module: nn.Module) -> bool:
    """Return whether ``module`` has BatchNorm layers, and all have the statistics of a new layer."""
    norms = _batch_norms(module)
    return bool(norms) and all(
        not norm.num_batches_tracked and not norm.running_mean.any() and (norm.running_var == 1).all() for norm in norms
    )


def recalibrate(module: nn.Module, run: Callable[[int], object]) -> None:
    """Set BatchNorm statistics to those of a few forwards, so that activations neither vanish nor explode.

    Only the BatchNorm layers are in training mode meanwhile: dropout and stochastic depth stay off.

    Args:
        module: Changed in place, unless ``run`` raises; in evaluation mode before and after.
        run: Runs one forward on inputs that it makes from a seed.
    """
    norms = _batch_norms(module)
    momenta = [norm.momentum for norm in norms]
    before = [{name: value.clone() for name, value in norm.named_buffers(recurse=False)} for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        for seed in range(CALIBRATION_RUNS):
            run(seed)
    except Exception:
        for norm, buffers in zip(norms, before, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum


def _batch_norms(module: nn.Module) -> list[Any]:
    from torch import nn

    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return [
        child
        for child in module.modules()
        if isinstance(child, kinds) and child.running_mean is not None and child.track_running_stats
    ]
