"""CRIU's dialect: ``criu restore --lazy-pages`` and its ``lazy-pages.socket``.

The restorer connects once for a whole tree of processes, and says for each task, in any order:

1. its pid as in the images, a native 32-bit integer;
2. for a dead task, whose pid is negative, nothing more; for any other a byte with one descriptor,
   the userfaultfd. The stream has no frames, so neither may be read together with what follows.

Then, when all tasks are restored, a last word. It says nothing else and hears nothing. If it hangs
up before, the restore has failed.

Until the last word only faults are served: mappings are still being moved to their places, and
nothing tells where they are meanwhile. After it everything that is missing is brought. For the
restorer has closed its own copies of the descriptors: when ours goes, the kernel lets what is
missing read as zeros, and nobody is told. So a descriptor is closed when nothing is missing; and
what could not be brought for good is poisoned before.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from typing import TYPE_CHECKING, Final

from ...errors import ClosedError, PeerError, SourceError, UsageError
from ...foreign.areas import Area
from ...foreign.blocks import end_all
from .images import Dump, TaskImage
from .page_server import PageServer, PageServerSource
from .plan import ELSEWHERE

if TYPE_CHECKING:
    from ...foreign.blocks import BlockStore
    from ...foreign.memory import Memory
    from ..client import Client

__all__ = ["CriuDialect"]

log = logging.getLogger("aiouffd")

_PID: Final = struct.Struct("=i")
#: "RSTF", restore finished.
_FINISHED: Final = struct.pack("=I", 0x52535446)


class CriuDialect:
    """Serves restores of one dump.

    :param dump: what `load` has read.
    :param page_server: where pages are that the dump has left to one.
    :param complete: bring everything, once the restore is finished, and let go of it then. Without
        it the restored processes depend on this server for as long as they live.
    :param keep: serve any number of restores. By default one is accepted, and the socket closed.

    Raises UsageError where a page server is needed and none given. Belongs to one loop.
    """

    name = "criu"

    def __init__(
        self,
        dump: Dump,
        *,
        page_server: PageServer | None = None,
        complete: bool = True,
        keep: bool = False,
    ) -> None:
        if page_server is None and any(task.elsewhere for task in dump.tasks.values()):
            raise UsageError(
                f"{dump.images.name} has left pages to a page server",
                hint="say where it is; with criu dump --lazy-pages it is the dump itself",
            )
        self._dump = dump
        self._page_server = page_server
        self._keep = keep
        self._remote: dict[int, PageServerSource] = {}
        self._talks: set[asyncio.Task[None]] = set()
        self._silent: set[Client] = set()
        self._over = asyncio.Event()
        # Set once restored processes are to have everything.
        self._finish = asyncio.Event()
        if complete:
            self._finish.set()
        self._failure: Exception | None = None
        #: Restores that began, that said their last word, and that failed.
        self.begun = self.finished = self.failed = 0

    async def over(self) -> None:
        """Until the one restore has all of its memory, or its processes have ended. With
        ``keep`` there is no end.

        Raises PeerError if it has failed, SourceError if part of the memory could not be brought.
        """
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    async def settle(self) -> None:
        """Until no restore is under way, and all that were have what `over` says. Brings
        everything also where ``complete`` was not asked for."""
        self._finish.set()
        while self._talks:
            await asyncio.wait(self._talks)

    async def give_up(self) -> None:
        """End the restores that are under way: they have failed."""
        talks = list(self._talks)
        for talk in talks:
            talk.cancel()
        await end_all(self, talks)

    # ------------------------------------------------------------------- talk

    async def talk(self, client: Client) -> None:
        """One restore. Raises PeerError, see `Dialect`."""
        self._may_begin()
        # Who only looks whether we are there has not begun one.
        self._silent.add(client)
        try:
            if not await client.channel.begins():
                raise PeerError(f"{client!r} hung up without a word")
        finally:
            self._silent.discard(client)
        self._may_begin()
        self.begun += 1
        if not self._keep:
            client.server.stop_listening()
            for other in self._silent:
                other.channel.close()
        task = asyncio.current_task()
        assert task is not None
        self._talks.add(task)
        task.add_done_callback(self._talks.discard)
        try:
            await self._restored(client)
            self.finished += 1
            await self._until_finish(client)
            await self._completed(client)
        except SourceError as error:
            # Not the peer's fault, and told already.
            self.failed += 1
            self._failure = error
        except BaseException as error:
            self.failed += 1
            closed = ClosedError("the server was closed before the restore was over")
            self._failure = error if isinstance(error, Exception) else closed
            raise
        finally:
            if not self._keep:
                self._over.set()

    def _may_begin(self) -> None:
        if self.begun and not self._keep:
            raise PeerError("there is one restore, and it has begun already")

    async def _restored(self, client: Client) -> None:
        """Take the descriptors of all tasks, and wait for the last word."""
        channel, left = client.channel, dict(self._dump.tasks)
        while left:
            data, _ = await channel.recv_exactly(_PID.size)
            (pid,) = _PID.unpack(data)
            task = left.pop(abs(pid), None)
            if task is None:
                known = abs(pid) in self._dump.tasks
                raise PeerError(
                    f"{client!r} sent the task {pid}"
                    + (" twice" if known else f", which {self._dump.images.name} does not have")
                )
            if pid > 0:
                await self._adopt(client, task)
        data, _ = await channel.recv_exactly(len(_FINISHED))
        if data != _FINISHED:
            raise PeerError(f"{client!r} ended with {data.hex()} and not with RSTF")
        # From here on what the restorer says and does is nothing to us: its processes live.
        client.complete_on_close = True

    async def _adopt(self, client: Client, task: TaskImage) -> None:
        # Before its descriptor is here, so that nothing can get in between.
        areas = await self._areas_of(client, task)
        _, fds = await client.channel.recv_exactly(1, max_fds=1)
        if not fds:
            raise PeerError(f"{client!r} sent no descriptor for the task {task.pid}")
        client.adopt(fds[0], areas, uncovered="zero", name=f"of task {task.pid}")

    async def _areas_of(self, client: Client, task: TaskImage) -> list[Area]:
        if task.pieces is None:
            raise PeerError(
                f"{client!r} restores the task {task.pid}, of which there is no memory in"
                f" {self._dump.images.name}"
            )
        stores: dict[int, BlockStore] = {}
        try:
            for generation in {piece.generation for piece in task.pieces}:
                stores[generation] = await self._store(client, task, generation)
        except (SourceError, OSError) as error:
            log.error("the memory of task %d cannot be read: %s", task.pid, error)
            raise PeerError(f"the task {task.pid} cannot be served: {error}") from error
        return [
            Area(piece.start, piece.length, stores[piece.generation], piece.offset)
            for piece in task.pieces
        ]

    async def _store(self, client: Client, task: TaskImage, generation: int) -> BlockStore:
        if generation != ELSEWHERE:
            source, options = task.files[generation].source()
            return await client.store_for(source, **options)
        source = self._remote.get(task.pid)
        if source is None:
            assert self._page_server is not None
            source = PageServerSource(self._page_server, task.pid, task.elsewhere)
            self._remote[task.pid] = source
        return await client.store_for(source)

    # --------------------------------------------------------------- completing

    async def _until_finish(self, client: Client) -> None:
        """As long as its processes live, or until they are to have everything."""
        finish = asyncio.ensure_future(self._finish.wait())
        try:
            while client.memories and not finish.done():
                ended = asyncio.ensure_future(client.memories[0].ended.wait())
                try:
                    await asyncio.wait((finish, ended), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    ended.cancel()
        finally:
            finish.cancel()

    async def _completed(self, client: Client) -> None:
        """Give every process all of its memory, forked ones too, and let go of it."""
        failure: SourceError | None = None
        while client.memories:
            results = await asyncio.gather(
                *map(self._complete_one, list(client.memories)), return_exceptions=True
            )
            for result in results:
                if isinstance(result, SourceError):
                    failure = failure or result
                elif isinstance(result, BaseException):
                    raise result
        if failure is not None:
            raise failure

    async def _complete_one(self, memory: Memory) -> None:
        try:
            # What it does meanwhile may bring something to do, a fork more memories.
            while not memory.finish():
                await memory.complete()
        except SourceError as error:
            log.error("%r could not be completed: %s", memory, error)
            await memory.give_up()
            raise
