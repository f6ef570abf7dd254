"""Inputs to run a model on: real inputs from a file, or random inputs from a seed."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from dsc_split.errors import BundleError, ModelFileError, UsageError

if TYPE_CHECKING:
    from dsc_split.bundle import Bundle, Split, TensorInfo

__all__ = [
    "golden_samples",
    "load_sample",
    "make_array",
    "make_inputs",
    "read_samples",
    "resize_batch",
    "strip_prefix",
]

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, MemoryError, zipfile.BadZipFile)
"""Errors of numpy for files that are damaged or hostile."""


def load_sample(path: Path) -> dict[str, np.ndarray]:
    """Read a user's ``.npz`` file of inputs by name.

    Raises:
        UsageError: There is no such file.
        ModelFileError: The file is no ``.npz`` file, is damaged, is empty, or contains Python objects.
    """
    if not path.is_file():
        raise UsageError(f"no such sample file: {str(path)!r}.")
    try:
        with path.open("rb") as file:
            arrays = _read_arrays(file)
    except _UNREADABLE as e:
        raise ModelFileError(
            f"sample {str(path)!r} cannot be read as an .npz file of plain arrays: {e}. "
            "Write it with numpy.savez(path, NAME=array)."
        ) from e
    if arrays is None:
        raise ModelFileError(
            f"sample {str(path)!r} holds one unnamed array; an .npz file with one array per input "
            "was expected: numpy.savez(path, NAME=array)."
        )
    if not arrays:
        raise ModelFileError(f"sample {str(path)!r} holds no arrays.")
    return arrays


def read_samples(source: Path | bytes, name: str) -> dict[str, np.ndarray]:
    """Read samples: arrays under keys like ``input:NAME``.

    Args:
        source: A file; or the bytes of one, which must not be compressed: a small file may unpack to any size.
        name: Name of the file, for messages.

    Raises:
        BundleError: The samples cannot be read, or contain anything but plain arrays.
    """
    try:
        if isinstance(source, bytes):
            with zipfile.ZipFile(io.BytesIO(source)) as members:
                if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                    raise ValueError("it is compressed, and may be of any size")
        with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            arrays = _read_arrays(file)
            if arrays is None:
                raise ValueError("it holds one unnamed array")
            return arrays
    except _UNREADABLE as e:
        why = "it is no file of plain arrays" if isinstance(e, ValueError) else e
        raise BundleError(f"samples {name!r} cannot be read: {why}. Make them again, or export again.") from e


def _read_arrays(file: IO[bytes]) -> dict[str, np.ndarray] | None:
    """Read the arrays of an ``.npz`` file by name; ``None`` for a single array without a name.

    The caller opens the file, because numpy does not close a file that it fails to read.
    """
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        return None
    with archive:
        return {name: archive[name] for name in archive.files}


def golden_samples(bundle: Bundle, split: Split | None) -> dict[str, np.ndarray] | None:
    """Read the golden samples of the whole model or of a pair; ``None`` where the bundle has none.

    Returns:
        Keys ``input:NAME``, ``output:NAME`` for the whole model, ``cut:NAME``, ``early:NAME`` for a pair.

    Raises:
        BundleError: The file differs from the manifest, or cannot be read.
    """
    relative = "samples/model.npz" if split is None else f"samples/{split.name}.npz"
    if relative in bundle.manifest.files:
        return read_samples(bundle.read(relative), relative)
    if bundle.is_packed or not bundle.has(relative):
        return None
    return read_samples(bundle.file(relative), relative)


def strip_prefix(samples: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the entries whose keys start with ``prefix``, without the prefix."""
    return {key[len(prefix) :]: value for key, value in samples.items() if key.startswith(prefix)}


def make_inputs(
    specs: Sequence[TensorInfo], batch: int, seed: int, sample: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Make one set of inputs.

    Args:
        specs: The inputs; each has at most one symbolic dimension.
        batch: Batch size.
        seed: Seed of the random inputs; equal arguments give equal arrays.
        sample: Real inputs by name; repeated or cut along the batch axis. Missing inputs are random.

    Raises:
        UsageError: ``sample`` has an input that the model does not have, or a spec has two symbolic dimensions.
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
    """Make one random array.

    Floats are standard normal, ``uint8`` is uniform over 0..255, other integers are 0 or 1, booleans are uniform.
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
    """Repeat or cut ``array`` to ``batch`` entries along ``axis``, where it must have at least one."""
    repeated: np.ndarray = np.take(array, np.arange(batch) % array.shape[axis], axis=axis)
    return repeated


def _fit_sample(spec: TensorInfo, shape: tuple[int, ...], array: np.ndarray) -> np.ndarray:
    """Convert a real input to the type and shape of ``spec``; only the batch axis may have another size."""
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
