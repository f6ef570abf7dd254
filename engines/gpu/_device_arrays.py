"""Share arrays in GPU memory through the CUDA array interface (version 3 and earlier) and DLPack.

Sources: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html and
https://data-apis.org/array-api/latest/design_topics/data_interchange.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsc_split.engines.gpu._dlpack import CPU, CUDA, CUDA_HOST, CUDA_MANAGED, DEVICE_NAMES, read_dlpack, write_dlpack
from dsc_split.errors import BackendError

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.engines.gpu._cuda import CudaLayer

__all__ = ["DeviceArray", "DeviceView", "as_input", "stream_handle"]

Shared = Any
"""An array with ``__dlpack__`` or ``__cuda_array_interface__``, from any library."""

LEGACY_STREAM = 1
"""The default stream in both interfaces, where 0 is not allowed."""
ALIGNMENT_BYTES = 256
"""Alignment that TensorRT needs, and that every allocation of CUDA has."""


@dataclass(frozen=True, kw_only=True)
class DeviceView:
    """Another library's array in GPU memory: contiguous, aligned, and in the engine's context."""

    address: int
    """Address of the first element."""
    dtype: np.dtype
    """Element type."""
    shape: tuple[int, ...]
    """Dimensions."""
    stream: int | None
    """Stream that writes it and must be waited for; ``None`` where no wait is needed."""
    owner: object
    """Object that keeps the memory alive."""

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


class DeviceArray:
    """An output in GPU memory of the engine. It is valid until the engine is run again or closed.

    Other libraries use it without a copy, for example ``torch.from_dlpack(array)``.

    Attributes:
        dtype: Element type.
        shape: Dimensions.
        address: Address of the first element.
        stream: Stream that writes it; ``None`` where it is ready.
    """

    def __init__(
        self,
        cuda: CudaLayer,
        *,
        address: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        stream: int | None,
        owner: object,
    ) -> None:
        self.dtype = dtype
        self.shape = shape
        self.address = address
        self.stream = stream
        self._cuda = cuda
        self._owner = owner

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if math.prod(self.shape) else 0, False),
            "strides": None,
            "stream": None if self.stream is None else self.stream or LEGACY_STREAM,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self._cuda.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("an engine's output is shared as it is; copy it where it is needed.")
        if self.stream is not None and stream != -1:
            with self._cuda.active():
                event = self._cuda.create_event()
                try:
                    self._cuda.record(event, self.stream)
                    self._cuda.wait(LEGACY_STREAM if stream is None else stream, event)
                finally:
                    self._cuda.free(event)
        return write_dlpack(address=self.address, dtype=self.dtype, shape=self.shape, device=self._cuda.device)

    def copy_to_host(self) -> np.ndarray:
        """Wait until the array is ready, and return a copy as a NumPy array."""
        import numpy as np

        host = np.empty(self.shape, self.dtype)
        stream = LEGACY_STREAM if self.stream is None else self.stream
        with self._cuda.active():
            if host.nbytes:
                self._cuda.copy(host.ctypes.data, self.address, host.nbytes, stream)
            self._cuda.synchronise(stream)
        return host


def as_input(name: str, array: Shared, cuda: CudaLayer, stream: int) -> np.ndarray | DeviceView:
    """Return an input as a NumPy array, or as a view of GPU memory.

    Args:
        name: Name of the input, for messages.
        array: A NumPy array, or anything with ``__dlpack__`` or ``__cuda_array_interface__``.
        cuda: The engine's layer.
        stream: Stream that will read the array.

    Raises:
        BackendError: It is no array, is in memory that cannot be used, is not contiguous, or has elements of a type
            that NumPy lacks.
    """
    import numpy as np

    if isinstance(array, (np.ndarray, DeviceView)):
        return array
    if not isinstance(array, DeviceArray) and hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
        kind, device = array.__dlpack_device__()
        if kind in (CPU, CUDA_HOST):
            try:
                return np.from_dlpack(array)
            except (BufferError, RuntimeError, TypeError) as e:
                raise _refusal(name, f"cannot be shared through DLPack: {e}") from e
        if kind not in (CUDA, CUDA_MANAGED):
            raise _refusal(name, f"lies on {DEVICE_NAMES.get(kind, f'a device of kind {kind}')} {device}")
        return _from_dlpack(name, array, cuda, stream)
    if hasattr(array, "__cuda_array_interface__"):
        return _from_interface(name, array, cuda)
    raise _refusal(name, f"is a {type(array).__name__!r}")


def stream_handle(stream: object) -> int:
    """Return the number of a stream of ``cuda.core``, torch, cupy or pycuda; a number is returned unchanged.

    Raises:
        BackendError: It is no stream.
    """
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr", "handle"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise BackendError(
        f"a {type(stream).__name__!r} is no CUDA stream; its number, or a stream of torch, cupy, pycuda or cuda.core "
        f"was expected."
    )


def _from_dlpack(name: str, array: Shared, cuda: CudaLayer, stream: int) -> DeviceView:
    try:
        capsule = array.__dlpack__(stream=stream or LEGACY_STREAM)
        tensor = read_dlpack(capsule)
    except (BufferError, ValueError) as e:
        raise _refusal(name, f"cannot be shared through DLPack: {e}") from e
    dtype = _dtype(name, tensor.dtype)
    if tensor.strides is not None:
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        _require_contiguous(name, tensor.shape, strides, dtype.itemsize)
    _require_usable(name, tensor.address, tensor.shape, cuda)
    return DeviceView(address=tensor.address, dtype=dtype, shape=tensor.shape, stream=None, owner=(array, capsule))


def _from_interface(name: str, array: Shared, cuda: CudaLayer) -> DeviceView:
    interface: Mapping[str, Shared] = array.__cuda_array_interface__
    if interface.get("mask") is not None:
        raise _refusal(name, "is a masked array")
    dtype = _dtype(name, interface["typestr"])
    shape = tuple(int(dim) for dim in interface["shape"])
    if interface.get("strides") is not None:
        _require_contiguous(name, shape, tuple(interface["strides"]), dtype.itemsize)
    address = int(interface["data"][0] or 0)
    _require_usable(name, address, shape, cuda)
    # Before version 3 the interface has no stream: work in the default stream may still be running.
    stream = interface.get("stream") if interface["version"] >= 3 else LEGACY_STREAM
    return DeviceView(address=address, dtype=dtype, shape=shape, stream=stream, owner=array)


def _dtype(name: str, text: str) -> np.dtype:
    import numpy as np

    try:
        dtype = np.dtype(text)
    except TypeError as e:
        raise _refusal(name, f"has elements of type {text!r}, which NumPy does not know") from e
    if not dtype.isnative:
        raise _refusal(name, f"has elements of type {text!r}, in the other byte order")
    return dtype


def _require_contiguous(name: str, shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> None:
    expected = itemsize
    if 0 in shape:
        return
    for dim, stride in zip(reversed(shape), reversed(strides), strict=True):
        if dim != 1 and stride != expected:
            raise _refusal(name, f"is not contiguous: its strides are {strides} for shape {shape}")
        expected *= dim


def _require_usable(name: str, address: int, shape: tuple[int, ...], cuda: CudaLayer) -> None:
    if 0 in shape:
        return
    if address % ALIGNMENT_BYTES:
        raise _refusal(name, f"starts at address {address:#x}, which is no multiple of {ALIGNMENT_BYTES}")
    with cuda.active():
        why_not = cuda.foreign(address)
    if why_not:
        raise _refusal(name, why_not)


def _refusal(name: str, why: str) -> BackendError:
    return BackendError(
        f"input {name!r} {why}. A NumPy array, or a contiguous array on the engine's GPU was expected; pass a copy."
    )
