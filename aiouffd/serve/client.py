"""One client of a server: a process that has handed over some of its memory."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AiouffdError, ClosedError, PeerError, UsageError
from ..fetch.workingset import WorkingSet
from ..foreign.areas import Area, AreaMap
from ..foreign.blocks import PAGE, BlockStore
from ..foreign.ending import refuse
from ..foreign.memory import Memory, Uncovered
from ..foreign.reactor import Share
from ..foreign.stats import MemoryStats
from ..foreign.steps import Steps, at_once, in_steps
from ..kernel.uffd import Userfaultfd
from ..util.pages import PAGE_SIZE, PAGE_SIZES
from ..util.places import is_trusted
from ..util.tasks import begin
from .channel import Channel
from .peer import Peer

if TYPE_CHECKING:
    from .server import Server

__all__ = ["Client", "Limits"]

log = logging.getLogger("aiouffd")

OnFailure = Literal["poison", "kill"]

#: Areas that are checked in one step.
CHECKED = 64
#: Addresses from here on are the kernel's.
_ADDRESS_MAX = 1 << 47


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask for before it counts as hostile."""

    #: Descriptors, forked children's included.
    memories: int = 1024
    #: Areas of one descriptor as it is handed over.
    areas: int = 65536
    #: Bytes of addresses in all of them.
    bytes: int = 1 << 44
    #: Pages of one client, forked children's included: of each a byte is kept once something is
    #: known of it. As many are 1 TiB of 4 KiB pages.
    pages: int = 1 << 28
    #: Pages of all clients of the server, and of those of one user who is neither root nor ours.
    all_pages: int = 1 << 32
    user_pages: int = 1 << 31
    #: Connections of one user who is neither root nor ours.
    user_clients: int = 512
    #: Seconds from connecting to the first descriptor.
    handshake: float = 10.0


class Client:
    """A process that has connected, and its memory. Made by a `Server`; on its loop.

    ``source`` is the object that its memory shows, where the dialect leaves that to the server;
    ``on_client`` of `listen` may set it, and ``prefetch`` and ``record``, before the dialect talks.
    """

    def __init__(self, server: Server, channel: Channel, number: int) -> None:
        self.server = server
        self.channel = channel
        self.peer: Peer = channel.peer
        self.number = number
        self._source: BlockStore | None = server.store
        #: A working set to bring ahead of the client's faults.
        self.prefetch: WorkingSet | None = server.prefetch
        #: Whether to note which blocks are needed; see `working_set`.
        self.record = server.record
        self.on_failure: OnFailure = server.on_failure
        self.memories: list[Memory] = []
        #: Whether closing the server brings everything that is missing first. For dialects whose
        #: clients keep no copy of the descriptor: without us they would see zeros.
        self.complete_on_close = False
        #: Whether it connects again by itself when the connection ends, and so finds whoever
        #: takes over from us.
        self.reconnects = False
        #: Whether the connection only says who it is: it has connected anew, and these are its
        #: children, which another server has handed over.
        self.alone = False
        #: The name of the object that it has asked for, where the dialect has names.
        self.asked: str | None = None
        #: When it came, in seconds of the loop's time.
        self.since = asyncio.get_running_loop().time()
        #: Pages of all of its memories, as they were handed over.
        self.pages = 0
        #: Set once nothing is served any more.
        self.ended = asyncio.Event()
        self._share = Share()
        self._past = MemoryStats()
        self._blocks: dict[tuple[BlockStore, int], None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshake: asyncio.Timeout | None = None
        #: Set once its dialect has nothing more to say.
        self.talked = asyncio.Event()
        self._connected = False
        self._ending = self._paused = False

    @property
    def source(self) -> BlockStore | None:
        """The object that its memory shows."""
        return self._source

    @source.setter
    def source(self, store: BlockStore | None) -> None:
        if not isinstance(store, BlockStore | None):
            raise UsageError(
                f"a client's source is a store, not {store!r}",
                hint="client.source = await client.store_for(...)",
            )
        self._source = store

    # ----------------------------------------------------------------- adopt

    def adopt(
        self,
        fd: int,
        areas: Sequence[Area],
        *,
        page_size: int = PAGE_SIZE,
        uncovered: Uncovered = "poison",
        background: bool = False,
        name: str = "",
        start: bool = True,
        whole: bool = False,
    ) -> Memory:
        """Serve a userfaultfd of the client. Takes ``fd`` over, also when it fails.

        :param areas: what comes from where, in pages of ``page_size`` bytes.
        :param uncovered: what a touch outside of the areas gets: an error, or zeros.
        :param background: bring everything, behind what is waited for.
        :param start: begin at once; else with `start_all`.
        :param whole: no area may end behind its object, not even within the object's last page,
            where the rest would be zeros.

        Raises PeerError when the descriptor is none, or the areas cannot be: unaligned,
        overlapping, past the end of their object, or more than the server's limits allow.
        """
        checking = self._checked(areas, page_size, whole)
        return self._adopt(
            fd,
            lambda: at_once(checking),
            page_size=page_size,
            uncovered=uncovered,
            background=background,
            name=name,
            start=start,
        )

    async def adopt_in_steps(
        self,
        fd: int,
        areas: Sequence[Area],
        *,
        page_size: int = PAGE_SIZE,
        background: bool = False,
        whole: bool = False,
    ) -> Memory:
        """`adopt` for many areas: others have their turn meanwhile."""
        try:
            found = await in_steps(self._checked(areas, page_size, whole))
        except BaseException:
            os.close(fd)
            raise
        return self._adopt(fd, lambda: found, page_size=page_size, background=background)

    def _adopt(
        self,
        fd: int,
        areas: Callable[[], AreaMap],
        *,
        page_size: int,
        uncovered: Uncovered = "poison",
        background: bool = False,
        name: str = "",
        start: bool = True,
    ) -> Memory:
        try:
            self.server.reactor.give_way()
            if self._ending:
                raise ClosedError(f"{self!r} has ended")
            areas_map = areas()
            if len(self.memories) >= self.server.limits.memories:
                raise PeerError("it has handed over too many descriptors")
            try:
                Userfaultfd.from_fd(fd, own=False).close()
            except UsageError as error:
                raise PeerError(f"it handed over something else: {error}") from error
            self._check_pages(areas_map.pages)
            memory = self._memory(fd, areas_map, page_size, uncovered, name)
        except BaseException:
            os.close(fd)
            raise
        self.server.spoke(self)
        if self._handshake is not None:
            self._handshake.reschedule(None)
        memory.background = background
        self._add(memory)
        if self.record:
            memory.recording = self._blocks
        if start and not self._paused:
            self._start(memory)
        return memory

    def _checked(self, areas: Sequence[Area], page_size: int, whole: bool) -> Steps[AreaMap]:
        limits = self.server.limits
        if page_size not in PAGE_SIZES:
            raise PeerError(f"pages of {page_size} bytes")
        if len(areas) > limits.areas:
            raise PeerError(f"it has {len(areas)} areas, more than {limits.areas}")
        total = 0
        found = AreaMap()
        for number, area in enumerate(sorted(areas, key=attrgetter("start")), 1):
            if number % CHECKED == 0:
                yield
            start, length, offset = area.start, area.length, area.offset
            where = f"the area of {length:#x} bytes at {start:#x}"
            if area.page_size != page_size:
                raise PeerError(f"{where} has pages of {area.page_size} bytes")
            if min(start, length, offset) < 0 or not length:
                raise PeerError(f"{where} has a negative start or offset, or no length")
            if start % page_size or length % page_size:
                raise PeerError(f"{where} is not made of whole pages of {page_size} bytes")
            if start + length > _ADDRESS_MAX:
                raise PeerError(f"{where} extends past the user address space")
            total += length
            if total > limits.bytes:
                raise PeerError(f"it has more than {limits.bytes} bytes of areas")
            if total // page_size > limits.pages:
                raise PeerError(f"it has more than {limits.pages} pages")
            store = area.store
            if store is not None:
                size = max(page_size, PAGE)
                if offset % size or store.block_size % size:
                    raise PeerError(f"{where} does not begin at a page of its object")
                if offset + length > store.size + (0 if whole else -store.size % PAGE):
                    raise PeerError(
                        f"{where} ends behind its object: {offset} + {length} of {store.size}"
                    )
            if area.states is not None and len(area.states) != length // page_size:
                raise PeerError(f"{where} has states of {len(area.states)} pages")
            try:
                found.add(area)
            except ValueError as error:
                raise PeerError(str(error)) from None
        return found

    def _check_pages(self, pages: int) -> None:
        """Raise PeerError if so many more are more than the limits allow."""
        limits, server, uid = self.server.limits, self.server, self.peer.uid
        if self.pages + pages > limits.pages:
            raise PeerError(f"it has more than {limits.pages} pages")
        if not is_trusted(uid) and server.pages_of(uid) + pages > limits.user_pages:
            raise PeerError(f"the user {uid} has more than {limits.user_pages} pages")
        if server.pages_of() + pages > limits.all_pages:
            raise PeerError(f"all clients together have more than {limits.all_pages} pages")

    def _add(self, memory: Memory) -> None:
        memory.charged = memory.areas.pages
        self.pages += memory.charged
        self.memories.append(memory)

    def _memory(
        self, fd: int, areas: AreaMap, page_size: int, uncovered: Uncovered, name: str
    ) -> Memory:
        return Memory(
            self.server.reactor,
            fd,
            areas,
            share=self._share,
            uncovered=uncovered,
            readahead=self.server.readahead,
            page_size=page_size,
            name=name or f"of process {self.peer.pid}",
            forked=self._forked,
            gone=self._gone,
            failed=self._failed,
            reserve=self.server.reserve,
        )

    def _start(self, memory: Memory) -> None:
        memory.start()
        store = self.source
        if self.prefetch is not None and store is not None:
            why_not = self.prefetch.difference(store.version, store.size)
            if why_not is not None:
                log.warning("%r: nothing is brought ahead: %s", self, why_not)
            else:
                self._run(partial(memory.prefetch, store, self.prefetch.blocks(store.block_size)))
        if memory.background:
            self._run(memory.complete)

    def start_all(self) -> None:
        """Serve what was adopted with ``start=False``, or stopped by `pause`."""
        if not self._paused:
            return
        self._paused = False
        for memory in list(self.memories):
            memory.resume()
            if memory.background:
                self._run(memory.complete)
        if self.alone:
            self.channel.hang_up()  # so that it notices that the server it knows is gone
        if self._connected and not self._ending:
            self._run(self._until_eof)

    def pause(self) -> None:
        """Read and fill nothing until `start_all`."""
        self._paused = True
        for task in self._tasks:
            task.cancel()
        for memory in self.memories:
            memory.pause()

    async def settled(self) -> None:
        """Until everything that was heard of its memory is noted down."""
        for memory in list(self.memories):
            await memory.settled()

    def to_hand_over(self) -> list[Memory]:
        """What a successor of this server has to be given: all memory; of a client that reconnects
        by itself only that of its children."""
        return [
            memory
            for memory in self.memories
            if not memory.closed and (memory.sole or not self.reconnects)
        ]

    @property
    def connected(self) -> bool:
        """Whether it ends when it closes the connection."""
        return self._connected

    def restore(self, connected: bool) -> None:
        """As if it had talked already: another server has."""
        self.talked.set()
        self._connected = connected
        self._paused = True
        self.peer.watch(self._peer_ended)

    def _run(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        task = begin(function)
        self._tasks.add(task)
        task.add_done_callback(self._ran)

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%r: %s", self, task.exception())

    def keep_while_connected(self) -> None:
        """The client ends when it closes the connection."""
        if not self._connected:
            self._connected = True
            if not self._paused:
                self._run(self._until_eof)

    async def _until_eof(self) -> None:
        try:
            await self.channel.wait_eof()
        except PeerError as error:
            log.warning("%r is dropped: %s", self, error)
        if not self._ending:
            self._hung_up()

    def _hung_up(self) -> None:
        """It is done with us, but processes that have nobody else are not."""
        for memory in list(self.memories):
            if self._is_sole(memory) and memory.probe():
                continue
            memory.close()
            self._gone(memory)

    def _is_sole(self, memory: Memory) -> bool:
        return memory.sole or self.complete_on_close

    async def store_for(self, source: Any, **options: Any) -> BlockStore:
        """The store of an object, opened, and shared by all who are served from it.

        ``source`` is what `aiouffd.open` takes, with its options. One that is given as a URL or a
        path is looked at anew: clients before have what was there for as long as they live, this
        one has what is there now. It is closed a while after its last client. A `Source` stays
        open until the server closes. Raises what opening it raises.
        """
        return await self.server.stores.get(source, options, self)

    # ---------------------------------------------------------------- events

    def _forked(self, parent: Memory, fd: int) -> Steps[None]:
        """A fork: the child's memory is a copy, with a descriptor of its own. In steps."""
        name = f"a child of {parent.name}"
        left = fd
        try:
            if not self._may_fork(parent):
                log.error(
                    "%r has too many children or pages, or has ended; %s gets errors", self, name
                )
                left = -1
                ranges = [
                    (area.start, area.length, area.page_size)
                    for area in parent.areas
                    if area.store is not None
                ]
                self.server.run(partial(refuse, fd, ranges, name))
                return
            pages = parent.areas.pages
            self.pages += pages  # already, for there may be more than one at a time
            try:
                areas = yield from parent.areas.copying()
            finally:
                self.pages -= pages
            left = -1
            memory = self._memory(fd, areas, parent.page_size, parent.uncovered, name)
        finally:
            if left >= 0:
                os.close(left)
        memory.sole = True
        memory.background = parent.background
        memory.recording = parent.recording
        self._add(memory)
        self._start(memory)

    def _may_fork(self, parent: Memory) -> bool:
        if self._ending or len(self.memories) >= self.server.limits.memories:
            return False
        try:
            self._check_pages(parent.areas.pages)
        except PeerError:
            return False
        return True

    def _gone(self, memory: Memory) -> None:
        if memory in self.memories:
            self.memories.remove(memory)
            self.pages -= memory.charged
            self._past += memory.stats
        self._check_ended()

    def _failed(self, memory: Memory, error: BaseException) -> bool:
        log.error("%r: %s", memory, error)
        # Whose memory a forked child's is, or one that somebody else has handed over, is not known.
        if self.on_failure == "kill" and not self._is_sole(memory) and self.peer.kill():
            log.error("%r: it was killed, because on_failure is 'kill'", self)
            return True
        return False

    def probe(self) -> None:
        """End what belongs to processes that have ended."""
        for memory in list(self.memories):
            memory.probe()
        self._check_ended()

    def _check_ended(self) -> None:
        if not self.memories and self.talked.is_set() and not self._ending:
            self.server._end(self)

    # ------------------------------------------------------------------- talk

    async def _talk(self) -> None:
        """The whole life of the connection, but for what is served."""
        self.peer.watch(self._peer_ended)
        try:
            async with asyncio.timeout(self.server.limits.handshake) as self._handshake:
                if self.server.on_client is not None:
                    await self._introduce(self.server.on_client)
                await self.server.dialect.talk(self)
        finally:
            self.talked.set()
            self._handshake = None
        self._check_ended()

    async def _introduce(self, on_client: Callable[[Client], Awaitable[None]]) -> None:
        try:
            await on_client(self)
        except (AiouffdError, OSError) as error:
            refusal = getattr(self.server.dialect, "refusal", None)
            if refusal is not None:
                # What others than PeerError say may be nobody's business.
                text = error.message if isinstance(error, PeerError) else "the server's own reasons"
                await self.channel.dismiss(refusal(f"turned away: {text}", False), 1.0)
            raise PeerError(f"it is turned away: {error}") from error

    def _peer_ended(self) -> None:
        # What it has said before its end may not be heard yet: the talk ends with the connection.
        self.probe()

    # ------------------------------------------------------------------ stats

    @property
    def stats(self) -> MemoryStats:
        """What was done for it so far."""
        total = MemoryStats()
        total += self._past
        for memory in self.memories:
            total += memory.stats
        return total

    def working_set(self, source: BlockStore | None = None) -> WorkingSet:
        """What was needed so far of an object (the default one), if ``record`` was set."""
        store = source or self.source
        if store is None or not self.record:
            raise UsageError("nothing was recorded", hint="set client.record in on_client")
        size = store.block_size
        return WorkingSet(
            (
                (block * size, min(size, store.size - block * size))
                for of, block in self._blocks
                if of is store
            ),
            size=store.size,
            version=store.version,
            source=self.server.stores.name_of(store),
        )

    # -------------------------------------------------------------------- end

    async def complete(self) -> None:
        """Bring everything that is missing in all of its memory."""
        done = set[Memory]()
        while more := [memory for memory in self.memories if memory not in done]:
            done.update(more)  # others may be forked meanwhile
            await asyncio.gather(*(memory.complete() for memory in more))

    def kill(self) -> bool:
        """End the process (SIGKILL through its pidfd)."""
        return self.peer.kill()

    def close(self, *, handed: bool = False) -> None:
        """Serve it no more. Idempotent.

        :param handed: another server has it.
        """
        if self._ending:
            return
        self._ending = True
        for task in self._tasks:
            task.cancel()
        try:
            while self.memories:
                memory = self.memories.pop()
                memory.sole = self._is_sole(memory)
                self._past += memory.stats
                try:
                    if handed:
                        memory.let_go()
                    else:
                        memory.close()
                except Exception as error:
                    # The others are to be closed all the same.
                    log.error("%r could not be closed: %r", memory, error)
        finally:
            self.pages = 0
            self.channel.close()
            self.peer.close()
            self.ended.set()

    async def give_up(self) -> None:
        """Make errors of what is missing wherever nobody else has a copy of the descriptor, and
        let go of that: `close` in steps."""
        for memory in [memory for memory in self.memories if self._is_sole(memory)]:
            await memory.give_up()

    def __repr__(self) -> str:
        return f"<Client {self.number}, process {self.peer.pid}>"
