"""Inputs to run a model on: real ones from a file, or made up from a seed."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dsc_split.errors import ModelFileError, UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import TensorInfo

__all__ = ["load_sample", "make_array", "make_inputs", "resize_batch"]


def load_sample(path: Path) -> dict[str, np.ndarray]:
    """Read an ``.npz`` file of inputs by name.

    Raises:
        UsageError: There is no such file.
        ModelFileError: It is no ``.npz`` file, is damaged, is empty, or holds Python objects.
    """
    if not path.is_file():
        raise UsageError(f"no such sample file: {str(path)!r}.")
    try:
        # Opened here, because numpy forgets to close a file that it fails to read.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ModelFileError(
                    f"sample {str(path)!r} holds one unnamed array; an .npz file with one array per input "
                    "was expected: numpy.savez(path, NAME=array)."
                )
            with archive:
                arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise ModelFileError(
            f"sample {str(path)!r} cannot be read as an .npz file of plain arrays: {e}. "
            "Write it with numpy.savez(path, NAME=array)."
        ) from e
    if not arrays:
        raise ModelFileError(f"sample {str(path)!r} holds no arrays.")
    return arrays


def make_inputs(
    specs: Sequence[TensorInfo], batch: int, seed: int, sample: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Make one set of inputs.

    Args:
        specs: The inputs; each has at most one symbolic dimension.
        batch: Batch size.
        seed: Two calls with the same arguments give the same arrays.
        sample: Real inputs by name; repeated or cut along the batch axis. Inputs it lacks are made up.

    Raises:
        UsageError: ``sample`` names an input that there is none of.
        ModelFileError: An array of ``sample`` does not fit its input.
    """
    sample = sample or {}
    names = [spec.name for spec in specs]
    for name in sample:
        if name not in names:
            raise UsageError(
                f"the sample holds {name!r}, and the model has no such input; its inputs are "
                f"{', '.join(map(repr, names))}."
            )
    inputs = {}
    for index, spec in enumerate(specs):
        shape = spec.shape_at(batch)
        if spec.name in sample:
            inputs[spec.name] = _fit_sample(spec, shape, sample[spec.name])
        else:
            inputs[spec.name] = make_array(shape, np.dtype(spec.dtype), (seed, index))
    return inputs


def make_array(shape: Sequence[int], dtype: np.dtype, seed: int | Sequence[int]) -> np.ndarray:
    """Make up one array.

    Floats are standard normal, ``uint8`` is uniform over 0..255, other integers are 0 or 1, booleans random.
    """
    generator = np.random.default_rng(seed)
    if dtype == np.bool_:
        return generator.integers(0, 2, shape).astype(dtype)
    if dtype == np.uint8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    if np.issubdtype(dtype, np.integer):
        return generator.integers(0, 2, shape).astype(dtype)
    return generator.standard_normal(tuple(shape), dtype=np.float32).astype(dtype)


def resize_batch(array: np.ndarray, axis: int, batch: int) -> np.ndarray:
    """Repeat or cut ``array`` so that it has ``batch`` entries along ``axis``; it must have at least one."""
    repeated: np.ndarray = np.take(array, np.arange(batch) % array.shape[axis], axis=axis)
    return repeated


def _fit_sample(spec: TensorInfo, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Bring a real input to the type and shape of ``spec``; the batch axis alone may differ."""
    dtype = np.dtype(spec.dtype)
    whole = np.issubdtype(dtype, np.integer) or dtype == np.bool_
    if whole and not (np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_):
        raise ModelFileError(f"sample {spec.name!r} is {array.dtype}; the input takes {spec.dtype}.")
    axes = [axis for axis, dim in enumerate(spec.shape) if isinstance(dim, str)]
    fits = array.ndim == len(shape) and all(
        size == want for axis, (size, want) in enumerate(zip(array.shape, shape, strict=True)) if axis not in axes
    )
    if not fits or 0 in array.shape:
        raise ModelFileError(f"sample {spec.name!r} has shape {list(array.shape)}; the input takes {list(spec.shape)}.")
    for axis in axes:
        array = resize_batch(array, axis, shape[axis])
    return np.ascontiguousarray(array.astype(dtype))
