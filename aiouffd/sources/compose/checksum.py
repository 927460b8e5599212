"""Checksums per block: a bad block is fetched again, then an error, and never delivered.

A manifest file, version 1, all numbers in text, no padding:

    ``aiouffd-manifest 1\\n``
    one line of JSON: ``size``, ``block_size`` (bytes), ``algorithm``, ``version`` (text or null)
    the digests of the blocks, binary, in order; the last block may be short
    32 bytes: the SHA-256 of everything before
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import json
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ...errors import SourceChangedError, SourceError, UnsupportedError, UsageError
from ...util.extras import install_hint
from ...util.places import replace_file
from .. import as_source
from ..base import Buffer, aclose_source, check_length, check_range, open_source
from ..lifecycle import run_in_thread, submitted
from .wrapper import Wrapper

__all__ = ["ALGORITHMS", "ChecksumError", "ChecksumSource", "Manifest", "digest_function"]

MAGIC = b"aiouffd-manifest 1\n"
#: Digest sizes in bytes.
ALGORITHMS = {"crc32": 4, "crc32c": 4, "blake3": 32, "blake2b": 32, "sha256": 32}
#: Bytes from which on hashing leaves the loop's thread.
INLINE = 128 * 1024
#: Longest header, file, and block, in bytes: manifests come from strangers too, and a block is
#: fetched whole. (A file of this length has the digests of 64 GiB in blocks of 4 KiB.)
_HEAD_MAX, _FILE_MAX, _BLOCK_MAX = 64 * 1024, 512 << 20, 64 << 20

Digest = Callable[[Any], bytes]


class ChecksumError(SourceError):
    """Bytes that do not have the checksum they should have, also when fetched again."""

    def __init__(self, message: str) -> None:
        super().__init__(message, transient=False)


def digest_function(algorithm: str) -> Digest:
    """The function from a buffer to its digest. All of them release the GIL for large ones.

    Raises UsageError for an unknown name, UnsupportedError if a library is missing.
    """
    if algorithm == "crc32":
        return lambda data: zlib.crc32(data).to_bytes(4, "big")
    if algorithm == "sha256":
        return lambda data: hashlib.sha256(data).digest()
    if algorithm == "blake2b":
        return lambda data: hashlib.blake2b(data, digest_size=32).digest()
    if algorithm not in ALGORITHMS:
        raise UsageError(f"unknown checksum {algorithm!r}; known are {', '.join(ALGORITHMS)}")
    try:
        module = importlib.import_module(algorithm)
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"checksums by {algorithm} need a library", hint=install_hint("checksum")
        ) from error
    if algorithm == "crc32c":
        function = module.crc32c
        return lambda data: int(function(data)).to_bytes(4, "big")
    hasher = module.blake3
    return lambda data: bytes(hasher(data).digest())


@dataclass(frozen=True, slots=True)
class Manifest:
    """The checksums of an object's blocks. Sizes in bytes."""

    size: int
    block_size: int
    algorithm: str
    digests: bytes
    version: str | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise UsageError(f"unknown checksum {self.algorithm!r}")
        if self.size < 0 or self.block_size < 1:
            raise UsageError("a manifest needs a size and a block size")
        if self.block_size > _BLOCK_MAX and self.size > _BLOCK_MAX:
            raise UsageError(
                f"blocks of {self.block_size} bytes are too long to be fetched for one of them",
                hint=f"make the manifest with a block size of at most {_BLOCK_MAX}",
            )
        if len(self.digests) != self.blocks * ALGORITHMS[self.algorithm]:
            raise UsageError("a manifest needs one checksum for each block")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return -(-self.size // self.block_size)

    @property
    def name(self) -> str:
        """What tells it from other manifests: 32 hexadecimal digits of its SHA-256."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    def digest(self, block: int) -> bytes:
        """The checksum of one block."""
        width = ALGORITHMS[self.algorithm]
        return self.digests[block * width : (block + 1) * width]

    @classmethod
    async def make(
        cls, source: Any, *, block_size: int = 1 << 20, algorithm: str = "blake3", **options: Any
    ) -> Manifest:
        """Read all of ``source`` and make its manifest; opens and closes it."""
        digest = digest_function(algorithm)
        given = as_source(source, **options)
        await open_source(given)
        try:
            size = given.size
            digests = bytearray()
            with ThreadPoolExecutor(1, "aiouffd-hash") as executor:
                loop = asyncio.get_running_loop()
                for offset in range(0, size, block_size):
                    length = min(block_size, size - offset)
                    data = check_length(await given.read(offset, length), length, offset=offset)
                    digests += await loop.run_in_executor(executor, digest, data)
            version = getattr(given, "version", None)
            return cls(size, block_size, algorithm, bytes(digests), version)
        finally:
            await aclose_source(given)

    def to_bytes(self) -> bytes:
        """The manifest as a file."""
        header = {
            "size": self.size,
            "block_size": self.block_size,
            "algorithm": self.algorithm,
            "version": self.version,
        }
        body = MAGIC + json.dumps(header).encode() + b"\n" + self.digests
        return body + hashlib.sha256(body).digest()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest file's contents. Raises UsageError if anything is wrong with them."""
        if not data.startswith(MAGIC):
            raise UsageError("not a manifest of aiouffd, version 1")
        body, seal = data[:-32], data[-32:]
        if hashlib.sha256(body).digest() != seal:
            raise UsageError("the manifest is damaged")
        line, end, digests = body[len(MAGIC) :].partition(b"\n")
        if not end or len(line) > _HEAD_MAX:
            raise UsageError("the manifest's header is too long")
        try:
            header = json.loads(line)
            size, block_size = header["size"], header["block_size"]
            algorithm, version = header["algorithm"], header.get("version")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError("the manifest's header cannot be read") from error
        numbers = type(size) is int and type(block_size) is int
        if not numbers or not isinstance(algorithm, str) or not isinstance(version, str | None):
            raise UsageError("the manifest's header has a value of the wrong kind")
        return cls(size, block_size, algorithm, digests, version)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; it appears complete or not at all."""
        replace_file(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read a file that `save` wrote."""
        with open(path, "rb") as file:
            data = file.read(_FILE_MAX + 1)
        return cls.from_bytes(_check_length(data, len(data)))

    @classmethod
    async def fetch(cls, source: Any, **options: Any) -> Manifest:
        """Read the file from a URL, or from anything that is a source; opens and closes it."""
        given = as_source(source, **options)
        await open_source(given)
        try:
            _check_length(b"", given.size)
            data = bytes(await given.read(0, given.size))
            if len(data) <= INLINE:
                return cls.from_bytes(data)
            with ThreadPoolExecutor(1, "aiouffd-hash") as executor:
                return await run_in_thread(executor, cls.from_bytes, data)
        finally:
            await aclose_source(given)


def _check_length(data: bytes, size: int) -> bytes:
    if size > _FILE_MAX:
        raise UsageError(f"a manifest has at most {_FILE_MAX} bytes, and this is longer")
    return data


class ChecksumSource(Wrapper):
    """``source``, every byte of which is verified against ``manifest`` before it is delivered.

    Arguments:
        source: anything that is a source.
        manifest: a `Manifest`, or the path of its file.
        refetch: how often a bad block is fetched again before it is a `ChecksumError`.

    Reads are widened to whole blocks of the manifest: a block size of it that divides the
    buffer's costs nothing extra. Raises SourceChangedError when opened if size or version are not
    those of the manifest. ``bad_blocks`` counts what did not match.
    """

    def __init__(
        self,
        source: Any,
        manifest: Manifest | str | os.PathLike[str],
        *,
        refetch: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(source, **options)
        given = manifest if isinstance(manifest, Manifest) else Manifest.load(manifest)
        self._manifest = given
        self._refetch = refetch
        self._digest = digest_function(given.algorithm)
        self._executor: ThreadPoolExecutor | None = None
        self._zeros: dict[int, bytes] = {}
        self.bad_blocks = 0

    # Bytes have to be here before they can be verified.
    read_into: Any = None
    stream: Any = None
    write: Any = None
    flush: Any = None
    write_zeros: Any = None
    trim: Any = None

    @property
    def manifest(self) -> Manifest:
        """What is verified against."""
        return self._manifest

    @property
    def writable(self) -> bool:
        """False: the manifest would no longer fit."""
        return False

    async def _open(self) -> None:
        """Open what is inside, and see that it is what the manifest is of."""
        await super()._open()
        version = getattr(self._inner, "version", None)
        wanted = self._manifest.version
        if self._inner.size != self._manifest.size:
            problem = f"has {self._inner.size} bytes and not {self._manifest.size}"
        elif None not in (version, wanted) and version != wanted:
            problem = f"is at version {version} and not {wanted}"
        else:
            self._executor = ThreadPoolExecutor(2, "aiouffd-hash")
            return
        await self._take_back()
        raise SourceChangedError(f"the object {problem}, as its manifest says")

    async def _close(self) -> None:
        self._let_go()
        await super()._close()

    async def _take_back(self) -> None:
        self._let_go()
        await super()._take_back()

    def _let_go(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)

    def clone(self) -> ChecksumSource:
        """The same around a clone."""
        return ChecksumSource(self._inner.clone(), self._manifest, refetch=self._refetch)

    async def _holes(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Those inside, as far as the manifest agrees: a hole is never read, nor verified then."""
        step, size = self._manifest.block_size, self.size
        found: list[tuple[int, int]] = []
        for hole, extent in await super()._holes(offset, length):
            end = hole + extent
            for block in range(-(-hole // step), -(-end // step)):
                start, stop = block * step, min((block + 1) * step, size)
                if stop > end or self._manifest.digest(block) != self._of_zeros(stop - start):
                    continue
                if found and sum(found[-1]) == start:
                    found[-1] = (found[-1][0], stop - found[-1][0])
                else:
                    found.append((start, stop - start))
        return found

    def _of_zeros(self, length: int) -> bytes:
        """The checksum of so many zeros: of a whole block, or of the last one."""
        if length not in self._zeros:
            self._zeros[length] = self._digest(bytes(length))
        return self._zeros[length]

    async def read(self, offset: int, length: int) -> Buffer:
        """Return ``length`` verified bytes at byte ``offset``. Raises `ChecksumError`."""
        check_range(offset, length, self.size)
        if not length:
            return b""
        step = self._manifest.block_size
        first, last = offset // step, (offset + length - 1) // step
        start, end = first * step, min((last + 1) * step, self.size)
        data = await super().read(start, end - start)
        view = memoryview(data)
        bad = await self._bad(view, first)
        if bad:
            # A copy: what a source returned is not to be changed.
            view = memoryview(bytearray(view))
            for block in bad:
                at = (block - first) * step
                fresh = await self._fetch_again(block)
                view[at : at + len(fresh)] = fresh
        return view[offset - start : offset - start + length]

    async def _bad(self, view: memoryview, first: int) -> list[int]:
        """The blocks of ``view``, which begins with block ``first``, that do not match."""
        if len(view) <= INLINE or self._executor is None:
            return self._mismatches(view, first)
        try:
            hashing = submitted(self._executor, self._mismatches, view, first)
        except SourceError:
            return self._mismatches(view, first)  # there is no thread to be had
        return await hashing

    def _mismatches(self, view: memoryview, first: int) -> list[int]:
        step, manifest = self._manifest.block_size, self._manifest
        return [
            first + number
            for number, at in enumerate(range(0, len(view), step))
            if self._digest(view[at : at + step]) != manifest.digest(first + number)
        ]

    async def _fetch_again(self, block: int) -> memoryview:
        step = self._manifest.block_size
        start = block * step
        length = min(step, self.size - start)
        for _ in range(self._refetch):
            self.bad_blocks += 1
            view = memoryview(await super().read(start, length))
            if not await self._bad(view, block):
                return view
        self.bad_blocks += 1
        raise ChecksumError(
            f"bytes {start} to {start + length} do not have the checksum that the manifest says"
        )
