"""A source as an export: what clients are offered, and how their writes reach it."""

from __future__ import annotations

from ..errors import FlushError, UsageError
from ..sources.base import Source, own_method, size_of_source
from ..sources.durability import Flusher, Promises
from . import wire
from .order import Order
from .server_core import Offer, Request

__all__ = ["CHANGING", "Account", "Export", "check_name"]

#: Zeros are written in pieces of so many bytes where the source knows no better.
ZEROS = bytes(1 << 20)
#: Block size that clients are told to prefer, in bytes.
PREFERRED = 65536
#: Sizes are signed in most clients.
SIZE_MAX = (1 << 63) - 1
#: Commands after which other bytes may be read.
CHANGING = (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES, wire.CMD_TRIM)


class Account:
    """What is known of the writes to a source, by all its clients and under all its names."""

    def __init__(self, source: Source) -> None:
        # A client that is gone may have left a write behind, and come back with a newer one.
        self.order = Order()
        self.promises = Promises(f"NBD export of {source!r}")
        self.flusher = Flusher(self.promises)


class Export:
    """``source``, as it is offered to clients."""

    def __init__(self, source: Source, account: Account, *, writable: bool) -> None:
        self.source, self.account = source, account
        self.offer = _offer(source, writable)

    async def change(self, request: Request) -> int:
        """Do a write, after all that came before it for the same place. Returns the bytes written.
        Raises what the source raises."""
        source, offset, length = self.source, request.offset, request.length
        turn = await self.account.order.turn(offset, length)
        try:
            if request.command == wire.CMD_WRITE:
                assert request.data is not None
                await source.write(offset, request.data)  # type: ignore[attr-defined]
            elif request.command == wire.CMD_WRITE_ZEROES:
                await _write_zeros(source, request)
            else:
                await _trim(source, request)
        finally:
            turn.end()
        self.account.promises.wrote(offset, length)
        return 0 if request.command == wire.CMD_TRIM else length

    async def flush(self, request: Request) -> None:
        """Have what was answered made durable, or for FUA at least this. Raises FlushError, and
        what the source raises."""
        flush = own_method(self.source, "flush")
        # Where nothing can be written there is nothing to flush, though some ask.
        if flush is None or self.offer.flags & wire.FLAG_READ_ONLY:
            return
        try:
            await self.account.flusher(flush)
        except FlushError as error:
            end = request.offset + request.length
            if request.command == wire.CMD_FLUSH or not error.ranges:
                raise
            if any(at < end and request.offset < at + count for at, count in error.ranges):
                raise


def check_name(name: str) -> None:
    """Raise UsageError for what cannot be the name of an export."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise UsageError(f"an export's name is UTF-8, which {name!r} is not") from None
    if length > wire.STRING_MAX or "\0" in name:
        raise UsageError(f"an export's name has at most {wire.STRING_MAX} bytes, none of them zero")


def _offer(source: Source, writable: bool) -> Offer:
    flags = wire.FLAG_HAS_FLAGS | wire.FLAG_SEND_DF | wire.FLAG_CAN_MULTI_CONN
    if writable:
        if own_method(source, "write") is None or not getattr(source, "writable", True):
            raise UsageError(f"{source!r} cannot be written to")
        flags |= wire.FLAG_SEND_FLUSH | wire.FLAG_SEND_FUA | wire.FLAG_SEND_WRITE_ZEROES
        if own_method(source, "trim") or own_method(source, "write_zeros"):
            flags |= wire.FLAG_SEND_TRIM
    else:
        flags |= wire.FLAG_READ_ONLY
    size = size_of_source(source)
    if size > SIZE_MAX:
        raise UsageError(f"NBD cannot serve {size} bytes")
    return Offer(size, flags, *_block_sizes(source, size))


def _block_sizes(source: Source, size: int) -> tuple[int, int]:
    """Smallest and preferred block. What a client asks for in smaller blocks is done too, by the
    source; but for the client that is not one step (it is read, completed, and written)."""
    minimum = int(getattr(source, "minimum_block", 1))
    # As the protocol wants it: a power of two up to 64 KiB, which the size is a multiple of.
    if not 0 < minimum <= 65536 or minimum & (minimum - 1) or size % minimum:
        minimum = 1
    return minimum, max(PREFERRED, minimum)


async def _write_zeros(source: Source, request: Request) -> None:
    offset, end = request.offset, request.offset + request.length
    own = own_method(source, "write_zeros")
    if own is not None:
        await own(offset, request.length, hole=not request.flags & wire.CMD_FLAG_NO_HOLE)
        return
    while offset < end:
        count = min(len(ZEROS), end - offset)
        await source.write(offset, memoryview(ZEROS)[:count])  # type: ignore[attr-defined]
        offset += count


async def _trim(source: Source, request: Request) -> None:
    """What is read there afterwards is undefined: nothing has to be done."""
    trim = own_method(source, "trim")
    zeros = own_method(source, "write_zeros")
    if trim is not None:
        await trim(request.offset, request.length)
    elif zeros is not None:
        await zeros(request.offset, request.length, hole=True)
