"""A lazy restore from beginning to end: what takes the place of ``criu lazy-pages``."""

from __future__ import annotations

import asyncio
import os
import ssl as ssl_module
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from ...errors import ClosedError, UsageError
from ...foreign.blocks import KEEP
from ...foreign.stats import MemoryStats
from ...util.once import Once, cancelled_from_outside
from ..client import Limits
from ..peer import Policy, same_user
from ..server import Server, listen
from .dialect import CriuDialect
from .images import Dump, ImageSet, Where, load
from .page_server import PageServer

__all__ = ["SOCKET", "CriuServer", "serve_images"]

#: Name of the socket in the work directory; ``criu restore`` knows no other.
SOCKET: Final = "lazy-pages.socket"

#: Bytes of blocks that are kept per file while there is one restore.
KEEP_ONCE: Final = 4 << 20
#: Longest path that fits into a socket's address, in bytes.
_PATH_MAX: Final = 107
#: Our own images say how much there is, not the peer; and a restore takes its time.
_LIMITS: Final = Limits(
    memories=1 << 16,
    areas=1 << 24,
    bytes=1 << 47,
    pages=1 << 35,
    all_pages=1 << 35,
    user_pages=1 << 35,
    handshake=24 * 3600.0,
)


class CriuServer:
    """Serves ``criu restore --lazy-pages``; use it with ``async with``.

    ::

        async with CriuServer("/var/dump") as server:   # criu restore may be started now
            await server.over()

    :param images: a directory, a URL to which names are appended (``s3://bucket/dump/``), a mapping
        from names to sources, or an `ImageSet`.
    :param work_dir: where the socket is made: what criu is given as ``--work-dir``. By default the
        directory of the images, as criu has it; for images elsewhere the current directory.
    :param parents: images of the dumps that this one builds on, nearest first, where they are not
        found under the name ``parent``.
    :param page_server: ``host:port`` of the page server that has what ``criu dump --lazy-pages``
        left to it, or a `PageServer`, which is closed at the end.
    :param page_server_head: see `PageServer`: 24 for a CRIU before 4.2.
    :param page_server_tls: an ssl.SSLContext.
    :param complete: bring everything once the restore is finished, and end with that.
    :param keep: serve any number of restores of the same images.
    :param everything: serve also what CRIU restores itself; for restorers that do not.
    :param allow: who may be served; see `listen`.
    :param block_size: bytes fetched at a time; see `listen`.
    :param deadline: seconds after which a page that a process waits for has failed, and becomes an
        error. By default failures that may pass are waited out.
    :param options: what the sources of the images take besides their names.

    Entering raises ImageError for images that are broken, UnsupportedError without protobuf,
    UsageError, OSError when the socket cannot be made, and what the sources raise. Leaving waits
    until a restore under way is over; `aclose` has the choice. Belongs to one loop.
    """

    def __init__(
        self,
        images: Where | ImageSet,
        *,
        work_dir: str | os.PathLike[str] | None = None,
        parents: Sequence[Where] = (),
        page_server: str | PageServer | None = None,
        page_server_head: int = 32,
        page_server_tls: ssl_module.SSLContext | None = None,
        complete: bool = True,
        keep: bool = False,
        everything: bool = False,
        allow: Policy = same_user,
        block_size: int | None = None,
        deadline: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(images, ImageSet):
            images = ImageSet(images, parents=parents, **(options or {}))
        elif parents or options:
            raise UsageError("parents and options belong to the ImageSet, if there is one")
        if isinstance(page_server, str):
            page_server = PageServer(page_server, head=page_server_head, tls=page_server_tls)
        self._images = images
        self._folder = Path(work_dir) if work_dir is not None else images.folder or Path()
        self._page_server = page_server
        self._complete, self._keep, self._everything = complete, keep, everything
        self._allow, self._block_size, self._deadline = allow, block_size, deadline
        self._folder_fd = -1
        self._closed = self._is_open = False
        self._opening: Once[None] = Once("opening the restore's server", abandon=True)
        self._settling: Once[None] = Once("waiting for restores", keep_failure=True, abandon=True)
        self._ending: Once[None] = Once("closing the restore's server", keep_failure=True)
        self.dialect: CriuDialect
        self.server: Server

    @property
    def path(self) -> Path:
        """The socket."""
        return self._folder / SOCKET

    @property
    def stats(self) -> MemoryStats:
        """What was done for all processes."""
        return self.server.stats

    async def __aenter__(self) -> CriuServer:
        if self._closed:
            raise ClosedError(f"{self!r} is closed")
        try:
            await self._opening(self._open, self._close_all)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            raise ClosedError(f"{self!r} was closed while it opened") from None
        return self

    async def _open(self) -> None:
        try:
            dump = await load(self._images, everything=self._everything)
            if self._page_server is not None and _needs(dump):
                await self._page_server.connect()
            self.dialect = CriuDialect(
                dump, page_server=self._page_server, complete=self._complete, keep=self._keep
            )
            self.server = listen(
                self._bindable(),
                dialect=self.dialect,
                allow=self._allow,
                limits=_LIMITS,
                # What is left of a restore cannot be told to another process.
                handover=False,
                block_size=self._block_size,
                deadline=self._deadline,
                # One restore needs a block again only for children that are forked meanwhile.
                keep=KEEP if self._keep else KEEP_ONCE,
            )
            await self.server.open()
            self._is_open = True
        except BaseException:
            await self._close_rest()
            raise

    def _bindable(self) -> Path:
        """A name of the socket that is short enough. criu uses a relative one, in its process."""
        if len(os.fsencode(self.path)) <= _PATH_MAX:
            return self.path
        self._folder_fd = os.open(self._folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return Path(f"/proc/self/fd/{self._folder_fd}") / SOCKET

    async def over(self) -> None:
        """Until the restore is finished and has all of its memory; see `CriuDialect.over`."""
        await self.dialect.over()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self, *, now: bool = False) -> None:
        """Accept no restore any more, wait until those under way are over, and close. Idempotent.

        With ``now``, or when this is cancelled, nothing is waited for: a restore then fails, and of
        processes that were restored what is missing becomes an error (SIGBUS).
        """
        self._closed = True
        try:
            if not now:
                await self._settling(self._settle)
        finally:
            if now or not self._settling.running:
                await self._ending.surely(self._close)

    async def _settle(self) -> None:
        await self._opening.stop()
        if self._is_open:
            self.server.stop_listening()
            await self.dialect.settle()

    async def _close(self) -> None:
        try:
            await self._opening.stop()
        finally:
            await self._close_all()

    async def _close_all(self) -> None:
        try:
            if self._is_open:
                await self.dialect.give_up()
                await self._give_up()
        finally:
            try:
                if self._is_open:
                    await self.server.aclose()
            finally:
                self._is_open = False
                await self._close_rest()

    async def _give_up(self) -> None:
        """Errors for what is missing of whoever is still served, and would see zeros instead."""
        for client in list(self.server.clients):
            client.complete_on_close = False
            for memory in list(client.memories):
                await memory.give_up()

    async def _close_rest(self) -> None:
        if self._folder_fd >= 0:
            os.close(self._folder_fd)
            self._folder_fd = -1
        if self._page_server is not None:
            await self._page_server.aclose()

    def __repr__(self) -> str:
        return f"<CriuServer {self._images.name}>"


def _needs(dump: Dump) -> bool:
    return any(task.elsewhere for task in dump.tasks.values())


async def serve_images(
    images: Where | ImageSet,
    *,
    stop: asyncio.Event | None = None,
    ready: Callable[[CriuServer], None] | None = None,
    **settings: Any,
) -> MemoryStats:
    """Serve one restore of ``images`` (with ``keep=True`` any number), until it is over, or
    ``stop`` is set, after which what is under way is finished. Returns what was done.

    ``ready`` is called once ``criu restore`` may be started; ``settings`` and errors are those of
    `CriuServer`. Raises PeerError when the restore fails, SourceError when memory could not be
    brought.
    """
    async with CriuServer(images, **settings) as server:
        if ready is not None:
            ready(server)
        over = asyncio.ensure_future(server.over())
        stopped = asyncio.ensure_future(stop.wait()) if stop is not None else None
        try:
            waited = [over] if stopped is None else [over, stopped]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                over.result()
        finally:
            for future in (over, stopped):
                if future is not None:
                    future.cancel()
    return server.stats
