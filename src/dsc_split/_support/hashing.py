"""SHA-256 of texts and files. A file is read once for its digest, its CRC-32 and a copy."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

__all__ = ["Hashed", "Hasher", "sha256_file", "sha256_text"]

BLOCK_BYTES = 1 << 20
BLOCKS = 4
FIRST_BYTES = 1 << 16
"""First bytes of a file, which this thread hashes itself: for small files the second thread would be slower."""


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """Size and digests of a file."""

    size_bytes: int
    """Number of bytes."""
    sha256: str
    """SHA-256, 64 hexadecimal digits."""
    crc32: int
    """CRC-32 as in a zip file; 0 where it was not requested."""


class Hasher:
    """Reads files. A second thread computes SHA-256, the slowest part, while the first reads the next blocks."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "sha256")
        self._buffers: list[bytearray] = []

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def read(
        self,
        source: BinaryIO,
        sink: BinaryIO | None = None,
        *,
        crc: bool = False,
        tell: Callable[[int], None] | None = None,
    ) -> Hashed:
        """Read an open file to its end.

        Args:
            source: The file.
            sink: File to write a copy to.
            crc: Whether to compute CRC-32.
            tell: Called with the number of bytes read since the last call.

        Raises:
            OSError: The file cannot be read, or the copy cannot be written.
        """
        first = source.read(FIRST_BYTES)
        digest, crc32, size_bytes, blocks = hashlib.sha256(first), zlib.crc32(first) if crc else 0, len(first), 0
        if sink is not None:
            sink.write(first)
        if tell is not None:
            tell(size_bytes)
        pending: deque[Future[None]] = deque()
        try:
            while size_bytes >= FIRST_BYTES:
                if len(self._buffers) < BLOCKS:
                    self._buffers.append(bytearray(BLOCK_BYTES))
                buffer = self._buffers[blocks % BLOCKS]
                count = source.readinto(buffer)  # type: ignore[attr-defined]  # stub flaw
                if not count:
                    break
                block = memoryview(buffer)[:count]
                pending.append(self._pool.submit(digest.update, block))
                if crc:
                    crc32 = zlib.crc32(block, crc32)
                if sink is not None:
                    sink.write(block)
                size_bytes += count
                blocks += 1
                if tell is not None:
                    tell(count)
                if len(pending) == BLOCKS:
                    pending.popleft().result()
        finally:
            wait(pending)
        return Hashed(size_bytes=size_bytes, sha256=digest.hexdigest(), crc32=crc32)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_text(*parts: str | bytes) -> str:
    """Return the SHA-256 of a sequence of parts, each after its length, so that ``a, bc`` and ``ab, c`` differ."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()
