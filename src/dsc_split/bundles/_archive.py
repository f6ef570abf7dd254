"""Packed bundles: zip files in which names, sizes and checksums determine every byte outside the data.

Files are stored without compression, sorted by name, without gaps, dates, comments or extra fields. The only exception
is the zip64 field, for a size or an offset that needs it. The reader computes these bytes again and compares them. So
equal files give equal archives, and no other program can read an archive differently.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import unicodedata
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from dsc_split._support.files import new_file
from dsc_split._support.hashing import Hasher
from dsc_split.bundles._storage import MAX_NAME_BYTES, MAX_READ_BYTES, is_plain_name, read_all
from dsc_split.errors import BundleError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = ["Archive", "Entry", "name_faults", "write_archive"]

MAX_ENTRIES = 100_000

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFFFFFF
_LARGEST_16, _LARGEST_32 = _FULL_16 - 1, _FULL_32 - 1
"""Larger numbers are written with zip64."""
_UNIX = 3
_PLAIN_FILE = (stat.S_IFREG | 0o644) << 16
_DATE = (1 << 5) | 1  # 1980-01-01
_UTF_8 = 0x800
_ENCRYPTED, _DESCRIPTOR = 0x1, 0x8
_MAX_CENTRAL_BYTES = _CENTRAL.size + MAX_NAME_BYTES + 28


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file to pack."""

    name: str
    """Path in the bundle."""
    size_bytes: int
    """Size that the file must have."""
    sha256: str
    """Digest that the file must have, 64 hexadecimal digits."""
    open: Callable[[], BinaryIO]
    """Opens the file for reading."""


@dataclass(frozen=True, kw_only=True)
class _Member:
    """A file in the archive."""

    name: str
    size_bytes: int
    crc32: int
    offset: int
    """Position of its local header in the archive, in bytes."""

    @property
    def data_offset(self) -> int:
        return self.offset + len(self.local_header())

    @property
    def end(self) -> int:
        return self.data_offset + self.size_bytes

    def local_header(self) -> bytes:
        name, large = self.name.encode(), self.size_bytes > _LARGEST_32
        extra = struct.pack("<2H2Q", 1, 16, self.size_bytes, self.size_bytes) if large else b""
        size = _FULL_32 if large else self.size_bytes
        version, flags = 45 if large else 20, 0 if name.isascii() else _UTF_8
        fixed = _LOCAL.pack(
            b"PK\3\4", version, flags, 0, 0, _DATE, self.crc32, size, size, len(name), len(extra)
        )  # fmt: skip
        return fixed + name + extra

    def central_header(self) -> bytes:
        name, large, far = self.name.encode(), self.size_bytes > _LARGEST_32, self.offset > _LARGEST_32
        values = [*([self.size_bytes] * 2 if large else []), *([self.offset] if far else [])]
        extra = struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values) if values else b""
        size, offset = _FULL_32 if large else self.size_bytes, _FULL_32 if far else self.offset
        version, flags = 45 if values else 20, 0 if name.isascii() else _UTF_8
        fixed = _CENTRAL.pack(
            b"PK\1\2", _UNIX << 8 | version, version, flags, 0, 0, _DATE, self.crc32, size, size,
            len(name), len(extra), 0, 0, 0, _PLAIN_FILE, offset,
        )  # fmt: skip
        return fixed + name + extra


def _end_record(count: int, size_bytes: int, offset: int) -> bytes:
    """Return the bytes after the central directory, which has ``size_bytes`` bytes and starts at ``offset``."""
    short = (
        count if count <= _LARGEST_16 else _FULL_16,
        size_bytes if size_bytes <= _LARGEST_32 else _FULL_32,
        offset if offset <= _LARGEST_32 else _FULL_32,
    )
    end = _END.pack(b"PK\5\6", 0, 0, short[0], *short, 0)
    if short == (count, size_bytes, offset):
        return end
    end_64 = _END_64.pack(b"PK\6\6", 44, _UNIX << 8 | 45, 45, 0, 0, count, count, size_bytes, offset)
    return end_64 + _LOCATOR_64.pack(b"PK\6\7", 0, offset + size_bytes, 1) + end


def name_faults(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield names that are not allowed, or that some system cannot store together, with the fault as a predicate."""
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if not is_plain_name(name) or any(
            part.startswith(".") or part.endswith((".partial", ".", " ")) for part in parts
        ):
            yield name, "is no plain path inside a bundle"
        folded = _folded(name)
        if folded in seen:
            other = seen[folded]
            yield name, "stands there twice" if other == name else f"differs from {other!r} in nothing but case"
        seen[folded] = name
    for folded, name in seen.items():
        parents = (folded[:end] for end, letter in enumerate(folded) if letter == "/")
        for parent in (seen[parent] for parent in parents if parent in seen):
            yield name, f"lies in {parent!r}, which is a file"


def _folded(name: str) -> str:
    """Return the form in which two names are equal if a file system may treat them as one."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# ---- writing -----------------------------------------------------------------------------------------------


def write_archive(output: Path, entries: Sequence[Entry], *, tell: Callable[[str, int], None]) -> None:
    """Pack files into one archive, all or nothing; equal files give equal bytes.

    Args:
        output: The file to write; an existing file is replaced.
        entries: The files to pack, in any order.
        tell: Called with the name of the current file and the number of bytes packed since the last call.

    Raises:
        BundleError: A file differs from its entry, a name is not allowed, or there are too many files.
        DscError: The archive cannot be written.
    """
    entries = sorted(entries, key=lambda entry: entry.name)
    for name, fault in name_faults(entry.name for entry in entries):
        raise BundleError(f"cannot pack {name!r}: it {fault}. Rename it.")
    if len(entries) > MAX_ENTRIES:
        raise BundleError(f"{len(entries)} files: at most {MAX_ENTRIES} are packed into one.")
    with new_file(output) as file, Hasher() as hasher:
        members: list[_Member] = []
        for entry in entries:
            start = members[-1].end if members else 0
            member = _Member(name=entry.name, size_bytes=entry.size_bytes, crc32=0, offset=start)
            file.write(member.local_header())
            with entry.open() as source:
                found = hasher.read(source, file, crc=True, tell=functools.partial(tell, entry.name))
            if (found.size_bytes, found.sha256) != (entry.size_bytes, entry.sha256):
                raise BundleError(
                    f"{entry.name!r} has {found.size_bytes} bytes and SHA-256 {found.sha256[:12]}...; the manifest "
                    f"says {entry.size_bytes} and {entry.sha256[:12]}.... It was changed or damaged. "
                    "Nothing was packed."
                )
            members.append(_Member(name=entry.name, size_bytes=entry.size_bytes, crc32=found.crc32, offset=start))
            file.seek(start)
            file.write(members[-1].local_header())
            file.seek(members[-1].end)
        offset = members[-1].end if members else 0
        directory = b"".join(member.central_header() for member in members)
        file.write(directory + _end_record(len(members), len(directory), offset))


# ---- reading -----------------------------------------------------------------------------------------------


class Archive:
    """Reads the files of a packed bundle in place. It keeps reading the file that it opened, even if that is replaced.

    Attributes:
        path: The packed file.
    """

    def __init__(self, path: Path) -> None:
        """Open a packed file, and check every byte outside the data.

        Raises:
            BundleError: The file cannot be read, is damaged or cut short, or :func:`write_archive` did not write it.
        """
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._fd)
            self._size_bytes = os.fstat(self._fd).st_size
            self._members = {member.name: member for member in self._read_directory()}
        except OSError as e:
            raise BundleError(f"packed bundle {str(path)!r} cannot be read: {e.strerror or e}.") from e

    def names(self) -> tuple[str, ...]:
        """List every file, sorted."""
        return tuple(self._members)

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file; ``None`` where there is no such file."""
        member = self._members.get(name)
        return None if member is None else member.size_bytes

    def crc32(self, name: str) -> int:
        """Return the CRC-32 of a file, as the archive states it; only :meth:`read` checks it."""
        return self._members[name].crc32

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            BundleError: There is no such file.
        """
        member = self._members.get(name)
        if member is None:
            raise BundleError(f"packed bundle {str(self.path)!r} holds no {name!r}.")
        return io.BufferedReader(_Window(self, self._fd, member.data_offset, member.size_bytes))

    def read(self, name: str, *, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """Read a whole file, and check its CRC-32.

        Raises:
            BundleError: There is no such file, it has more than ``max_bytes``, or its checksum does not match.
        """
        with self.open(name) as file:
            data = read_all(file, max_bytes, f"{name!r} in {str(self.path)!r}")
        if zlib.crc32(data) != self._members[name].crc32:
            self._refuse(f"{name!r} is not what its checksum says")
        return data

    def _refuse(self, why: str) -> NoReturn:
        raise BundleError(
            f"packed bundle {str(self.path)!r} is damaged, or was not made by dsc-split: {why}. Copy it again."
        )

    def _bytes(self, offset: int, size_bytes: int) -> bytes:
        data = os.pread(self._fd, size_bytes, offset)
        if len(data) != size_bytes:
            self._refuse("it was cut short while it was read")
        return data

    def _read_directory(self) -> Iterator[_Member]:
        count, size_bytes, start = self._read_end()
        data = self._bytes(start, size_bytes)
        position, offset, last = 0, 0, ""
        members: list[_Member] = []
        for _ in range(count):
            member = self._parse(data, position)
            header = member.central_header()
            if data[position : position + len(header)] != header:
                self._refuse(f"the entry of {member.name!r} has fields that a packed bundle has not")
            if member.name.encode() <= last.encode() and members:
                twice = "stands there twice" if member.name == last else f"stands behind {last!r}, out of order"
                self._refuse(f"{member.name!r} {twice}")
            if member.offset != offset:
                self._refuse(f"{member.name!r} does not begin where the file before it ends")
            if member.end > start:
                self._refuse(f"{member.name!r} ends behind the end of the data: it lies about its size")
            position, offset, last = position + len(header), member.end, member.name
            members.append(member)
        if position != size_bytes or offset != start:
            self._refuse("there are bytes that belong to no file")
        for name, fault in name_faults(member.name for member in members):
            self._refuse(f"{name!r} {fault}")
        for member in members:
            header = member.local_header()
            if self._bytes(member.offset, len(header)) != header:
                self._refuse(f"the header of {member.name!r} is another one than the directory has")
        return iter(members)

    def _read_end(self) -> tuple[int, int, int]:
        """Return the number of entries, the size and the offset of the central directory, both in bytes."""
        if self._size_bytes < _END.size:
            self._refuse("it is too short for a zip file")
        _, _, _, _, count, size_bytes, offset, _ = _END.unpack(self._bytes(self._size_bytes - _END.size, _END.size))
        long = _END_64.size + _LOCATOR_64.size + _END.size
        if (count == _FULL_16 or _FULL_32 in (size_bytes, offset)) and self._size_bytes >= long:
            end_64 = self._bytes(self._size_bytes - long, _END_64.size)
            count, size_bytes, offset = _END_64.unpack(end_64)[-3:]
        inside = offset + size_bytes < self._size_bytes
        end = _end_record(count, size_bytes, offset) if inside else b""
        if not inside or offset + size_bytes + len(end) != self._size_bytes or not self._ends_with(end):
            self._refuse("it does not end as a packed bundle does: it was cut short, or something was added")
        if count > MAX_ENTRIES or size_bytes > count * _MAX_CENTRAL_BYTES:
            self._refuse(f"it lists {count} files in {size_bytes} bytes; at most {MAX_ENTRIES} are read")
        return count, size_bytes, offset

    def _ends_with(self, end: bytes) -> bool:
        return self._bytes(self._size_bytes - len(end), len(end)) == end

    def _parse(self, data: bytes, position: int) -> _Member:
        """Read an entry of the central directory; refuse features of other zip files with a message for each."""
        if position + _CENTRAL.size > len(data):
            self._refuse("its list of files is cut short")
        fields = _CENTRAL.unpack_from(data, position)
        signature, _, _, flags, method, _, _, crc32, packed, size_bytes, name_bytes, extra_bytes = fields[:12]
        attributes, offset = fields[15:]
        start = position + _CENTRAL.size
        raw, extra = data[start : start + name_bytes], data[start + name_bytes : start + name_bytes + extra_bytes]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"the name {raw[:MAX_NAME_BYTES]!r} is not UTF-8")
        if signature != b"PK\1\2" or len(raw) != name_bytes or len(extra) != extra_bytes:
            self._refuse("its list of files is damaged")
        shown = repr(name[:MAX_NAME_BYTES])
        kind = stat.S_IFMT(attributes >> 16)
        if name.endswith("/") or kind not in (0, stat.S_IFREG):
            what = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder"}.get(kind, "a device or a pipe")
            self._refuse(f"{shown} is {'a folder' if name.endswith('/') else what}; plain files alone are packed")
        if not is_plain_name(name):
            self._refuse(f"{shown} is no plain path inside a bundle")
        if flags & _ENCRYPTED:
            self._refuse(f"{shown} is encrypted")
        if method:
            self._refuse(f"{shown} is compressed (method {method}); files are stored as they are")
        if flags & _DESCRIPTOR:
            self._refuse(f"{shown} has its size behind the data")
        if packed != size_bytes:
            self._refuse(f"{shown} has {packed} bytes for {size_bytes}: it lies about its size")
        large, far = size_bytes == _FULL_32, offset == _FULL_32
        if len(extra) == 4 + 8 * (2 * large + far) and (large or far):
            values = struct.unpack(f"<{2 * large + far}Q", extra[4:])
            size_bytes = values[0] if large else size_bytes
            offset = values[-1] if far else offset
        return _Member(name=name, size_bytes=size_bytes, crc32=crc32, offset=offset)


class _Window(io.RawIOBase):
    """A range of an open file that reads like a file of its own."""

    def __init__(self, owner: Archive, fd: int, start: int, size_bytes: int) -> None:
        self._owner = owner  # keeps the descriptor open as long as this window exists
        self._fd, self._start, self._size_bytes, self._position = fd, start, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}, before the file's begin")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size_bytes - self._position)]
        count = os.preadv(self._fd, [view], self._start + self._position)
        self._position += count
        return count
