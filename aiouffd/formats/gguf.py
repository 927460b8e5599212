"""The tensors of `GGUF`_ files, as arrays over lazy buffers.

The ``gguf`` package reads files that have a path. Here the header is read with ``await``, and each
tensor is an array over the buffer's memory, of which nothing is fetched until it is touched::

    async with aiouffd.open("https://host/model.gguf") as buf:
        tensors = await aiouffd.formats.load_gguf(buf)
        print(tensors.metadata["general.architecture"])
        await tensors.fetch("output_norm.weight")  # or touch it from a thread and wait there
        print(tensors["output_norm.weight"].mean())

Quantised tensors are blocks of bytes: arrays of uint8, of which the last axis is a row's blocks one
after the other, as ``gguf.dequantize(tensors[name], tensors.info[name].type)`` takes them.

Numbers of types, and how large their blocks are, are the package's (``pip install gguf``). A file
comes from strangers, and its counts are believed only as far as there are bytes.

.. _GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import reprlib
import struct
import sys
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from ..buffers.buffer import LazyBuffer
from ..buffers.sync import SyncBuffer
from ..errors import FormatError, UnsupportedError, UsageError
from ..util.extras import install_hint
from ..util.waiting import in_thread
from .named import Fetching, Named, SyncFetching

if TYPE_CHECKING:
    from ..buffers.arrays import Array

__all__ = [
    "GgufInfo",
    "GgufTensors",
    "SyncGgufTensors",
    "load_gguf",
    "load_gguf_sync",
]

T = TypeVar("T")

#: Longest header in bytes, most entries of the metadata, elements of its arrays, and tensors.
HEADER_MAX, ENTRIES_MAX, ELEMENTS_MAX, TENSORS_MAX = 256 << 20, 1 << 16, 1 << 22, 1 << 18
#: Longest name and longest text, in bytes; most axes, and most arrays within each other.
_NAME_MAX, _TEXT_MAX, _AXES_MAX, _NESTED_MAX = 65535, 16 << 20, 4, 4
#: Bytes of header that are read and parsed at a time.
_CHUNK = 256 * 1024
_ALIGNMENT_MAX = 1 << 30

#: Of values, by the names of their types: as struct and NumPy have them.
_SCALARS = {
    "UINT8": ("B", "u1"),
    "INT8": ("b", "i1"),
    "UINT16": ("H", "u2"),
    "INT16": ("h", "i2"),
    "UINT32": ("I", "u4"),
    "INT32": ("i", "i4"),
    "FLOAT32": ("f", "f4"),
    "BOOL": ("?", "?"),
    "UINT64": ("Q", "u8"),
    "INT64": ("q", "i8"),
    "FLOAT64": ("d", "f8"),
}
#: Types of tensors whose elements are numbers, and not blocks.
_NUMBERS = {
    "F16": "f2",
    "F32": "f4",
    "F64": "f8",
    "I8": "i1",
    "I16": "i2",
    "I32": "i4",
    "I64": "i8",
    "BF16": "bfloat16",
}

_short = reprlib.Repr()
_short.maxstring = 80


@dataclass(frozen=True, slots=True)
class GgufInfo:
    """What a file says of one tensor. Bytes ``offset`` to ``offset + length`` of the file."""

    name: str
    #: ``gguf.GGMLQuantizationType``: F32, Q4_K, ... An int, with a ``name``.
    type: Any
    #: Of its elements, and as NumPy has it: the axis whose elements lie together is the last one.
    shape: tuple[int, ...]
    offset: int
    length: int
    #: Of the array of bytes: the last axis has a row's blocks.
    byte_shape: tuple[int, ...]
    #: ``"<"``, or ``">"`` in a file for computers of the other kind.
    byte_order: str = "<"

    @property
    def quantized(self) -> bool:
        """Whether its elements are blocks, of whatever the type has in them."""
        return self.type.name not in _NUMBERS


@dataclass(frozen=True, slots=True)
class _Header:
    tensors: dict[str, GgufInfo]
    metadata: dict[str, Any]


# ----------------------------------------------------------------------- the header

_Parsing: TypeAlias = Generator[int, bytes, T]


class _Input:
    """The header as it arrives. Its methods are generators: they yield how many bytes more they
    need at least, and are sent some."""

    def __init__(self, size: int) -> None:
        self.order: Literal["<", ">"] = "<"
        #: Bytes of the file that were not sent yet.
        self._left = size
        self._data = b""
        self._at = 0
        self._elements = 0
        #: Of what was read.
        self.position = 0

    def take(self, length: int) -> _Parsing[bytes]:
        missing = self._at + length - len(self._data)
        if missing > self._left:
            raise FormatError(
                "the header goes on after the end of the file",
                hint="is it a GGUF file, and all of it?",
            )
        if self.position + length > HEADER_MAX:
            raise FormatError(f"its header is longer than {HEADER_MAX} bytes")
        if missing > 0:
            data = yield missing
            self._left -= len(data)
            self._data = self._data[self._at :] + data
            self._at = 0
        start = self._at
        self._at = end = start + length
        self.position += length
        return self._data[start:end]

    def scalar(self, kind: str) -> _Parsing[Any]:
        data = yield from self.take(struct.calcsize(self.order + kind))
        return struct.unpack(self.order + kind, data)[0]

    def text(self, longest: int = _TEXT_MAX) -> _Parsing[bytes]:
        length = yield from self.scalar("Q")
        if length > longest:
            raise FormatError(f"a text of {length} bytes is longer than {longest}")
        return (yield from self.take(length))

    def name(self) -> _Parsing[str]:
        data = yield from self.text(_NAME_MAX)
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise FormatError(f"the name {_short.repr(data)} is not UTF-8") from None

    def value(self, kind: Any, types: Any, depth: int = 0) -> _Parsing[Any]:
        if kind.name == "STRING":
            return _text((yield from self.text()))
        if kind.name != "ARRAY":
            return (yield from self.scalar(_SCALARS[kind.name][0]))
        if depth == _NESTED_MAX:
            raise FormatError(f"arrays within arrays, more than {_NESTED_MAX} deep")
        kind = _known(types, (yield from self.scalar("I")), "value")
        count = yield from self.scalar("Q")
        self._elements += count
        if self._elements > ELEMENTS_MAX:
            raise FormatError(f"its metadata has arrays of more than {ELEMENTS_MAX} elements")
        if kind.name == "STRING":
            return (yield from self._texts(count))
        if kind.name == "ARRAY":
            values = []
            for _ in range(count):
                values.append((yield from self.value(kind, types, depth + 1)))
            return values
        import numpy

        dtype = numpy.dtype(_SCALARS[kind.name][1]).newbyteorder(self.order)
        return numpy.frombuffer((yield from self.take(count * dtype.itemsize)), dtype)

    def _texts(self, count: int) -> _Parsing[list[str]]:
        """As `text`, and quick: a vocabulary has hundreds of thousands."""
        texts: list[str] = []
        length_at = struct.Struct(self.order + "Q").unpack_from
        while len(texts) < count:
            data, at, end = self._data, self._at, len(self._data)
            while len(texts) < count and at + 8 <= end:
                start = at + 8
                (length,) = length_at(data, at)
                if length > end - start:
                    break
                at = start + length
                texts.append(_text(data[start:at]))
            self.position += at - self._at
            self._at = at
            if len(texts) < count:
                texts.append(_text((yield from self.text())))
        return texts


def _text(data: bytes) -> str:
    # Tokens of some vocabularies are parts of characters.
    return data.decode("utf-8", "surrogateescape")


def _known(types: Any, number: int, what: str) -> Any:
    try:
        return types(number)
    except ValueError:
        raise UnsupportedError(
            f"there is a {what} of type {number}, which this version of gguf does not know",
            hint="pip install --upgrade gguf",
        ) from None


def _parse(size: int, gguf: Any) -> _Parsing[_Header]:
    """What a file of ``size`` bytes says of itself. Yields how many bytes it needs, at least, from
    where it was; is sent those and as many more as there may be."""
    given = _Input(size)
    if size < 4 or (yield from given.take(4)) != b"GGUF":
        raise FormatError("it does not begin as a GGUF file", hint="is it one?")
    version = yield from given.scalar("I")
    if version & 0xFFFF == 0:
        given.order = ">"
        version = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in (2, 3):
        raise UnsupportedError(
            f"GGUF of version {version} is not known", hint="versions 2 and 3 are"
        )
    tensor_count = yield from given.scalar("Q")
    entry_count = yield from given.scalar("Q")
    if entry_count > ENTRIES_MAX:
        raise FormatError(f"{entry_count} entries of metadata are more than {ENTRIES_MAX}")
    if tensor_count > TENSORS_MAX:
        raise FormatError(f"{tensor_count} tensors are more than {TENSORS_MAX}")
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = yield from given.name()
        if key in metadata:
            raise FormatError(f"{_short.repr(key)} comes twice in the metadata")
        kind = _known(gguf.GGUFValueType, (yield from given.scalar("I")), "value")
        metadata[key] = yield from given.value(kind, gguf.GGUFValueType)
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or not 0 < alignment <= _ALIGNMENT_MAX
        or alignment & (alignment - 1)
    ):
        raise FormatError(f"an alignment of {_short.repr(alignment)} is no power of two")
    found: dict[str, GgufInfo] = {}
    for _ in range(tensor_count):
        info = yield from _tensor(given, gguf, alignment)
        if info.name in found:
            raise FormatError(f"there are two tensors called {_short.repr(info.name)}")
        found[info.name] = info
    return _Header(_placed(found, -(-given.position // alignment) * alignment, size), metadata)


def _tensor(given: _Input, gguf: Any, alignment: int) -> _Parsing[GgufInfo]:
    """One tensor, whose offset is from the beginning of the data on."""
    name = yield from given.name()

    def wrong(what: str) -> FormatError:
        return FormatError(f"the tensor {_short.repr(name)} {what}")

    axes = yield from given.scalar("I")
    if axes > _AXES_MAX:
        raise wrong(f"has {axes} dimensions")
    sides = []
    for _ in range(axes):
        sides.append((yield from given.scalar("Q")))
    kind = _known(gguf.GGMLQuantizationType, (yield from given.scalar("I")), "tensor")
    offset = yield from given.scalar("Q")
    shape = tuple(reversed(sides))
    block, item = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    if row % block:
        raise wrong(f"has rows of {row} elements, and {kind.name} has blocks of {block}")
    # Without zeros: no array has sides that are longer, even an empty one.
    if math.prod((item, *(side or 1 for side in shape))) > sys.maxsize:
        raise wrong(f"has the shape {_short.repr(shape)}: too large")
    if offset % alignment:
        raise wrong(f"is at {offset}, which is not aligned to {alignment}")
    byte_shape = (*shape[:-1], row // block * item)
    return GgufInfo(name, kind, shape, offset, math.prod(byte_shape), byte_shape, given.order)


def _placed(found: Mapping[str, GgufInfo], base: int, size: int) -> dict[str, GgufInfo]:
    """With offsets from the beginning of the file on, in order; without overlaps."""
    placed: dict[str, GgufInfo] = {}
    at, before = 0, ""
    for info in sorted(found.values(), key=lambda info: (info.offset, info.length)):
        if info.offset < at:
            raise FormatError(f"{before} and {_short.repr(info.name)} overlap")
        at, before = info.offset + info.length, _short.repr(info.name)
        if base + at > size:
            raise FormatError(
                f"the tensor {before} ends at byte {base + at}, and the file has {size}",
                hint="it was cut short",
            )
        placed[info.name] = GgufInfo(
            info.name, info.type, info.shape, base + info.offset, info.length, info.byte_shape,
            info.byte_order,
        )  # fmt: skip
    return placed


# ---------------------------------------------------------------------- over buffers


class _GgufTensors(Named["Array", GgufInfo]):
    _what = "tensors"

    def __init__(self, parts: Iterable[tuple[Any, _Header]]) -> None:
        info: dict[str, GgufInfo] = {}
        buffers: dict[str, Any] = {}
        metadata: dict[str, Any] = {}
        for buffer, header in parts:
            for name, tensor in header.tensors.items():
                if name in info:
                    raise FormatError(f"{_short.repr(name)} is in two of the files")
                info[name], buffers[name] = tensor, buffer
            metadata = {**header.metadata, **metadata}
        super().__init__(info, buffers)
        self._metadata = MappingProxyType(metadata)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the file says of the model. Text is str, in which bytes that are not UTF-8 are
        escaped ("surrogateescape"); arrays of numbers are NumPy's, others lists. Of several files
        the first that has a key counts."""
        return self._metadata

    def __getitem__(self, name: str) -> Array:
        """The tensor as an array over the buffer's memory; fetches nothing.

        Numbers as they are (bfloat16 by ml_dtypes), blocks as bytes: see `raw`. Read-only unless
        the buffer is writable; it holds the memory. Raises KeyError, ClosedError, and UsageError
        for bfloat16 without ml_dtypes.
        """
        info = self._info[name]
        if info.quantized:
            return self.raw(name)
        array: Array = self._buffers[name].array(_NUMBERS[info.type.name], info.shape, info.offset)
        if info.byte_order == ">":
            array = array.view(array.dtype.newbyteorder(">"))
        return array

    def raw(self, name: str) -> Array:
        """Its bytes, in ``info[name].byte_shape``: what ``gguf.dequantize`` takes, of any type.
        Otherwise as ``tensors[name]``."""
        info = self._info[name]
        array: Array = self._buffers[name].array("u1", info.byte_shape, info.offset)
        return array


class GgufTensors(_GgufTensors, Fetching["Array", GgufInfo]):
    """The tensors of GGUF files by name. Made by `load_gguf`. Any thread, but for `fetch`."""


class SyncGgufTensors(_GgufTensors, SyncFetching["Array", GgufInfo]):
    """The tensors of GGUF files by name. Made by `load_gguf_sync`. Any thread."""


async def load_gguf(buffer: LazyBuffer, *more: LazyBuffer) -> GgufTensors:
    """The tensors of a GGUF file, or of a model's several files, by name. Reads headers alone.

    On the buffers' loop; never faults. Versions 2 and 3, of either byte order. Raises FormatError
    for what is no such file, or one that is damaged or cut short; UnsupportedError without the gguf
    package, and for types that it does not know; and what `LazyBuffer.read` raises.
    """
    buffers = _checked((buffer, *more), LazyBuffer, "load_gguf takes buffers of aiouffd.open")
    return GgufTensors(zip(buffers, await _read_headers(buffers), strict=True))


def load_gguf_sync(buffer: SyncBuffer, *more: SyncBuffer) -> SyncGgufTensors:
    """`load_gguf` for buffers of `aiouffd.sync`; blocks. Any thread."""
    buffers = _checked(
        (buffer, *more), SyncBuffer, "load_gguf_sync takes buffers of aiouffd.sync.open"
    )
    headers = buffer._run(_read_headers([given._buffer for given in buffers]))
    return SyncGgufTensors(zip(buffers, headers, strict=True))


def _checked(buffers: tuple[T, ...], kind: type, what: str) -> tuple[T, ...]:
    if not all(isinstance(buffer, kind) for buffer in buffers):
        raise UsageError(what)
    return buffers


async def _read_headers(buffers: Iterable[LazyBuffer]) -> list[_Header]:
    # It imports much.
    gguf = await in_thread(_package, "aiouffd-import")
    return [await _read_header(buffer, gguf) for buffer in buffers]


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        raise UnsupportedError(
            "reading GGUF needs the gguf package", hint=install_hint("gguf")
        ) from None
    return gguf


async def _read_header(buffer: LazyBuffer, gguf: Any) -> _Header:
    size, at = len(buffer), 0
    parser = _parse(size, gguf)
    try:
        wanted = next(parser)
        while True:
            length = min(max(wanted, _CHUNK), size - at)
            data = await buffer.read(at, length)
            at += length
            wanted = parser.send(data)
    except StopIteration as done:
        header: _Header = done.value
        return header
