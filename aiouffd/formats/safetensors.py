"""The tensors of safetensors files, as arrays over lazy buffers.

The ``safetensors`` library wants a file's bytes before it shows a tensor. Here only the header is
read, with ``await``; each tensor is a NumPy array over the buffer's memory, of which nothing is
fetched until it is touched::

    async with aiouffd.open("https://host/model.safetensors") as buf:
        tensors = await aiouffd.safetensors.load(buf)
        await tensors.fetch("layers.0.weight")      # or touch it from a thread and wait there
        print(tensors["layers.0.weight"].mean())

        tensors = await aiouffd.safetensors.load(buf, framework="torch")
        model.load_state_dict(tensors, assign=True)  # a model on "meta": fetches nothing

A file is eight bytes with the length of its header, the header in JSON, and the data, which the
tensors cover from its first byte to its last without gaps::

    {"__metadata__": {"format": "pt"},
     "layers.0.weight": {"dtype": "F32", "shape": [64, 64], "data_offsets": [0, 16384]}}

Files come from strangers, so everything that a header says is checked before anything relies on
it, as strictly as the library does and a little more. The values of tensors are not looked at.

Parsing needs the standard library alone; arrays need NumPy, and those of bfloat16 and eight-bit
floats ml_dtypes (the extra ``safetensors``).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import reprlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, overload

from ..buffers.buffer import LazyBuffer
from ..buffers.sync import SyncBuffer
from ..errors import FormatError, UnsupportedError, UsageError
from ..util.extras import install_hint
from ..util.json_pieces import JsonPieces
from ..util.waiting import in_thread
from .named import Fetching, Named, SyncFetching

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]

__all__ = [
    "FormatError",
    "Header",
    "SyncTensors",
    "TensorInfo",
    "Tensors",
    "load",
    "load_shards",
    "load_shards_sync",
    "load_sync",
    "parse_header",
    "parse_index",
]

T = TypeVar("T")
#: Whose arrays they are.
Framework: TypeAlias = Literal["numpy", "torch"]

#: Longest header, in bytes; the library has the same limit. An index may be as long.
HEADER_MAX = 100_000_000
#: Most tensors of a file, and of an index. (The largest models have a hundred thousand in all.)
TENSORS_MAX, INDEX_MAX = 1 << 18, 1 << 20
#: Longest name, description of a tensor, and value of the metadata, in bytes.
_NAME_MAX, _ENTRY_MAX, _VALUE_MAX = 16 * 1024, 64 * 1024, 16 << 20
#: Bytes of header from which on parsing leaves the loop's thread.
_INLINE = 32 * 1024
#: Files that `load` reads and parses at a time.
_AT_A_TIME = 4
#: Longest path of a file in an index.
_PATH_MAX = 1024
#: Most bytes, and most dimensions, of an array in any library.
_ARRAY_MAX, _DIMENSIONS_MAX = (1 << 63) - 1, 64
_PREFIX = 8

#: Bits of one element.
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}

#: What torch calls them.
_TORCH = {
    "BOOL": "bool",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "U8": "uint8",
    "I8": "int8",
    "C64": "complex64",
    **_ML_DTYPES,
}

# Names and values of strangers may be long, and these end up in messages.
_short = reprlib.Repr()
_short.maxstring = 80


# ----------------------------------------------------------------------- the header


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor. Bytes ``offset`` to ``offset + length`` of the file."""

    name: str
    #: As the format calls it: ``"F32"``, ``"BF16"``, ...
    dtype: str
    shape: tuple[int, ...]
    #: Of the first byte, from the beginning of the file; aligned to nothing.
    offset: int
    length: int

    def array(self, memory: Any) -> Array:
        """The tensor as an array over ``memory``, which holds the whole file; touches nothing.

        It can be written to if ``memory`` can. Raises UnsupportedError if NumPy, or ml_dtypes for
        a type that NumPy lacks, is not installed, and for F4 and F6, which neither has.
        """
        if self.dtype in _NUMPY:
            return _array(memory, self.offset, self.shape, _NUMPY[self.dtype])
        if self.dtype not in _ML_DTYPES:
            raise UnsupportedError(
                f"{_short.repr(self.name)} is {self.dtype}, whose elements are parts of bytes:"
                " NumPy has no such arrays",
                hint="raw() gives the bytes",
            )
        try:
            import ml_dtypes

            dtype = getattr(ml_dtypes, _ML_DTYPES[self.dtype])
        except (ImportError, AttributeError) as error:
            raise UnsupportedError(
                f"{_short.repr(self.name)} is {self.dtype}, which NumPy lacks",
                hint="pip install 'ml_dtypes>=0.5', or use raw(): the bits as unsigned integers",
            ) from error
        return _array(memory, self.offset, self.shape, dtype)

    def raw(self, memory: Any) -> Array:
        """The bits of the elements as unsigned integers of their size; otherwise as `array`.

        In the tensor's shape, but for F4 and F6: those are one flat array of bytes.
        """
        bits = _BITS[self.dtype]
        if bits < 8:
            return _array(memory, self.offset, (self.length,), "u1")
        return _array(memory, self.offset, self.shape, f"<u{bits // 8}")


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors, in the order of their data, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def _array(memory: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Array:
    try:
        import numpy
    except ImportError as error:
        raise UnsupportedError("arrays need NumPy", hint=install_hint("safetensors")) from error
    # Looks at no element; checks that all are within the memory.
    return numpy.ndarray(shape, dtype, buffer=memory, offset=offset)


def _header_end(prefix: Any, size: int) -> int:
    """Where the header ends in a file of ``size`` bytes that begins with ``prefix``."""
    if size < _PREFIX:
        raise FormatError(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(prefix[:_PREFIX], "little")
    if length > HEADER_MAX:
        raise FormatError(
            f"a header of {length} bytes is longer than the format allows",
            hint="is it a safetensors file at all?",
        )
    if _PREFIX + length > size:
        raise FormatError(
            f"the header's {length} bytes are not within a file of {size} bytes",
            hint="is it a safetensors file, and all of it?",
        )
    return _PREFIX + length


def parse_header(data: Any, size: int | None = None) -> Header:
    """Read and check the header of a file of ``size`` bytes.

    :param data: bytes, or plain memory: the file from its first byte on, at least to
        the end of the header.
    :param size: length of the whole file in bytes; that of ``data`` by default.

    Raises FormatError for anything but a header that describes the file completely, and for one
    with more than 262,144 tensors, names of more than 16 KiB, or a value in the metadata of more
    than 16 MiB. Any thread; others run meanwhile.
    """
    with memoryview(data) as memory, memory.cast("B") as given:
        size = given.nbytes if size is None else size
        end = _header_end(given, size)
        if end > given.nbytes:
            raise UsageError(f"the header has {end} bytes, only {given.nbytes} of them were given")
        tensors, metadata = _read(given[_PREFIX:end], end)
    found = sorted(tensors.values(), key=lambda info: (info.offset, info.length))
    _check_covered(found, end, size)
    return Header({info.name: info for info in found}, metadata)


def _read(text: memoryview, base: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What the header ``text`` says; the data begins at byte ``base``."""
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    with _json(text, "header") as pieces:
        for name in pieces.members(_NAME_MAX):
            _check_new(name, name in tensors or (metadata is not None and name == _METADATA))
            if name == _METADATA:
                metadata = _read_metadata(pieces)
            else:
                tensors[name] = _tensor(name, pieces.value(_ENTRY_MAX), base)
            if len(tensors) > TENSORS_MAX:
                raise FormatError(f"it has more than {TENSORS_MAX} tensors")
        pieces.end()
    return tensors, metadata or {}


def _read_metadata(pieces: JsonPieces) -> dict[str, str]:
    metadata: dict[str, str] = {}
    if not pieces.is_object():
        if pieces.value(_ENTRY_MAX) is not None:
            raise FormatError("__metadata__ is not a map from text to text")
        return metadata
    for name in pieces.members(_NAME_MAX):
        _check_new(name, name in metadata)
        value = pieces.value(_VALUE_MAX)
        if not isinstance(value, str):
            raise FormatError("__metadata__ is not a map from text to text")
        _check_text(value)
        metadata[name] = value
    return metadata


@contextlib.contextmanager
def _json(text: Any, what: str) -> Iterator[JsonPieces]:
    """A JSON object. What JSON leaves to its readers (duplicates, NaN) is an error."""
    if bytes(text[:1]) != b"{":
        raise FormatError(f"the {what} is not a JSON object", hint="is it a safetensors file?")

    def wrong(message: str) -> FormatError:
        return FormatError(f"the {what} is not JSON, or not as it should be: {message}")

    try:
        yield JsonPieces(text, _DECODER, wrong)
    except FormatError:
        raise
    except ValueError as error:  # a number of many digits
        raise wrong(str(error)) from error


def _check_new(name: str, known: bool) -> None:
    _check_text(name)
    if known:
        raise FormatError(f"{_short.repr(name)} comes twice in the header")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        _check_new(name, name in fields)
        fields[name] = value
    return fields


def _no_constant(text: str) -> None:
    raise FormatError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
_METADATA = "__metadata__"


def _check_text(text: str) -> None:
    """JSON's escapes can spell halves of characters, which no other program could write down."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise FormatError(f"{_short.repr(text)} is not valid text") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _ARRAY_MAX


def _tensor(name: str, entry: Any, base: int) -> TensorInfo:
    """Check what the header says of one tensor by itself; the data begins at byte ``base``."""

    def wrong(what: str, hint: str | None = None) -> FormatError:
        return FormatError(f"{_short.repr(name)} {what}", hint=hint)

    if not isinstance(entry, dict):
        raise wrong("is not described by a JSON object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise wrong(f"has the unknown dtype {_short.repr(dtype)}", f"known are {', '.join(_BITS)}")
    if isinstance(shape, list) and len(shape) > _DIMENSIONS_MAX:
        raise wrong(f"has {len(shape)} dimensions")
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise wrong(f"has the shape {_short.repr(shape)}: not a list of sizes")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_count, offsets))):
        raise wrong(f"has the data_offsets {_short.repr(offsets)}: not a begin and an end")
    # Without zeros: no library has an array whose other sides are that long, even an empty one.
    bits = _BITS[dtype] * math.prod(length or 1 for length in shape)
    if bits > 8 * _ARRAY_MAX:
        raise wrong(f"has the shape {_short.repr(shape)}: too large")
    if 0 in shape:
        bits = 0
    if bits % 8:
        raise wrong(f"ends within a byte: it has {bits} bits")
    start, end = offsets
    if end - start != bits // 8:
        raise wrong(
            f"has {dtype} of shape {_short.repr(shape)}, which is {bits // 8} bytes,"
            f" but data_offsets {start} to {end}"
        )
    return TensorInfo(name, dtype, tuple(shape), base + start, end - start)


def _check_covered(tensors: list[TensorInfo], base: int, size: int) -> None:
    """The data is covered once: no overlaps, no holes for anybody to hide something in."""
    at, before = base, "the header"
    for info in tensors:
        if info.offset != at:
            what = "overlap" if info.offset < at else "leave a hole between them"
            raise FormatError(f"{before} and {_short.repr(info.name)} {what}")
        at, before = info.offset + info.length, _short.repr(info.name)
    if at > size:
        raise FormatError(
            f"the file has {size} bytes, its tensors need {at}", hint="it was cut short"
        )
    if at < size:
        raise FormatError(f"{size - at} bytes after the last tensor belong to none")


def parse_index(text: bytes | str) -> dict[str, str]:
    """Which file has which tensor: what a ``model.safetensors.index.json`` says.

    Gives for each name of a tensor the path of a file, relative to the index's own folder and with
    ``/`` between folders, so that only files that are needed have to be opened; `load_shards` takes
    both. Raises FormatError for anything else, for paths that would lead out of that folder, and
    for more than 1,048,576 tensors. Any thread; others run meanwhile.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > HEADER_MAX:
        raise FormatError(f"an index of {len(data)} bytes is too long")
    files: dict[str, str] | None = None
    #: Each path once, however many tensors its file has.
    paths: dict[str, str] = {}
    with _json(data, "index") as pieces:
        for field in pieces.members(_NAME_MAX):
            if field != "weight_map":
                pieces.value(_VALUE_MAX)
                continue
            if files is not None or not pieces.is_object():
                break
            files = {}
            for name in pieces.members(_NAME_MAX):
                _check_new(name, name in files)
                path = pieces.value(_ENTRY_MAX)
                if not isinstance(path, str) or not (path in paths or _is_inside(path)):
                    raise FormatError(
                        f"{_short.repr(path)} in the weight_map is not the name of a file in or"
                        " below the index's folder"
                    )
                files[name] = paths.setdefault(path, path)
                if len(files) > INDEX_MAX:
                    raise FormatError(f"it has more than {INDEX_MAX} tensors")
        else:
            pieces.end()
            if files is not None:
                return files
    raise FormatError("there is no weight_map", hint="is it an index of safetensors files?")


def _is_inside(path: str) -> bool:
    """Whether it means a file of the same folder or of one below, as a path and as a URL."""
    return len(path) <= _PATH_MAX and all(map(_is_plain, path.split("/")))


def _is_plain(name: str) -> bool:
    """Whether it is the name of a file or a folder, as a path and as a URL."""
    return name.isprintable() and name[:1] not in ("", ".", " ") and not set(name) & set("/\\:?#%")


# ---------------------------------------------------------------------- over buffers


class _Tensors(Named[T, TensorInfo]):
    """Names to tensors, over one buffer or several. Immutable; any thread."""

    _what = "tensors"

    def __init__(self, parts: Iterable[tuple[Any, Header]], framework: Framework = "numpy") -> None:
        info: dict[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        buffers: dict[str, Any] = {}
        for buffer, header in parts:
            for name in header.tensors:
                if name in info:
                    raise FormatError(
                        f"{_short.repr(name)} is in two of the files",
                        hint="which of them counts an index says: see load_shards",
                    )
                buffers[name] = buffer
            info.update(header.tensors)
            metadata = {**header.metadata, **metadata}
        super().__init__(info, buffers)
        self._framework = framework
        # Not `_metadata`: load_state_dict looks for that, and takes it for one of torch's own.
        self._described = MappingProxyType(metadata)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's ``__metadata__``. Of several files the first that has a key counts."""
        return self._described

    def __getitem__(self, name: str) -> T:
        """The tensor as an array over the buffer's memory, or as a tensor of torch, as `load` was
        asked for; fetches nothing.

        An array is read-only unless the buffer is ``writable``; of a tensor of torch see
        `LazyBuffer.tensor`. Both hold the memory. Raises KeyError, UnsupportedError for what
        the framework lacks, ClosedError.
        """
        info, buffer = self._info[name], self._buffers[name]
        if self._framework == "torch":
            return _of_torch(buffer, info)  # type: ignore[return-value]
        return info.array(buffer.view)  # type: ignore[return-value]

    def raw(self, name: str) -> Array:
        """The bits of a tensor as unsigned integers: see `TensorInfo.raw`. Fetches nothing."""
        info = self._info[name]
        return info.raw(self._buffers[name].view)


def _of_torch(buffer: Any, info: TensorInfo) -> torch.Tensor:
    dtype = _TORCH.get(info.dtype)
    if dtype is None:
        raise UnsupportedError(
            f"{_short.repr(info.name)} is {info.dtype}, whose elements are parts of bytes",
            hint="raw() gives the bytes",
        )
    tensor: torch.Tensor = buffer.tensor(dtype, info.shape, info.offset)
    return tensor


class Tensors(_Tensors[T], Fetching[T, TensorInfo]):
    """The tensors of one or several lazy buffers, by name. Made by `load`.

    A mapping of names to arrays. Immutable; everything but `fetch` works from any thread.
    """


class SyncTensors(_Tensors[T], SyncFetching[T, TensorInfo]):
    """The tensors of buffers of `aiouffd.sync`, by name. Made by `load_sync`.

    A mapping of names to arrays. Immutable; any thread.
    """


async def _read_headers(buffers: Iterable[LazyBuffer]) -> list[Header]:
    """Read and parse, a few at a time: each may have a hundred megabytes."""
    turn = asyncio.Semaphore(_AT_A_TIME)

    async def read(buffer: LazyBuffer) -> Header:
        async with turn:
            return await _read_header(buffer)

    return await asyncio.gather(*map(read, buffers))


async def _read_header(buffer: LazyBuffer) -> Header:
    size = len(buffer)
    prefix = await buffer.read(0, min(_PREFIX, size))
    data = await buffer.read(0, _header_end(prefix, size))
    if len(data) <= _INLINE:
        return parse_header(data, size)
    return await in_thread(lambda: parse_header(data, size), "aiouffd-header")


@overload
async def load(
    buffer: LazyBuffer, *more: LazyBuffer, framework: Literal["numpy"] = ...
) -> Tensors[Array]: ...


@overload
async def load(
    buffer: LazyBuffer, *more: LazyBuffer, framework: Literal["torch"]
) -> Tensors[torch.Tensor]: ...


async def load(
    buffer: LazyBuffer, *more: LazyBuffer, framework: Framework = "numpy"
) -> Tensors[Any]:
    """The tensors of a safetensors file, or of several as one mapping. Reads the headers alone.

    With ``framework="torch"`` they are tensors of torch, and the mapping is a state dict:
    ``model.load_state_dict(tensors, assign=True)`` fetches nothing.

    On the buffers' loop. Never faults. Raises FormatError for what is not a safetensors file, and
    for a tensor that is in two files; and what `LazyBuffer.read` raises.
    """
    _check_framework(framework)
    buffers = _checked((buffer, *more), LazyBuffer, "load", "aiouffd.open")
    return Tensors(zip(buffers, await _read_headers(buffers), strict=True), framework)


@overload
def load_sync(
    buffer: SyncBuffer, *more: SyncBuffer, framework: Literal["numpy"] = ...
) -> SyncTensors[Array]: ...


@overload
def load_sync(
    buffer: SyncBuffer, *more: SyncBuffer, framework: Literal["torch"]
) -> SyncTensors[torch.Tensor]: ...


def load_sync(
    buffer: SyncBuffer, *more: SyncBuffer, framework: Framework = "numpy"
) -> SyncTensors[Any]:
    """`load` for buffers of `aiouffd.sync`; blocks. Any thread."""
    _check_framework(framework)
    buffers = _checked((buffer, *more), SyncBuffer, "load_sync", "aiouffd.sync.open")
    headers = buffer._run(_read_headers([given._buffer for given in buffers]))
    return SyncTensors(zip(buffers, headers, strict=True), framework)


@overload
async def load_shards(
    weight_map: Mapping[str, str],
    buffers: Mapping[str, LazyBuffer],
    *,
    framework: Literal["numpy"] = ...,
) -> Tensors[Array]: ...


@overload
async def load_shards(
    weight_map: Mapping[str, str],
    buffers: Mapping[str, LazyBuffer],
    *,
    framework: Literal["torch"],
) -> Tensors[torch.Tensor]: ...


async def load_shards(
    weight_map: Mapping[str, str],
    buffers: Mapping[str, LazyBuffer],
    *,
    framework: Framework = "numpy",
) -> Tensors[Any]:
    """The tensors of a model in several files, each from the file that the index names for it.

    :param weight_map: what `parse_index` gave.
    :param buffers: for each file, as the index calls it, its buffer. Files that are not needed may
        be left out, and with them their tensors.
    :param framework: see `load`.

    What a file has beside the tensors that the index looks for in it does not count: a tensor may
    be in several files. Otherwise as `load`; raises FormatError also for a file that lacks what the
    index looks for in it, and UsageError for a file that the index does not name.
    """
    _check_framework(framework)
    _checked(buffers.values(), LazyBuffer, "load_shards", "aiouffd.open")
    wanted = _wanted(weight_map, buffers)
    headers = await _read_headers(buffers.values())
    return Tensors(_shards(wanted, buffers, headers), framework)


@overload
def load_shards_sync(
    weight_map: Mapping[str, str],
    buffers: Mapping[str, SyncBuffer],
    *,
    framework: Literal["numpy"] = ...,
) -> SyncTensors[Array]: ...


@overload
def load_shards_sync(
    weight_map: Mapping[str, str],
    buffers: Mapping[str, SyncBuffer],
    *,
    framework: Literal["torch"],
) -> SyncTensors[torch.Tensor]: ...


def load_shards_sync(
    weight_map: Mapping[str, str],
    buffers: Mapping[str, SyncBuffer],
    *,
    framework: Framework = "numpy",
) -> SyncTensors[Any]:
    """`load_shards` for buffers of `aiouffd.sync`; blocks. Any thread."""
    _check_framework(framework)
    _checked(buffers.values(), SyncBuffer, "load_shards_sync", "aiouffd.sync.open")
    wanted = _wanted(weight_map, buffers)
    if not buffers:
        return SyncTensors(())
    given = list(buffers.values())
    headers = given[0]._run(_read_headers([buffer._buffer for buffer in given]))
    return SyncTensors(_shards(wanted, buffers, headers), framework)


def _check_framework(framework: Framework) -> None:
    if framework not in ("numpy", "torch"):
        raise UsageError(f"framework is 'numpy' or 'torch', not {framework!r}")


def _checked(buffers: Collection[T], kind: type[T], name: str, of: str) -> Collection[T]:
    if not all(isinstance(buffer, kind) for buffer in buffers):
        others = name.removesuffix("_sync") if name.endswith("_sync") else f"{name}_sync"
        raise UsageError(f"{name} takes buffers of {of}", hint=f"for others: {others}")
    return buffers


def _wanted(weight_map: Mapping[str, str], files: Iterable[str]) -> dict[str, list[str]]:
    """The names of tensors by file."""
    wanted: dict[str, list[str]] = {file: [] for file in files}
    for name, file in weight_map.items():
        if file in wanted:
            wanted[file].append(name)
    for file, names in wanted.items():
        if not names:
            raise UsageError(
                f"the index names no file {_short.repr(file)}",
                hint="files are called by their paths from the index's folder on",
            )
    return wanted


def _shards(
    wanted: Mapping[str, list[str]], buffers: Mapping[str, T], headers: Iterable[Header]
) -> Iterator[tuple[T, Header]]:
    """Buffers, with what counts in them."""
    for (file, buffer), header in zip(buffers.items(), headers, strict=True):
        for name in wanted[file]:
            if name not in header.tensors:
                raise FormatError(
                    f"{_short.repr(name)} is not in {_short.repr(file)}, as the index says"
                )
        names = set(wanted[file])
        tensors = {name: info for name, info in header.tensors.items() if name in names}
        yield buffer, Header(tensors, header.metadata)
