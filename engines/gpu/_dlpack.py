"""Read and write DLPack capsules: the C structures of version 0.8, as far as engines need them.

Source: https://github.com/dmlc/dlpack/blob/v0.8/include/dlpack/dlpack.h
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CPU", "CUDA", "CUDA_HOST", "CUDA_MANAGED", "DEVICE_NAMES", "DlpackTensor", "read_dlpack", "write_dlpack"]

CPU = 1
CUDA = 2
CUDA_HOST = 3
CUDA_MANAGED = 13
DEVICE_NAMES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 14: "oneAPI"}
"""Kinds of device, as ``__dlpack_device__`` returns them."""

KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("kind", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_python = ctypes.pythonapi
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _python))
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", _python)
)
_allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", _python))
_free = ctypes.cast(_python.PyMem_RawFree, ctypes.c_void_p)
"""The deleter that consumers call. It is a C function: a consumer may outlive the interpreter."""


@dataclass(frozen=True, kw_only=True)
class DlpackTensor:
    """The contents of a DLPack capsule."""

    address: int
    """Address of the first element."""
    dtype: str
    """``float32``, ``bool``, ``bfloat16``."""
    shape: tuple[int, ...]
    """Dimensions."""
    strides: tuple[int, ...] | None
    """In elements; ``None`` where the tensor is contiguous."""


def read_dlpack(capsule: object) -> DlpackTensor:
    """Read a capsule. The capsule owns the memory: keep it as long as the memory is used.

    Raises:
        ValueError: It is no unversioned DLPack capsule.
    """
    tensor = _ManagedTensor.from_address(_get_pointer(capsule, NAME)).tensor
    name = KINDS.get(tensor.kind, f"kind {tensor.kind} ")
    lanes = "" if tensor.lanes == 1 else f"x{tensor.lanes}"
    return DlpackTensor(
        address=(tensor.data or 0) + tensor.byte_offset,
        dtype="bool" if name == "bool" else f"{name}{tensor.bits}{lanes}",
        shape=tuple(tensor.shape[: tensor.ndim]),
        strides=tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
    )


def write_dlpack(*, address: int, dtype: np.dtype, shape: tuple[int, ...], device: int) -> object:
    """Make a capsule of contiguous GPU memory. The capsule does not own the memory: the caller must keep it.

    Args:
        address: Address of the first element.
        dtype: Element type.
        shape: Dimensions.
        device: Index of the GPU.

    Raises:
        MemoryError: There is too little memory.
    """
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    numbers = (ctypes.c_int64 * (2 * len(shape)))(*shape, *strides)
    header_bytes = ctypes.sizeof(_ManagedTensor)
    pointer = _allocate(header_bytes + ctypes.sizeof(numbers))
    if not pointer:
        raise MemoryError
    ctypes.memmove(pointer + header_bytes, numbers, ctypes.sizeof(numbers))
    managed = _ManagedTensor.from_address(pointer)
    managed.manager = None
    managed.deleter = _free
    managed.tensor = _Tensor(
        data=address,
        device_type=CUDA,
        device_id=device,
        ndim=len(shape),
        kind={"i": 0, "u": 1, "f": 2, "b": 6}[dtype.kind],
        bits=dtype.itemsize * 8,
        lanes=1,
        shape=_pointer(pointer + header_bytes),
        strides=_pointer(pointer + header_bytes + 8 * len(shape)),
    )
    return _new_capsule(pointer, NAME, None)


def _pointer(address: int) -> ctypes._Pointer[ctypes.c_int64]:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))
