"""aiouffd's own dialect, for clients in any language: docs/serve-protocol.md describes it.

A client may ask for an object's size first, then hands over areas of its memory, a userfaultfd and
a file of page states, and is answered. From then on the connection says no more than that both are
alive: its end at the client means that this server is gone, and that the client hands the same
things over again to the next one. The page states are in the client's file, so that the next
server knows which pages read as zeros.

`Decoder` is the parser, without I/O. Nothing that a client sends makes it allocate more than
the record that it announced, a MiB at most; and nothing that a client does to the file of states
later can hurt us, because it is sealed.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

from ...errors import AiouffdError, PeerError, SourceError
from ...foreign.areas import GONE, Area
from ...foreign.steps import Steps, in_steps
from ...util.pages import PAGE_SIZES

if TYPE_CHECKING:
    from ...foreign.blocks import BlockStore
    from ...foreign.memory import Memory
    from ..channel import Channel
    from ..client import Client

__all__ = [
    "Attach",
    "Decoder",
    "Handed",
    "NativeDialect",
    "Query",
    "Refusal",
    "answer",
    "error_in",
    "tag_of",
    "teller",
]

log = logging.getLogger("aiouffd")

MAGIC: Final = 0x64667561  # "aufd"
VERSION: Final = 1
QUERY: Final = 1
ATTACH: Final = 2
ANSWER: Final = 3
ERROR: Final = 4

#: Statuses of an answer.
OK: Final = 0
BAD_RECORD: Final = 1
NOT_FOUND: Final = 2
CHANGED: Final = 3
UNSUPPORTED: Final = 4
REFUSED: Final = 5
UNAVAILABLE: Final = 6

#: Flags that a server need not know; one that it does not know among the others is an error.
OPTIONAL: Final = 0xFFFF0000
#: Of a record: bring everything, behind what is touched.
BACKGROUND: Final = 1 << 16
#: Of a record: the client makes errors of pages itself, if the kernel cannot.
ERRORS: Final = 1 << 17
#: Of an area: there is no object, it reads as zeros.
ZEROS: Final = 1

#: Magic, version, type, bytes in the record, flags.
HEADER: Final = Struct("<IHHII")
#: Where the name begins, its length; after the header.
QUERY_FIXED: Final = Struct("<II")
#: Where the areas begin, length of the name, number of areas, bytes of each; 8 bytes; how many
#: servers were lost before; 4 bytes; the version that the object must have.
ATTACH_FIXED: Final = Struct("<IIII8xI4x32s")
#: Address, length, offset in the object, page size, flags.
AREA: Final = Struct("<QQQII")
#: Where the text begins, status, size of the object, its version, length of the text, 4 bytes.
ANSWER_FIXED: Final = Struct("<IIQ32sI4x")
#: Where a record of another kind would go on; 4 bytes; address, length.
ERROR_FIXED: Final = Struct("<I4xQQ")

RECORD_MAX: Final = 1 << 20
AREAS_MAX: Final = 4096
#: What areas may have been broken into by the time that the next server comes.
PARTS_MAX: Final = 65536
NAME_MAX: Final = 1024
TEXT_MAX: Final = 200
NO_TAG: Final = bytes(32)

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_WRITE_SEALS: Final = fcntl.F_SEAL_WRITE | 0x10  # and F_SEAL_FUTURE_WRITE


class Refusal(PeerError):
    """What a client asked for cannot be; ``status`` is what it is told."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Query:
    """How large is an object?"""

    name: str


@dataclass(frozen=True, slots=True)
class Handed:
    """An area as the client describes it: whole pages, but nothing else is checked."""

    address: int
    length: int
    offset: int
    page_size: int
    zeros: bool


@dataclass(frozen=True, slots=True)
class Attach:
    """Serve this memory. ``areas`` is not empty, and all have one page size."""

    name: str
    areas: tuple[Handed, ...]
    background: bool
    #: How many servers the client has lost.
    resumed: int
    #: Of the version that the object must have; `NO_TAG` if any will do.
    tag: bytes
    #: It can be told of pages that are errors.
    errors: bool = False

    @property
    def page_size(self) -> int:
        """In bytes."""
        return self.areas[0].page_size

    @property
    def pages(self) -> int:
        """In all areas: the length of the file of states."""
        return sum(area.length for area in self.areas) // self.page_size


class Decoder:
    """Records out of a stream of bytes, in whatever pieces they come.

    Feed it at most ``wanted`` bytes at a time, and nothing of the next record is ever taken: so the
    descriptors that come with bytes are this record's.
    """

    def __init__(self) -> None:
        self._have = bytearray()
        self._length = HEADER.size

    @property
    def wanted(self) -> int:
        """How many bytes are still missing, at least."""
        return self._length - len(self._have)

    @property
    def pending(self) -> int:
        """Bytes of a record that is not complete."""
        return len(self._have)

    def feed(self, data: bytes) -> Query | Attach | None:
        """More bytes; the record that they complete. Raises Refusal; it is of no use then."""
        if len(data) > self.wanted:
            raise ValueError(f"{len(data)} bytes, where {self.wanted} were wanted")
        self._have += data
        if len(self._have) == HEADER.size == self._length:
            self._length = self._check_header()
        if len(self._have) < self._length:
            return None
        record, self._have, self._length = bytes(self._have), bytearray(), HEADER.size
        return _query(record) if HEADER.unpack_from(record)[2] == QUERY else _attach(record)

    def _check_header(self) -> int:
        magic, version, kind, length, flags = HEADER.unpack_from(self._have)
        if magic != MAGIC:
            raise Refusal(BAD_RECORD, f"a record begins with {magic:#x}, which is not ours")
        if version != VERSION:
            raise Refusal(UNSUPPORTED, f"version {version} is spoken, here it is {VERSION}")
        fixed = {QUERY: QUERY_FIXED, ATTACH: ATTACH_FIXED}.get(kind)
        if fixed is None:
            raise Refusal(UNSUPPORTED, f"records of type {kind} are not known")
        if not HEADER.size + fixed.size <= length <= RECORD_MAX:
            raise Refusal(BAD_RECORD, f"a record of type {kind} with {length} bytes")
        unknown = flags & ~OPTIONAL
        if unknown:
            raise Refusal(UNSUPPORTED, f"flags {unknown:#x} are not known")
        return int(length)


def _name(record: bytes, start: int, length: int) -> str:
    if length > NAME_MAX:
        raise Refusal(BAD_RECORD, f"a name of {length} bytes")
    if start + length > len(record):
        raise Refusal(BAD_RECORD, "the name goes beyond the record")
    try:
        name = record[start : start + length].decode()
    except UnicodeDecodeError:
        raise Refusal(BAD_RECORD, "the name is not UTF-8") from None
    if "\0" in name:
        raise Refusal(BAD_RECORD, "the name has a zero in it")
    return name


def _query(record: bytes) -> Query:
    start, length = QUERY_FIXED.unpack_from(record, HEADER.size)
    if start < HEADER.size + QUERY_FIXED.size:
        raise Refusal(BAD_RECORD, f"the name begins at byte {start}")
    return Query(_name(record, start, length))


def _attach(record: bytes) -> Attach:
    flags = HEADER.unpack_from(record)[4]
    start, name_length, count, size, resumed, tag = ATTACH_FIXED.unpack_from(record, HEADER.size)
    if start < HEADER.size + ATTACH_FIXED.size or size < AREA.size:
        raise Refusal(BAD_RECORD, f"areas of {size} bytes from byte {start} on")
    if not 0 < count <= AREAS_MAX:
        raise Refusal(BAD_RECORD, f"{count} areas; there can be 1 to {AREAS_MAX}")
    end = start + count * size
    if end > len(record):
        raise Refusal(BAD_RECORD, "the areas go beyond the record")
    areas = tuple(_area(AREA.unpack_from(record, start + at * size)) for at in range(count))
    if any(area.page_size != areas[0].page_size for area in areas):
        raise Refusal(UNSUPPORTED, "areas with different page sizes")
    name = _name(record, end, name_length)
    return Attach(name, areas, bool(flags & BACKGROUND), resumed, tag, bool(flags & ERRORS))


def _area(fields: tuple[int, ...]) -> Handed:
    address, length, offset, page_size, flags = fields
    if page_size not in PAGE_SIZES:
        raise Refusal(UNSUPPORTED, f"pages of {page_size} bytes")
    if not length or (address | length) % page_size:
        raise Refusal(
            BAD_RECORD, f"{length:#x} bytes at {address:#x} are not pages of {page_size} bytes"
        )
    unknown = flags & ~OPTIONAL & ~ZEROS
    if unknown:
        raise Refusal(UNSUPPORTED, f"flags {unknown:#x} of an area are not known")
    return Handed(address, length, offset, page_size, bool(flags & ZEROS))


def answer(status: int, *, size: int = 0, tag: bytes = NO_TAG, text: str = "") -> bytes:
    """The record that answers a client."""
    raw = text.encode()[:TEXT_MAX].decode(errors="ignore").encode()
    fixed = HEADER.size + ANSWER_FIXED.size
    return (
        HEADER.pack(MAGIC, VERSION, ANSWER, fixed + len(raw), 0)
        + ANSWER_FIXED.pack(fixed, status, size, tag, len(raw))
        + raw
    )


def error_in(address: int, length: int) -> bytes:
    """The record that has a client make errors of pages."""
    fixed = HEADER.size + ERROR_FIXED.size
    return HEADER.pack(MAGIC, VERSION, ERROR, fixed, 0) + ERROR_FIXED.pack(fixed, address, length)


def teller(channel: Channel) -> Callable[[int, int], bool]:
    """What has a client make an error of a page: see `Memory.tell_error`."""
    return lambda page, size: channel.send_now(error_in(page, size))


def tag_of(version: str | None) -> bytes:
    """What a version is called on the wire: 32 bytes, zeros if there is none."""
    return NO_TAG if version is None else hashlib.blake2b(version.encode(), digest_size=32).digest()


def map_states(fd: int, pages: int) -> memoryview:
    """The client's file of page states, which can get neither shorter nor longer. The caller's
    ``fd`` is not needed any more then. Raises Refusal."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise Refusal(BAD_RECORD, "the second descriptor is not a memfd") from None
    if seals & _SEALS != _SEALS:
        raise Refusal(BAD_RECORD, "the file of states is not sealed against changes of its size")
    if seals & _WRITE_SEALS:
        raise Refusal(BAD_RECORD, "the file of states is sealed against writing")
    status = os.fstat(fd)
    # Huge pages may run out, which is a signal to whoever touches. Not st_blksize, which is that of
    # transparent huge pages where memfds have these.
    if not stat.S_ISREG(status.st_mode) or os.fstatvfs(fd).f_bsize != mmap.PAGESIZE:
        raise Refusal(BAD_RECORD, "the file of states is not made of ordinary pages")
    if status.st_size != pages:
        raise Refusal(BAD_RECORD, f"the file of states has {status.st_size} bytes, not {pages}")
    try:
        if sys.version_info >= (3, 13):
            return memoryview(mmap.mmap(fd, pages, trackfd=False))
        return memoryview(mmap.mmap(fd, pages))
    except OSError as error:
        raise Refusal(REFUSED, f"the file of states cannot be mapped: {error.strerror}") from None


def mapped_runs(states: memoryview, fd: int, at: int, count: int) -> Steps[list[tuple[int, int]]]:
    """First pages and those behind the last of what is still mapped, of an area whose states begin
    at ``at`` in the file."""
    runs, begin = list[tuple[int, int]](), 0
    for start, end in _written(fd, at, at + count):
        yield
        data = bytes(states[start:end]).translate(_IS_GONE)
        hole = data.find(1)
        while hole >= 0 and len(runs) <= PARTS_MAX:
            first = start - at + hole
            if first > begin:
                runs.append((begin, first))
            after = data.find(0, hole)
            after = len(data) if after < 0 else after
            begin = start - at + after
            hole = data.find(1, after)
            if len(runs) % 1024 == 0:
                yield
    if begin < count:
        runs.append((begin, count))
    return runs


_IS_GONE: Final = bytes(bool(value & GONE) for value in range(256))
#: Bytes of states that are looked at in one go.
_STEP: Final = 1 << 17


def _written(fd: int, at: int, end: int) -> Iterator[tuple[int, int]]:
    """Parts of a file that are not holes: reading those would make pages of them."""
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
            stop = min(end, os.lseek(fd, at, os.SEEK_HOLE))
        except OSError:  # ENXIO: no more of it
            return
        while at < stop:
            yield at, min(at + _STEP, stop)
            at = min(at + _STEP, stop)


#: What a server has: sources by name, or a function that gives the one for a name, or None.
Objects = Mapping[str, Any] | Callable[[str], Any]


class NativeDialect:
    """Serves clients of ``aiouffd.attach`` and of ``include/aiouffd_client.h``.

    :param objects: what clients may ask for by name: a mapping to whatever `aiouffd.open` takes, or
        a function of the name that returns that, or None. A client that gives no name gets the
        server's own source; where that is missing, the one object of a mapping of one.
    """

    name = "native"

    def __init__(self, objects: Objects | None = None) -> None:
        self._objects: Objects = {} if objects is None else objects

    async def talk(self, client: Client) -> None:
        """Answer until something was handed over. Raises PeerError, see `Dialect`."""
        decoder, fds = Decoder(), list[int]()
        try:
            while True:
                record = await _receive(client.channel, decoder, fds)
                if record is None:
                    return
                client.asked = record.name
                store = await self._find(client, record.name)
                if isinstance(record, Query):
                    if fds:
                        raise Refusal(BAD_RECORD, "a question came with descriptors")
                    status = NOT_FOUND if store is None else OK
                    await _send(client, status, store, _UNKNOWN if store is None else "")
                    continue
                if store is None and not all(area.zeros for area in record.areas):
                    raise Refusal(NOT_FOUND, _UNKNOWN)
                memory = await _adopt(client, record, store, fds)
                await _send(client, OK, store)
                if record.errors:
                    # Not before the answer, which the client waits for.
                    memory.tell_error = teller(client.channel)
                client.reconnects = True
                client.keep_while_connected()
                return
        except Refusal as refusal:
            await _send(client, refusal.status, None, refusal.message)
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def refusal(self, text: str, later: bool) -> bytes:
        """What a client is told that is turned away, whatever it says itself."""
        return answer(UNAVAILABLE if later else REFUSED, text=text)

    async def restore(self, client: Client, name: str) -> None:
        """Have the object of a client that has asked another server for it. Raises Refusal."""
        client.asked = name
        await self._find(client, name)

    async def _find(self, client: Client, name: str) -> BlockStore | None:
        """The store of an object, None if there is none of that name."""
        if not name and client.source is not None:
            return client.source
        if callable(self._objects):
            try:
                source = self._objects(name)
            except Exception as error:
                log.error("%r: looking %r up has failed", client, name, exc_info=error)
                raise Refusal(UNAVAILABLE, "looking the object up has failed") from error
        elif not name and len(self._objects) == 1:
            source = next(iter(self._objects.values()))
        else:
            source = self._objects.get(name)
        if source is None:
            return None
        try:
            return await client.store_for(source)
        except FileNotFoundError:
            return None
        except (AiouffdError, OSError) as error:
            # What it says may be nobody's business.
            log.warning("%r: %r cannot be opened: %s", client, name, error)
            lasting = isinstance(error, SourceError) and not error.transient
            raise Refusal(
                REFUSED if lasting else UNAVAILABLE,
                f"the object cannot be opened: {type(error).__name__}; the server's log says more",
            ) from error


_UNKNOWN = "the server has no such object"


async def _receive(channel: Channel, decoder: Decoder, fds: list[int]) -> Query | Attach | None:
    """The next record, and into ``fds`` the descriptors that came with it. None at the end."""
    while True:
        data, some = await channel.recv(decoder.wanted, max_fds=2 - len(fds))
        fds += some
        if not data:
            if decoder.pending or fds:
                raise PeerError(f"the peer hung up after {decoder.pending} bytes of a record")
            return None
        record = decoder.feed(data)
        if record is not None:
            return record


async def _send(client: Client, status: int, store: BlockStore | None, text: str = "") -> None:
    size, tag = (0, NO_TAG) if store is None else (store.size, tag_of(store.version))
    await client.channel.send(answer(status, size=size, tag=tag, text=text))


async def _adopt(
    client: Client, record: Attach, store: BlockStore | None, fds: list[int]
) -> Memory:
    if len(fds) != 2:
        raise Refusal(BAD_RECORD, f"{len(fds)} descriptors came, not a userfaultfd and a memfd")
    tag = NO_TAG if store is None else tag_of(store.version)
    if NO_TAG not in (tag, record.tag) and tag != record.tag:
        raise Refusal(CHANGED, "the object is another version than the client has begun with")
    states = map_states(fds[1], record.pages)
    areas, at = list[Area](), 0
    for area in record.areas:
        count, size = area.length // area.page_size, area.page_size
        runs = [(0, count)]
        if record.resumed:
            runs = await in_steps(mapped_runs(states, fds[1], at, count))
        if len(areas) + len(runs) > PARTS_MAX:
            raise Refusal(REFUSED, "too many holes have been made in the memory")
        for number, (first, last) in enumerate(runs, 1):
            if number % 1024 == 0:
                await asyncio.sleep(0)
            areas.append(
                Area(
                    area.address + first * size,
                    (last - first) * size,
                    None if area.zeros else store,
                    area.offset + first * size,
                    size,
                    states[at + first : at + last],
                    lasting=True,
                )
            )
        at += count
    if client.source is None:
        client.source = store
    uffd = fds.pop(0)
    try:
        return await client.adopt_in_steps(
            uffd, areas, page_size=record.page_size, background=record.background
        )
    except Refusal:
        raise
    except PeerError as error:
        raise Refusal(REFUSED, error.message) from error
