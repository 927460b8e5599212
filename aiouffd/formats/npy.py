"""NumPy's own files, as arrays over lazy buffers.

An ``.npy`` file is a header and an array; an ``.npz`` file is a zip archive of those. Only headers
and the archive's directory are read, with ``await``; arrays are memory of which nothing is fetched
until it is touched::

    async with aiouffd.open("https://host/arrays.npz") as buf:
        arrays = await aiouffd.formats.load_npz(buf)
        await arrays.fetch("weights")  # or touch it from a thread and wait there
        print(arrays["weights"].mean())

``np.savez`` stores its members as they are. Those that ``np.savez_compressed`` makes are not memory
anywhere: such an array is read and decompressed each time it is asked for (``arrays[name]``), on
the thread that asks.

Headers are parsed by NumPy, with its limits, and archives by zipfile, which gets no more than
`DIRECTORY_MAX` bytes at a time. Pickled objects are refused.
"""

from __future__ import annotations

import asyncio
import io
import math
import reprlib
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..buffers.arrays import Order, array_over
from ..buffers.buffer import LazyBuffer
from ..buffers.file import BufferFile
from ..buffers.sync import SyncBuffer
from ..errors import FormatError, UnsupportedError, UsageError
from ..util.extras import install_hint
from ..util.waiting import in_thread
from .named import Fetching, Named, SyncFetching

if TYPE_CHECKING:
    from ..buffers.arrays import Array

__all__ = [
    "ArrayInfo",
    "Arrays",
    "SyncArrays",
    "load_npy",
    "load_npy_sync",
    "load_npz",
    "load_npz_sync",
]

#: Longest directory of an archive, in bytes: a hundred thousand members.
DIRECTORY_MAX = 8 << 20
#: Longest header of an array, in bytes: as NumPy's readers have it.
HEADER_MAX = 10_000
#: Members whose headers are read at a time.
_AT_A_TIME = 32
#: Of an array: its magic number, a version, the header's length (two bytes in version 1).
_PREFIX, _MAGIC = 12, b"\x93NUMPY"
#: Of a member: its magic number, flags, the lengths of its name and of extra fields.
_LOCAL = struct.Struct("<4s2xH18xHH")
_ENCRYPTED, _UTF8 = 0x1, 0x800
#: As NumPy has it.
_DIMENSIONS_MAX = 64
#: Deflate makes no more of a byte than this many.
_DEFLATE_MOST = 1032

_short = reprlib.Repr()
_short.maxstring = 80


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """What a file says of one array. Bytes ``offset`` to ``offset + length`` of the file."""

    name: str
    #: NumPy's dtype.
    dtype: Any
    shape: tuple[int, ...]
    order: Order
    #: Of the first element, or of the compressed member.
    offset: int
    length: int
    compressed: bool = False
    #: Of a compressed member: bytes that it is decompressed to, those before the first element,
    #: and the checksum.
    _size: int = 0
    _skip: int = 0
    _crc: int = 0

    def _of(self, buffer: LazyBuffer | SyncBuffer) -> Array:
        if not self.compressed:
            return buffer.array(self.dtype, self.shape, self.offset, order=self.order)
        data = _inflated(buffer[self.offset : self.offset + self.length], self._size)
        if len(data) != self._size or zlib.crc32(data) != self._crc:
            raise FormatError(f"{_short.repr(self.name)} is damaged: its checksum is wrong")
        return array_over(memoryview(data), self.dtype, self.shape, self._skip, self.order)


def _inflated(data: bytes, size: int) -> bytes:
    """At most ``size`` bytes of what ``data`` was before it was compressed."""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except zlib.error as error:
        raise FormatError(f"a compressed member is damaged: {error}") from error


# ----------------------------------------------------------------------- the header


def _header_end(prefix: bytes, limit: int) -> int:
    """Bytes before the first element of what begins with ``prefix``."""
    if prefix[:6] != _MAGIC or len(prefix) < _PREFIX:
        raise FormatError("it does not begin as an array of NumPy", hint="is it an .npy file?")
    wide = prefix[6] > 1
    length = int.from_bytes(prefix[8 : 12 if wide else 10], "little")
    if length > limit:
        raise FormatError(
            f"its header of {length} bytes is longer than {limit}",
            hint="max_header_size= allows more, for files that you trust",
        )
    return (12 if wide else 10) + length


def _parse_header(data: bytes, limit: int) -> tuple[Any, tuple[int, ...], Order]:
    """dtype, shape and order, by NumPy's readers."""
    try:
        import numpy
    except ImportError:
        raise UnsupportedError("arrays need NumPy", hint=install_hint("safetensors")) from None
    header = numpy.lib.format
    try:
        file = io.BytesIO(data)
        version = header.read_magic(file)
        if version == (1, 0):
            read = header.read_array_header_1_0
        elif version == (2, 0):
            read = header.read_array_header_2_0
        elif version == (3, 0):
            # Version 2 in UTF-8. Names may need that, and a name can be written otherwise.
            text = data[_PREFIX:].decode().encode("ascii", "backslashreplace")
            file = io.BytesIO(len(text).to_bytes(4, "little") + text)
            limit, read = max(limit, len(text)), header.read_array_header_2_0
        else:
            raise UnsupportedError(
                f"arrays of version {version[0]}.{version[1]} are not known",
                hint="np.load(buf.file()) may know them",
            )
        shape, fortran, dtype = read(file, max_header_size=limit)
    except UnsupportedError:
        raise
    except Exception as error:  # whatever a stranger's text does to a parser of Python
        raise FormatError(
            f"the header of an array is damaged: {_short.repr(str(error))}"
        ) from error
    if dtype.hasobject:
        raise FormatError(
            f"its elements are pickled objects ({_short.repr(str(dtype))}), which run code",
            hint="np.load(buf.file(), allow_pickle=True) if you trust whoever made the file",
        )
    return dtype, shape, "F" if fortran else "C"


def _needed(name: str, dtype: Any, shape: tuple[int, ...], there: int) -> int:
    """Bytes of the array, of which ``there`` are in the file."""
    length = int(dtype.itemsize)
    # Without zeros: no array has sides that are longer, even an empty one.
    largest = math.prod((length, *(side or 1 for side in shape)))
    if len(shape) > _DIMENSIONS_MAX or largest > sys.maxsize or min(shape, default=0) < 0:
        raise FormatError(f"{_short.repr(name)} has the shape {_short.repr(shape)}")
    length *= math.prod(shape)
    if length > there:
        raise FormatError(
            f"{_short.repr(name)} needs {length} bytes, and there are {there}",
            hint="the file was cut short, or is damaged",
        )
    return length


async def _read_header(
    buffer: LazyBuffer, name: str, offset: int, end: int, limit: int
) -> ArrayInfo:
    """Of the array in bytes ``offset`` to ``end``."""
    prefix = await buffer.read(offset, min(_PREFIX, end - offset))
    start = offset + _header_end(prefix, limit)
    if start > end:
        raise FormatError(f"the header of {_short.repr(name)} is cut short")
    dtype, shape, order = _parse_header(await buffer.read(offset, start - offset), limit)
    length = _needed(name, dtype, shape, end - start)
    return ArrayInfo(name, dtype, shape, order, start, length)


async def load_npy(buffer: LazyBuffer, *, max_header_size: int = HEADER_MAX) -> Array:
    """The array of an ``.npy`` file, over the buffer's memory. Reads the header alone.

    Read-only unless the buffer is writable; it holds the memory. On the buffer's loop; never
    faults. Raises FormatError for what is no such file, for one that is cut short, and for pickled
    objects, UnsupportedError without NumPy, and what `LazyBuffer.read` raises.

    :param max_header_size: bytes of the longest header. Parsing longer ones may take long.
    """
    _check(buffer, LazyBuffer, "load_npy", "load_npy_sync")
    return (await _read_npy(buffer, max_header_size))._of(buffer)


def load_npy_sync(buffer: SyncBuffer, *, max_header_size: int = HEADER_MAX) -> Array:
    """`load_npy` for a buffer of `aiouffd.sync`; blocks. Any thread."""
    _check(buffer, SyncBuffer, "load_npy_sync", "load_npy")
    return buffer._run(_read_npy(buffer._buffer, max_header_size))._of(buffer)


async def _read_npy(buffer: LazyBuffer, limit: int) -> ArrayInfo:
    return await _read_header(buffer, "the array", 0, len(buffer), limit)


def _check(buffer: Any, kind: type, name: str, other: str) -> None:
    if not isinstance(buffer, kind):
        where = "aiouffd.open" if kind is LazyBuffer else "aiouffd.sync.open"
        raise UsageError(f"{name} takes a buffer of {where}", hint=f"for others: {other}")


# ---------------------------------------------------------------------- the archive


class _Arrays(Named["Array", ArrayInfo]):
    def __getitem__(self, name: str) -> Array:
        """The array. Over the buffer's memory, unless ``info[name].compressed``: then it is read
        and decompressed now, and waits for that as a touch does. Raises KeyError, ClosedError;
        SourceError and FormatError for a compressed one."""
        return self._info[name]._of(self._buffers[name])


class Arrays(_Arrays, Fetching["Array", ArrayInfo]):
    """The arrays of an ``.npz`` file by name. Made by `load_npz`. Any thread, but for `fetch`."""


class SyncArrays(_Arrays, SyncFetching["Array", ArrayInfo]):
    """The arrays of an ``.npz`` file by name. Made by `load_npz_sync`. Any thread."""


async def load_npz(buffer: LazyBuffer, *, max_header_size: int = HEADER_MAX) -> Arrays:
    """The arrays of an ``.npz`` file by name, without ``.npy``. Other members are left out.

    Reads the archive's directory and the header of each array, a block or two for each, and no
    elements, whose checksums therefore are not looked at. On the buffer's loop; never faults.
    Raises as `load_npy`, and FormatError for archives that are no such files.
    """
    _check(buffer, LazyBuffer, "load_npz", "load_npz_sync")
    info = await _read_npz(buffer, max_header_size)
    return Arrays(info, dict.fromkeys(info, buffer))


def load_npz_sync(buffer: SyncBuffer, *, max_header_size: int = HEADER_MAX) -> SyncArrays:
    """`load_npz` for a buffer of `aiouffd.sync`; blocks. Any thread."""
    _check(buffer, SyncBuffer, "load_npz_sync", "load_npz")
    info = buffer._run(_read_npz(buffer._buffer, max_header_size))
    return SyncArrays(info, dict.fromkeys(info, buffer))


async def _read_npz(buffer: LazyBuffer, limit: int) -> Mapping[str, ArrayInfo]:
    if not len(buffer):
        raise FormatError("an empty file is no .npz file")
    members = await in_thread(lambda: _directory(buffer), "aiouffd-directory")
    turn = asyncio.Semaphore(_AT_A_TIME)

    async def read(name: str, member: zipfile.ZipInfo) -> ArrayInfo:
        async with turn:
            return await _read_member(buffer, name, member, limit)

    found = await asyncio.gather(*(read(name, member) for name, member in members.items()))
    return {info.name: info for info in found}


class _Bounded:
    """A file that says no to whoever wants too much of it at a time, as zipfile may."""

    def __init__(self, file: BufferFile) -> None:
        self._file = file
        self.error: Exception | None = None
        self.tell: Callable[[], int] = file.tell

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        try:
            if size < 0:
                size = max(0, self._file.size - self._file.tell())
            if size > DIRECTORY_MAX:
                raise FormatError(f"its directory is longer than {DIRECTORY_MAX} bytes")
            return self._file.read(size)
        except Exception as error:
            self.error = error  # zipfile takes any OSError for the end of the file
            raise


def _directory(buffer: LazyBuffer) -> dict[str, zipfile.ZipInfo]:
    """The members that are arrays, by their names. Waits for what it reads."""
    with buffer.file() as whole:
        file = _Bounded(whole)
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
        except Exception as error:
            if file.error is not None:
                raise file.error from None
            raise FormatError(
                f"it is no zip archive, or a damaged one: {_short.repr(str(error))}",
                hint="is it an .npz file, and all of it?",
            ) from error
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        if not member.filename.endswith(".npy"):
            continue
        name = member.filename.removesuffix(".npy")
        if name in found:
            raise FormatError(f"{_short.repr(name)} comes twice in the archive")
        found[name] = member
    return found


async def _read_member(
    buffer: LazyBuffer, name: str, member: zipfile.ZipInfo, limit: int
) -> ArrayInfo:
    def wrong(what: str) -> FormatError:
        return FormatError(f"the member {_short.repr(name)} of the archive {what}")

    size, at = len(buffer), member.header_offset
    if not 0 <= at <= size - _LOCAL.size:
        raise wrong("is not within it")
    magic, flags, named, extra = _LOCAL.unpack(await buffer.read(at, _LOCAL.size))
    start = at + _LOCAL.size + named + extra
    end = start + member.compress_size
    if magic != b"PK\3\4" or end > size:
        raise wrong("is not where the directory says")
    known = member.orig_filename.encode("utf-8" if flags & _UTF8 else "cp437", "replace")
    if await buffer.read(at + _LOCAL.size, named) != known:
        raise wrong("has another name in the directory")
    if (flags | member.flag_bits) & _ENCRYPTED:
        raise wrong("is encrypted")
    if member.compress_type == zipfile.ZIP_STORED:
        if member.file_size != member.compress_size:
            raise wrong("has two lengths")
        return await _read_header(buffer, name, start, end, limit)
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise UnsupportedError(
            f"{_short.repr(name)} is compressed otherwise than np.savez_compressed does",
            hint="np.load(buf.file()) may know how",
        )
    if member.file_size > _DEFLATE_MOST * member.compress_size:
        raise wrong(f"cannot be {member.file_size} bytes")
    # A header and what may stand before it; nothing that long gets longer by deflating.
    head = await buffer.read(start, min(member.compress_size, limit + 4096))
    data = _inflated(head, _PREFIX)
    skip = _header_end(data, limit)
    data = _inflated(head, skip)
    if len(data) < skip or skip > member.file_size:
        raise wrong("is cut short")
    dtype, shape, order = _parse_header(data, limit)
    _needed(name, dtype, shape, member.file_size - skip)
    return ArrayInfo(
        name, dtype, shape, order, start, member.compress_size,
        True, member.file_size, skip, member.CRC,
    )  # fmt: skip
