"""Inputs for checking and timing an engine: the golden samples, repeated up to the batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dsc_split.bundles._samples import golden_samples, make_inputs, strip_prefix
from dsc_split.errors import BundleError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle, TensorInfo
    from dsc_split.engines.side._sides import SideGraph

__all__ = ["engine_inputs", "tile"]

SEED = 0
"""Seed of the random values where there is no golden sample."""


def tile(array: np.ndarray, info: TensorInfo, batch: int) -> np.ndarray:
    """Repeat or cut ``array`` along the batch axis, to its size at ``batch``.

    Raises:
        BundleError: The array does not match the manifest.
    """
    free = [axis for axis, size in enumerate(info.shape) if isinstance(size, str)]
    fixed = math.prod(size for size in info.shape if isinstance(size, int))
    fits = array.ndim == len(info.shape) and array.dtype.name == info.dtype
    if fits and not free:
        fits = array.size == info.elements(batch)
    elif fits:
        fits = len(free) == 1 and array.size > 0 and info.elements(batch) % fixed == 0
    if not fits:
        raise BundleError(
            f"golden sample of {info.name!r} is {array.dtype.name} of shape {list(array.shape)}; "
            f"{info.dtype} of shape {list(info.shape)} was expected. Cut the bundle again."
        )
    if free:
        size = info.elements(batch) // fixed
        array = np.take(array, np.arange(size) % array.shape[free[0]], axis=free[0])
    return np.ascontiguousarray(array)


def engine_inputs(bundle: Bundle, graph: SideGraph, names: Sequence[str], batch: int) -> dict[str, np.ndarray]:
    """Make the inputs of one engine at one batch size.

    They are the golden samples, because values can change the speed; for a tail, those of the cut. Where the bundle
    has no samples (a cut without proof), they are random, as in proofs.

    Args:
        bundle: The bundle.
        graph: Graph of the engine.
        names: Names of the engine's inputs.
        batch: Batch size.

    Raises:
        BundleError: The manifest does not know an input, or a sample does not match it.
    """
    infos: dict[str, TensorInfo] = {info.name: info for info in bundle.inputs}
    samples = strip_prefix(golden_samples(bundle, None) or {}, "input:")
    if graph.kind == "tail" and graph.split is not None:
        infos.update({info.name: info for info in graph.split.tensors})
        samples.update(strip_prefix(golden_samples(bundle, graph.split) or {}, "cut:"))
    unknown = [name for name in names if name not in infos]
    if unknown:
        raise BundleError(f"{graph.path!r} takes {unknown}, which the manifest does not know. Export it again.")
    made = make_inputs([infos[name] for name in names if name not in samples], batch, SEED)
    return {name: tile(samples[name], infos[name], batch) if name in samples else made[name] for name in names}
