"""A fault as an object, and who is told of faults: between a region and who brings its bytes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from ..kernel.lib import lib

if TYPE_CHECKING:
    from .region import Region

__all__ = ["BlockSink", "Errors", "Fault", "Handler", "Kind"]

#: Kinds of memory: private, shared with a descriptor, and the same of huge pages.
Kind: TypeAlias = Literal["anonymous", "memfd", "hugetlb", "hugetlb-memfd"]
#: ``"hard"``: wait for the bytes for ever; ``"soft"``: an error after a while. See `aiouffd.open`.
Errors: TypeAlias = Literal["hard", "soft"]
Handler: TypeAlias = Callable[["Fault"], Coroutine[Any, Any, None]]


class BlockSink(Protocol):
    """Who is told of the blocks of a region that are touched. Loop thread only."""

    def miss(
        self, block: int, address: int = 0, flags: int = 0, thread: int = 0, generation: int = 0
    ) -> None:
        """A block that nobody fetches was touched; its fetch is now yours.

        ``address``, ``flags`` and ``thread`` are the message's, 0 if unknown.
        """

    def hit(self, block: int) -> None:
        """A block that is being fetched was touched for the first time."""

    def rescue(self, block: int) -> bool:
        """On the rescue loop: serve this block. False if that cannot be done."""

    def late(self, block: int) -> None:
        """After `rescue` said no, on the region's own loop: as `miss`, unless it is in hand."""

    def close(self) -> None:
        """The region closes: cancel what is under way."""


class Fault:
    """One block that a thread waits for. Resolve it with `copy`, `zero`, `poison` or `continue_`.

    Lives on the loop that runs its handler and may be resolved from any thread. Resolving a
    fault that is resolved already does nothing.
    """

    __slots__ = ("_answered", "address", "block", "flags", "generation", "region", "thread_id")

    def __init__(
        self, region: Region, block: int, address: int, flags: int, thread_id: int, generation: int
    ) -> None:
        self.region = region
        #: Number of the block, counted from the start of the region.
        self.block = block
        #: The page that was touched: its address.
        self.address = address
        #: AU_PAGEFAULT_FLAG bits of the message.
        self.flags = flags
        #: Kernel thread id of the toucher, a hint only.
        self.thread_id = thread_id
        #: The block's generation when the fault was read.
        self.generation = generation
        # Bytes from the block's start that were brought here, even if they are gone again.
        self._answered = 0

    @property
    def offset(self) -> int:
        """First byte of the block, from the start of the region."""
        return self.block * self.region.block_size

    @property
    def length(self) -> int:
        """Bytes in the block; less than a full one at the end of the region."""
        region = self.region
        return min(region.block_size, region.length - self.block * region.block_size)

    @property
    def is_write(self) -> bool:
        """Whether the thread wanted to write."""
        return bool(self.flags & lib.AU_PAGEFAULT_FLAG_WRITE)

    @property
    def resolved(self) -> bool:
        """Whether every page of the block is there (or poisoned), or was brought by this fault and
        has been dropped since."""
        return self._answered >= self.length or self.region._settled(self.offset, self.length)

    def _answer(self, offset: int, done: int) -> int:
        if offset == self.offset + self._answered:
            self._answered += done
        return done

    def copy(self, data: Any, *, offset: int | None = None) -> int:
        """Install ``data`` (any contiguous buffer) at ``offset`` and wake who waits.

        ``offset`` in bytes from the start of the region, a multiple of the page size; the
        start of the block if None. ``data`` ends at a page boundary or reaches the region's
        end. Returns the bytes settled. Raises UsageError, KernelError, ClosedError.
        """
        region = self.region
        if offset is None:
            offset = self.block * region.block_size
        return self._answer(offset, region.install(offset, data))

    def zero(self) -> int:
        """Fill the block with zeros."""
        return self._answer(self.offset, self.region.zero(self.offset, self.length))

    def poison(self) -> int:
        """Make touches of the block fail: SIGBUS for raw ones, EFAULT in system calls."""
        return self._answer(self.offset, self.region.poison(self.offset, self.length))

    def continue_(self) -> int:
        """Map what is in the page cache of a memfd region (`Region.fileno`) already. 5.13."""
        return self._answer(self.offset, self.region.continue_(self.offset, self.length))

    def __repr__(self) -> str:
        return f"<Fault block {self.block} at {self.address:#x} thread {self.thread_id}>"
