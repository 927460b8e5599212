"""Firecracker's dialect: the memory of a microVM that is restored from a snapshot.

The VMM (``mem_backend`` of the type ``Uffd``, Firecracker 1.1 and later) connects, sends a JSON
array together with one userfaultfd, and says nothing more. An element of the array is a region of
the guest's memory:

======================  =====  ==============================================================
``base_host_virt_addr``  all    address in the VMM
``size``                 all    bytes
``offset``               all    of the region in the memory file, bytes
``page_size_kib``        1.7    page size in *bytes*, whatever its name says
``page_size``            1.12   the same under a better name
======================  =====  ==============================================================

Neither a length nor an end is sent, and from 1.12 on the connection stays open, before it does not:
so the text ends where its outermost bracket closes, and the end of the connection means nothing.
`Handshake` finds that end in whatever pieces the text comes. Relatives of Firecracker are
understood too: regions inside of ``{"mappings": [...]}``, a memfd beside the userfaultfd (E2B),
and a client that waits for one byte as an answer (StratoVirt).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...errors import PeerError, UsageError
from ...foreign.areas import Area
from ...util.pages import PAGE_SIZE

if TYPE_CHECKING:
    from ..channel import Channel
    from ..client import Client

__all__ = ["FirecrackerDialect", "GuestRegion", "Handshake"]

#: Longest text in bytes.
LIMIT = 1 << 20
#: Bytes read at a time, and bytes of a text that are looked at on the loop's thread.
_PIECE = 64 * 1024
#: Levels of brackets; Firecracker's text has two, a relative's three.
_DEPTH_MAX = 16
_PAGE_SIZES = (PAGE_SIZE, 2 << 20)
_SPACE = b" \t\r\n"
_ACKNOWLEDGEMENT = b"\x01"

_OUTSIDE = re.compile(rb'["\[\]{}]')
_IN_STRING = re.compile(rb'["\\]')


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """A region of guest memory as the VMM describes it: all in bytes, checked for sense."""

    #: Address in the VMM, a multiple of ``page_size``.
    address: int
    #: A multiple of ``page_size``.
    size: int
    #: Where it begins in the memory file, a multiple of ``page_size``.
    offset: int
    #: The system's, or 2 MiB.
    page_size: int


class Handshake:
    """The text that a VMM sends, in pieces, without I/O.

    `feed` it what was received until it gives the regions. ``limit`` is the longest text in bytes.
    Work is linear in the text's length, however small the pieces are.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._text = bytearray()
        self._at = 0  # how far brackets were looked for
        self._depth = 0
        self._in_string = False

    @property
    def received(self) -> int:
        """Bytes so far."""
        return len(self._text)

    def feed(self, data: bytes) -> tuple[GuestRegion, ...] | None:
        """More bytes; the regions in ascending order of address once all is there, else None.

        Raises PeerError for what cannot be a handshake, as soon as that is clear. Nothing can be
        fed after that, nor after the end.
        """
        if len(self._text) + len(data) > self._limit:
            raise PeerError(f"the handshake is longer than {self._limit} bytes")
        self._text += data
        end = self._find_end()
        if end is None:
            return None
        if self._text[end:].strip(_SPACE):
            raise PeerError("something follows the JSON of the handshake")
        return _regions(bytes(self._text[:end]))

    def _find_end(self) -> int | None:
        """Where the outermost bracket closes."""
        text = self._text
        if not self._depth:
            while self._at < len(text) and text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(text) and text[self._at] not in b"[{":
                raise PeerError("the handshake does not begin as JSON of regions does")
        while True:
            found = (_IN_STRING if self._in_string else _OUTSIDE).search(text, self._at)
            if found is None:
                self._at = max(self._at, len(text))
                return None
            self._at = found.end()
            match found[0]:
                case b'"':
                    self._in_string = not self._in_string
                case b"\\":
                    self._at += 1  # whatever is escaped, here or in the next piece
                case b"[" | b"{":
                    self._depth += 1
                    if self._depth > _DEPTH_MAX:
                        raise PeerError("the JSON of the handshake is too deep")
                case _:
                    self._depth -= 1
                    if not self._depth:
                        return self._at


# ------------------------------------------------------------------- what it says


def _regions(text: bytes) -> tuple[GuestRegion, ...]:
    try:
        value = json.loads(
            text.decode("utf-8"),
            parse_int=_integer,
            parse_constant=_no_constant,
            object_pairs_hook=_object,
        )
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
        raise PeerError(f"the handshake is not JSON: {error}") from error
    if isinstance(value, dict):
        value = value.get("mappings")
    if not isinstance(value, list):
        raise PeerError('the handshake is neither a list of regions nor {"mappings": [...]}')
    if not value:
        raise PeerError("the handshake names no region")
    regions = [_region(element) for element in value]
    sizes = {region.page_size for region in regions}
    if len(sizes) > 1:
        raise PeerError(f"regions with different page sizes: {sorted(sizes)}")
    regions.sort(key=lambda region: region.address)
    _apart([(region.address, region.size) for region in regions], "addresses")
    _apart(sorted((region.offset, region.size) for region in regions), "bytes of the memory file")
    return tuple(regions)


def _integer(text: str) -> int:
    if len(text) > 20:  # 2**64 has as many digits
        raise PeerError(f"the handshake has a number of {len(text)} digits")
    return int(text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field comes twice")
    return found


def _region(element: Any) -> GuestRegion:
    if not isinstance(element, dict):
        raise PeerError(f"a region is not an object but a {type(element).__name__}")
    address, size = _field(element, "base_host_virt_addr"), _field(element, "size")
    offset = _field(element, "offset")
    page_size = (
        _field(element, "page_size", 0) or _field(element, "page_size_kib", 0) or _PAGE_SIZES[0]
    )
    if page_size not in _PAGE_SIZES:
        raise PeerError(f"a page size of {page_size} bytes; it can be {PAGE_SIZE} or 2 MiB")
    where = f"the region of {size:#x} bytes at {address:#x}"
    if not size:
        raise PeerError(f"{where} is empty")
    if address % page_size or size % page_size or offset % page_size:
        raise PeerError(f"{where}, from {offset:#x} of the file: not whole pages of {page_size:#x}")
    if address + size > 1 << 64 or offset + size > 1 << 64:
        raise PeerError(f"{where} and offset {offset:#x} goes beyond 64 bits")
    return GuestRegion(address, size, offset, page_size)


def _field(element: dict[str, Any], name: str, default: int | None = None) -> int:
    """A field of 64 bits without sign. One with a default may be missing, or null."""
    value = element.get(name)
    if value is None:
        if default is None:
            raise PeerError(f"a region lacks {name}")
        return default
    if type(value) is not int:  # True is one too, for isinstance
        raise PeerError(f"{name} is not an integer but a {type(value).__name__}")
    if not 0 <= value < 1 << 64:
        raise PeerError(f"{name} is {value}, which is not a number of 64 bits")
    return value


def _apart(spans: list[tuple[int, int]], what: str) -> None:
    """Raise PeerError if any of ``spans``, sorted, overlap."""
    for (start, length), (following, _) in pairwise(spans):
        if start + length > following:
            raise PeerError(f"two regions have the same {what} from {following:#x} on")


# ------------------------------------------------------------------- the conversation


class FirecrackerDialect:
    """Serves VMMs that speak as Firecracker does, any version since 1.1.

    :param ack: answer with one byte when all is ready, which StratoVirt waits for.
        Firecracker does not read it.
    :param memfd: a client may send a second descriptor, the memfd that its memory is in (E2B);
        it is closed, for pages are installed through the userfaultfd.
    :param limit: longest text in bytes. How long it may take is ``handshake`` of `Limits`.
    """

    name = "firecracker"
    #: A guest that touches a page with an error is not told: KVM may emulate the access as that of
    #: a device, and the VMM then answers with anything.
    on_failure = "kill"

    def __init__(
        self,
        *,
        ack: bool = False,
        memfd: bool = False,
        limit: int = LIMIT,
    ) -> None:
        if limit < 2:
            raise UsageError(f"a handshake does not fit into {limit} bytes")
        self._ack = ack
        self._fds_max = 2 if memfd else 1
        self._limit = limit

    async def talk(self, client: Client) -> None:
        """Receive one handshake and adopt its memory. Raises PeerError, see `Dialect`."""
        if client.source is None:
            raise UsageError(
                "Firecracker's handshake does not say which memory file it is about",
                hint="give listen() the source",
            )
        regions, uffd = await self._receive(client.channel)
        areas = [
            Area(region.address, region.size, client.source, region.offset, region.page_size)
            for region in regions
        ]
        # A memory file that ends within a page lacks what the guest had there.
        client.adopt(uffd, areas, page_size=regions[0].page_size, whole=True)
        if self._ack:
            await client.channel.send(_ACKNOWLEDGEMENT)

    async def _receive(self, channel: Channel) -> tuple[tuple[GuestRegion, ...], int]:
        """The regions and the userfaultfd, which is the caller's then."""
        handshake = Handshake(self._limit)
        fds: list[int] = []
        try:
            regions = await self._read(channel, handshake, fds)
            return regions, _take_uffd(fds)
        finally:
            for fd in fds:
                os.close(fd)

    async def _read(
        self, channel: Channel, handshake: Handshake, fds: list[int]
    ) -> tuple[GuestRegion, ...]:
        while True:
            # One byte more than may come, to tell a text that is too long from one that is not.
            piece = min(_PIECE, self._limit + 1 - handshake.received)
            data, some = await channel.recv(piece, max_fds=self._fds_max - len(fds))
            fds += some
            if not data:
                raise PeerError(f"the peer hung up after {handshake.received} bytes of handshake")
            if handshake.received + len(data) <= _PIECE:
                regions = handshake.feed(data)
            else:  # No VMM's is that long. Others shall not wait while it is looked at.
                regions = await asyncio.to_thread(handshake.feed, data)
            if regions is not None:
                return regions


def _take_uffd(fds: list[int]) -> int:
    """Take the one userfaultfd out of ``fds``."""
    kinds = [_kind(fd) for fd in fds]
    if kinds.count("userfaultfd") != 1:
        raise PeerError(
            f"the handshake came with these descriptors: {', '.join(kinds) or 'none'}; one has to"
            " be a userfaultfd"
        )
    if len(fds) > 1 and "memfd" not in kinds:
        raise PeerError(f"the second descriptor is no memfd: {', '.join(kinds)}")
    return fds.pop(kinds.index("userfaultfd"))


def _kind(fd: int) -> str:
    target = os.readlink(f"/proc/self/fd/{fd}")
    if target == "anon_inode:[userfaultfd]":
        return "userfaultfd"
    return "memfd" if target.startswith("/memfd:") else "something else"
