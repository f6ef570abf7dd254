"""Memory for the inputs and outputs of engines: page-locked host memory, with GPU memory where it is needed."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

    from dsc_split.engines.gpu._cuda import CudaLayer

__all__ = ["IoTensor", "Place"]

Place = Literal["pinned", "mapped", "host"]
"""``pinned``: copied between host and GPU. ``mapped``: the GPU uses the host memory directly. ``host``: the library
uses it on the host."""


class IoTensor:
    """An input or output of an engine; its memory grows and never shrinks.

    Attributes:
        dtype: Element type.
        shape: Current shape. Set it directly where the data is in other memory, and none is needed here.
    """

    def __init__(self, cuda: CudaLayer, dtype: np.dtype, place: Place) -> None:
        self.dtype = dtype
        self.shape: tuple[int, ...] = ()
        self._cuda = cuda
        self._place = place
        self._capacity_bytes = 0
        self._host_address = 0
        self._address = 0
        self._held = contextlib.ExitStack()

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor in its current shape."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def address(self) -> int:
        """Address for the library; after :meth:`resize` never 0, also for an empty tensor."""
        return self._address

    @property
    def host(self) -> np.ndarray:
        """The page-locked memory as an array, valid until the next :meth:`resize`."""
        import numpy as np

        memory = (ctypes.c_uint8 * self.size_bytes).from_address(self._host_address)
        array: np.ndarray = np.ndarray(self.shape, self.dtype, memoryview(memory))
        return array

    def resize(self, shape: tuple[int, ...]) -> None:
        """Change the shape; the contents are lost."""
        self.shape = shape
        self.reserve(self.size_bytes)

    def reserve(self, size_bytes: int) -> int:
        """Allocate at least ``size_bytes`` of memory; return its address."""
        wanted = max(1, size_bytes)
        if wanted > self._capacity_bytes:
            self.close()
            with contextlib.ExitStack() as held:
                host = self._cuda.allocate_host(wanted, mapped=self._place == "mapped")
                held.callback(self._cuda.free, host)
                if self._place == "host":
                    address = host.value
                elif self._place == "mapped":
                    address = self._cuda.device_address(host)
                else:
                    device = self._cuda.allocate(wanted)
                    held.callback(self._cuda.free, device)
                    address = device.value
                self._held = held.pop_all()
            self._host_address, self._address, self._capacity_bytes = host.value, address, wanted
        return self._address

    def to_device(self, stream: int) -> None:
        """Enqueue the copy from host to GPU, where one is needed."""
        if self._place == "pinned" and self.size_bytes:
            self._cuda.copy(self._address, self._host_address, self.size_bytes, stream)

    def to_host(self, stream: int) -> None:
        """Enqueue the copy from GPU to host, where one is needed."""
        if self._place == "pinned" and self.size_bytes:
            self._cuda.copy(self._host_address, self._address, self.size_bytes, stream)

    def close(self) -> None:
        """Free the memory."""
        self._host_address = self._address = self._capacity_bytes = 0
        self._held.close()
