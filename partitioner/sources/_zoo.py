"""Build models of torchvision and timm by name, with weights from the local caches if they are there."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsc_split._support.optional import require
from dsc_split.errors import ExportError, ModelFileError, UsageError
from dsc_split.partitioner.sources._torch_model import TorchModel, describe
from dsc_split.partitioner.sources._torch_weights import fill_zero_layers, load_weights

if TYPE_CHECKING:
    from torch import nn

    from dsc_split.partitioner.sources._options import SourceOptions

__all__ = ["load_timm", "load_torchvision"]

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
Untyped = Any
"""An object of torchvision or timm, which have no types."""


def load_torchvision(name: str, options: SourceOptions) -> TorchModel:
    """Build the torchvision model ``name``.

    Raises:
        UsageError: There is no such model, or its published weights were asked for and there are none.
        ModelFileError: Weights are damaged or do not fit.
    """
    import torch

    models = require("torchvision.models", extra="models", purpose=f"load 'torchvision:{name}'")
    known = models.list_models()
    if name not in known:
        raise _unknown(f"torchvision:{name}", name, known)
    published = list(models.get_model_weights(name))
    default = getattr(models.get_model_weights(name), "DEFAULT", None)
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    chosen = None
    if options.weights == "pretrained":
        chosen = default
        if chosen is None:
            raise UsageError(f"torchvision publishes no weights for {name!r}. Leave --weights out, or give a file.")
    elif options.weights is None:
        in_order = ([default] if default else []) + published
        chosen = next((entry for entry in in_order if (cache / Path(entry.url).name).is_file()), None)
    arguments: dict[str, object] = {"weights": chosen}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments["weights_backbone"] = None
    local = chosen is not None and (cache / Path(chosen.url).name).is_file()
    real = chosen is not None
    module = _build(lambda: models.get_model(name, **arguments), f"torchvision:{name}", options.seed, real=real)
    if chosen is not None:
        origin = f"torchvision weights {chosen.name} {'from the local cache' if local else 'from ' + chosen.url}"
    else:
        origin = _initialise(module, options)
    image_shape, normalisation = _torchvision_input(chosen or default)
    return TorchModel(
        module=module,
        name=name,
        weights_origin=origin,
        initialised=chosen is None and options.weights in (None, "random"),
        image_shape=image_shape,
        normalisation=normalisation,
    )


def _torchvision_input(weights: Untyped) -> tuple[tuple[int, ...] | None, Normalisation | None]:
    """Return the input shape and the normalisation of published weights."""
    if weights is None:
        return None, None
    transforms = weights.transforms()
    mean, std = getattr(transforms, "mean", None), getattr(transforms, "std", None)
    normalisation = (tuple(map(float, mean)), tuple(map(float, std))) if mean and std else None
    # Classification crops; segmentation only resizes; detection and video leave the size to the user.
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    video = "temporal" in type(transforms).__name__.lower() or "video" in type(transforms).__name__.lower()
    if not size or video:
        return None, normalisation
    height, width = (size[0], size[-1])
    return (3, int(height), int(width)), normalisation


def load_timm(name: str, options: SourceOptions) -> TorchModel:
    """Build the timm model ``name``.

    Raises:
        UsageError: There is no such model, or its published weights were asked for and there are none.
        ModelFileError: Weights are damaged or do not fit.
    """
    timm = require("timm", extra="models", purpose=f"load 'timm:{name}'")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise _unknown(f"timm:{name}", name, timm.list_models())
    tagged = timm.list_pretrained(architecture + ".*") + timm.list_pretrained(architecture)
    if tag and name not in tagged:
        raise _unknown(f"timm:{name}", name, tagged)
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    published = config is not None and config.has_weights
    file = _timm_cached(config) if published and options.weights in (None, "pretrained") else None
    if options.weights == "pretrained" and not published:
        raise UsageError(f"timm publishes no weights for {name!r}. Leave --weights out, or give a file.")
    real = file is not None or options.weights == "pretrained"
    arguments: dict[str, object] = {"pretrained": real}
    if file is not None:
        arguments["pretrained_cfg_overlay"] = {"file": file}
    module = _build(lambda: timm.create_model(name, **arguments), f"timm:{name}", options.seed, real=real)
    if real:
        where = "from the local cache" if file else f"from {config.hf_hub_id or config.url}"
        origin = f"timm weights {f'{architecture}.{config.tag}'.rstrip('.')} {where}"
    else:
        origin = _initialise(module, options)
    used = module.pretrained_cfg
    size, mean, std = used.get("input_size"), used.get("mean"), used.get("std")
    return TorchModel(
        module=module,
        name=name,
        weights_origin=origin,
        initialised=not real and options.weights in (None, "random"),
        image_shape=tuple(map(int, size)) if size else None,
        normalisation=(tuple(map(float, mean)), tuple(map(float, std))) if mean and std else None,
    )


def _timm_cached(config: Untyped) -> str | None:
    """Return the file of published timm weights if this machine has it."""
    import torch
    from huggingface_hub import try_to_load_from_cache

    if config.hf_hub_id:
        for file in filter(None, (config.hf_hub_filename, "model.safetensors", "pytorch_model.bin")):
            found = try_to_load_from_cache(config.hf_hub_id, file)
            if isinstance(found, str):
                return found
    if config.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(config.url).name
        if path.is_file():
            return str(path)
    return None


def _build(make: Callable[[], Untyped], source: str, seed: int, *, real: bool) -> Untyped:
    """Build a module from a seed; if that fails, raise an error that says why in one line."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = make()
        except Exception as e:
            if not real:
                raise ExportError(f"{source!r} cannot be built: {describe(e)}.") from e
            raise ModelFileError(
                f"the weights of {source!r} cannot be loaded: {describe(e)}. Check the connection or delete "
                "the cached file, or use --weights random."
            ) from e
    return module.eval().requires_grad_(False)


def _initialise(module: nn.Module, options: SourceOptions) -> str:
    if options.weights not in (None, "random"):
        return load_weights(module, Path(str(options.weights)))
    filled = fill_zero_layers(module, options.seed)
    return f"seeded initialisation (seed {options.seed})" + (", layers of zeros filled" if filled else "")


def _unknown(source: str, name: str, known: list[str]) -> UsageError:
    package = source.partition(":")[0]
    nearest = difflib.get_close_matches(name, known, n=3) or difflib.get_close_matches(
        name.partition(".")[0], known, n=3
    )
    hint = f" Did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
    return UsageError(f"{package} has no model {name!r}.{hint}")
