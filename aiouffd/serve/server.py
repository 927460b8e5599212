"""The listening socket, and what all clients of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ClosedError, PeerError, UsageError
from ..workingset import WorkingSet
from .blocks import BLOCK_SIZE, KEEP, BlockStore
from .channel import Channel
from .client import Client, Limits, OnFailure
from .dialects import Dialect, dialect_named
from .handover import Handover, check_same_object, take_over
from .peer import Peer, Policy, same_user
from .reactor import Reactor
from .reserve import Reserve
from .stats import MemoryStats
from .stores import Stores

__all__ = ["Server", "listen"]

log = logging.getLogger("aiouffd")

#: Seconds between looks for processes that have ended without a sign.
PROBE = 2.0
#: Connections accepted in one turn of the loop (others are served meanwhile), and the pause when no
#: descriptor is free, seconds.
ACCEPTS, ACCEPT_PAUSE = 4, 0.1
#: How many times in so many seconds it is told that a process is dropped for the same reason, and
#: how many such cases are told in that time.
TELL_TIMES, TELL_AGAIN, TOLD_MAX = 5, 30.0, 100

OnClient = Callable[[Client], Awaitable[None]]


def listen(
    path: str | os.PathLike[str],
    *,
    source: Any = None,
    dialect: str | Dialect = "native",
    on_client: OnClient | None = None,
    allow: Policy = same_user,
    mode: int = 0o600,
    limits: Limits | None = None,
    max_clients: int = 1024,
    block_size: int | None = None,
    keep: int = KEEP,
    readahead: int = 0,
    deadline: float | None = None,
    on_failure: OnFailure | None = None,
    prefetch: WorkingSet | str | os.PathLike[str] | None = None,
    record: bool = False,
    handover: bool = True,
    take_over: bool = False,
    **options: Any,
) -> Server:
    """Serve the memory of processes that connect to a Unix socket; use it with ``async with``.

    ::

        async with aiouffd.serve.listen(path, source="s3://b/mem", dialect="firecracker"):
            ...

    :param path: of the socket, which is made, and removed at the end. One that nobody listens on
        any more is replaced.
    :param source: the object that clients' memory shows: what `aiouffd.open` takes. None where
        ``on_client`` or the dialect says.
    :param dialect: ``"firecracker"``, ``"native"``, or an object with ``talk``.
    :param on_client: a coroutine function that is called with each `Client` before it is talked
        with; may set its ``source``, ``prefetch`` and ``record``, and raises to turn it away.
    :param allow: who may be served, by `Peer`; `same_user` by default.
    :param mode: permissions of the socket.
    :param limits: what a client may ask for.
    :param max_clients: connections at a time; more are closed at once.
    :param block_size: bytes fetched at a time: a power of two, 64 KiB by default.
    :param keep: bytes of fetched blocks that are kept for the next client.
    :param readahead: bytes to bring ahead of sequential access, per client.
    :param deadline: seconds after which a block that a client waits for has failed. By default
        failures that may pass are waited out.
    :param on_failure: what becomes of who waits for a block that cannot be had: ``"poison"``, an
        error (SIGBUS; Linux 6.6), or ``"kill"``, the end of the process, which is the default for
        Firecracker, because KVM may take a page with an error for a device.
    :param prefetch: a working set that is brought ahead for every client.
    :param record: note what clients need; `Client.working_set` has it.
    :param handover: let a successor take over, through a second socket beside the first.
    :param take_over: be the successor of the server at ``path``, if there is one.
    :param options: the rest goes to the source.

    Raises, when entered, what opening the source raises, OSError when the socket cannot be made,
    and UsageError.
    """
    if prefetch is not None and not isinstance(prefetch, WorkingSet):
        prefetch = WorkingSet.load(prefetch)
    dialect = dialect_named(dialect)
    if on_failure is None:
        on_failure = getattr(dialect, "on_failure", "poison")
    assert on_failure is not None
    return Server(
        Path(path),
        source=source,
        dialect=dialect,
        on_client=on_client,
        allow=allow,
        mode=mode,
        limits=limits or Limits(),
        max_clients=max_clients,
        block_size=block_size or BLOCK_SIZE,
        keep=keep,
        readahead=readahead,
        deadline=deadline,
        on_failure=on_failure,
        prefetch=prefetch,
        record=record,
        handover=handover,
        take_over=take_over,
        options=options,
    )


class Server:
    """Made by `listen`. Belongs to the loop that enters it."""

    reactor: Reactor
    reserve: Reserve

    def __init__(
        self,
        path: Path,
        *,
        source: Any,
        dialect: Dialect,
        on_client: OnClient | None,
        allow: Policy,
        mode: int,
        limits: Limits,
        max_clients: int,
        block_size: int,
        keep: int,
        readahead: int,
        deadline: float | None,
        on_failure: OnFailure,
        prefetch: WorkingSet | None,
        record: bool,
        handover: bool,
        take_over: bool,
        options: dict[str, Any],
    ) -> None:
        if on_failure not in ("poison", "kill"):
            raise UsageError(f"on_failure is 'poison' or 'kill', not {on_failure!r}")
        if not isinstance(mode, int) or not 0 <= mode <= 0o777:
            raise UsageError(f"mode is a number such as 0o600, not {mode!r}")
        if readahead < 0 or keep < 0 or max_clients < 1:
            raise UsageError("readahead and keep are bytes, max_clients is at least 1")
        self.path = path
        self.dialect = dialect
        self.on_client = on_client
        self.limits = limits
        self.readahead = readahead
        self.on_failure: OnFailure = on_failure
        self.prefetch = prefetch
        self.record = record
        #: The store of ``source``.
        self.store: BlockStore | None = None
        self.clients: list[Client] = []
        #: Clients that were turned away or dropped for what they sent.
        self.refused = 0
        self._source, self._options = source, options
        self._allow, self.mode = allow, mode
        self._may_hand_over, self._take_over = handover, take_over
        self._handover: Handover | None = None
        #: Set once a successor serves all clients. Nothing is left to do but close.
        self.taken_over = asyncio.Event()
        self._max_clients = max_clients
        #: What clients are served from.
        self.stores = Stores(block_size=block_size, keep=keep, deadline=deadline)
        self._past = MemoryStats()
        self._listening: socket.socket | None = None
        self._identity: tuple[int, int] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._number = 0
        self._told: dict[tuple[int, str], tuple[float, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._open = self._closed = self._handed = False

    # ------------------------------------------------------------------- open

    async def open(self) -> Server:
        """Open the source and listen. What ``async with`` does."""
        if self._closed:
            raise ClosedError("the server is closed")
        if self._open:
            return self
        self._loop = asyncio.get_running_loop()
        self.reactor, self.reserve = Reactor(), Reserve()
        try:
            if self._source is not None:
                self.store = await self.stores.get(self._source, self._options, self)
            if self._take_over:
                self._listening = await take_over(self)
            self._listen()
            if self._may_hand_over:
                self._handover = Handover(self)
        except BaseException:
            await self._close_all()
            raise
        self._open = True
        return self

    async def __aenter__(self) -> Server:
        return await self.open()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _listen(self) -> None:
        if self._listening is None:
            self._bind()
        assert self._listening is not None
        self._listening.setblocking(False)
        status = self.path.stat()
        self._identity = (status.st_dev, status.st_ino)
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def _bind(self) -> None:
        self._remove_stale()
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # The mode has to be right from the first moment on.
        before = os.umask(0o777 & ~self.mode)
        try:
            self._listening.bind(str(self.path))
        except BaseException as error:
            self._listening.close()
            self._listening = None
            if isinstance(error, OSError):
                raise self._named(error) from error
            raise
        finally:
            os.umask(before)
        self._listening.listen(128)

    def _named(self, error: OSError) -> Exception:
        """Why the socket cannot be made, with its name."""
        if error.errno is None:  # Python's own check
            return UsageError(f"{self.path}: {error}", hint="use a shorter path for the socket")
        text = os.strerror(error.errno)
        if error.errno == errno.EADDRINUSE:
            text += " (another server, which a successor with take_over could continue, or a file)"
        return OSError(error.errno, text, str(self.path))

    def _remove_stale(self) -> None:
        """A socket that a dead server left is in the way; anything else stays."""
        try:
            if not stat.S_ISSOCK(self.path.lstat().st_mode):
                return
        except OSError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self.path))
            except ConnectionRefusedError:
                self.path.unlink(missing_ok=True)
            except OSError:
                pass

    # ---------------------------------------------------------------- clients

    def _accept(self) -> None:
        listening = self._listening
        for _ in range(ACCEPTS):
            if listening is None:
                return
            try:
                connection, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and self.reserve.give():
                    # Turn it away, which takes a descriptor, instead of letting it wait for ever.
                    with contextlib.suppress(OSError):
                        listening.accept()[0].close()
                    self.reserve.fill()
                    self.refused += 1
                    log.error("no descriptor is free for another client")
                    continue
                log.error("accepting a client failed: %s", error)
                self._loop.remove_reader(listening.fileno())
                self._loop.call_later(ACCEPT_PAUSE, self._accept_again)
                return
            self._welcome(connection)

    def _accept_again(self) -> None:
        if self._listening is not None:
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def _welcome(self, connection: socket.socket) -> None:
        self.reactor.give_way()
        peer = Peer.of(connection)
        try:
            welcome = len(self.clients) < self._max_clients and self._allow(peer)
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": f"whether {peer!r} may be served is not known", "exception": error}
            )
            welcome = False
        if not welcome:
            log.warning("%r is turned away", peer)
            self.refused += 1
            peer.close()
            connection.close()
            return
        self._number += 1
        client = Client(self, Channel(connection, peer), self._number)
        self.clients.append(client)
        task = self._loop.create_task(self._talk(client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._look_later()

    async def _talk(self, client: Client) -> None:
        try:
            await client._talk()
        except (PeerError, ClosedError, TimeoutError) as error:
            if not client.ended.is_set():
                self._tell(client, str(error) or "it took too long")
                self.refused += 1
                self._end(client)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._loop.call_exception_handler(
                {"message": f"serving {client!r} failed", "exception": error}
            )
            self.refused += 1
            self._end(client)
        finally:
            if client.ended.is_set():
                self.stores.release(client)  # what it got since

    def _tell(self, client: Client, why: str) -> None:
        """Of clients that come again and again for the same there are a few lines in a while."""
        now = self._loop.time()
        self._told = {
            key: (since, times)
            for key, (since, times) in self._told.items()
            if now - since < TELL_AGAIN
        }
        since, times = self._told.get((client.peer.pid, why), (now, 0))
        if times < TELL_TIMES and len(self._told) < TOLD_MAX:
            self._told[client.peer.pid, why] = since, times + 1
            log.warning("%r is dropped: %s", client, why)

    def _end(self, client: Client, *, handed: bool = False) -> None:
        if client in self.clients:
            self.clients.remove(client)
            client.close(handed=handed)
            self.stores.release(client)
            self._past += client.stats

    # --------------------------------------------------------------- hand-over

    def reference_of(self, store: BlockStore) -> dict[str, Any]:
        """How a successor finds the object of ``store``. Raises UsageError if it cannot."""
        source, options = self.stores.given(store)
        found: dict[str, Any] = {"size": store.size, "version": store.version}
        if store is not self.store:
            if not isinstance(source, str):
                raise UsageError(f"a successor cannot open {source!r}", hint="serve it by its URL")
            found |= {"source": source, "options": options}
        return found

    async def store_of(self, reference: dict[str, Any] | None, client: Client) -> BlockStore | None:
        """The store that another server's `reference_of` means, for ``client``."""
        if reference is None:
            return None
        if "source" in reference:
            store = await client.store_for(reference["source"], **reference["options"])
            check_same_object(self.stores.name_of(store), store.size, store.version, reference)
            return store
        self.check_shows(reference)
        return self.store

    def shown(self) -> dict[str, Any] | None:
        """The `reference_of` our own object, if any client's memory shows it."""
        if self.store is None or not any(
            area.store is self.store
            for client in self.clients
            for memory in client.memories
            for area in memory.areas
        ):
            return None
        return self.reference_of(self.store)

    def check_shows(self, reference: dict[str, Any]) -> None:
        """Raise SourceChangedError if our object is not what another server's clients have of its
        own, UsageError if we have none."""
        store = self.store
        if store is None:
            raise UsageError("the other server has an object, and this one none", hint="source=")
        check_same_object(self.stores.name_of(store), store.size, store.version, reference)

    def listening_fd(self) -> int:
        """The listening socket's descriptor; -1 if there is none."""
        return -1 if self._listening is None else self._listening.fileno()

    async def quiesce(self) -> None:
        """Stop reading: no client is accepted or served until `go_on`."""
        if self._listening is not None:
            self._loop.remove_reader(self._listening.fileno())
        for client in list(self.clients):
            if not client.reconnects:
                await client.talked.wait()
        for client in self.clients:
            client.pause()

    def go_on(self) -> None:
        """Serve again after `quiesce`."""
        if self._closed:
            return
        for client in self.clients:
            client.start_all()
        self._accept_again()

    def was_taken_over(self) -> None:
        """A successor serves; what is left here is let go."""
        self._handed = True
        self.taken_over.set()
        for client in list(self.clients):
            self._end(client, handed=True)

    def restored(self, channel: Channel) -> Client:
        """A client that another server had."""
        self._number += 1
        client = Client(self, channel, self._number)
        self.clients.append(client)
        self._look_later()
        return client

    def drop_restored(self, client: Client) -> None:
        """Forget it: the other server goes on with it."""
        self._end(client, handed=True)

    # ----------------------------------------------------------------- looking

    def _probe(self) -> None:
        self._timer = None
        for client in list(self.clients):
            client.probe()
        if self.clients:
            self._look_later()

    def _look_later(self) -> None:
        if self._timer is None and not self._closed:
            self._timer = self._loop.call_later(PROBE, self._probe)

    @property
    def stats(self) -> MemoryStats:
        """What was done for all clients, also those that have ended."""
        total = MemoryStats()
        total += self._past
        for client in self.clients:
            total += client.stats
        return total

    # -------------------------------------------------------------------- end

    def stop_listening(self) -> None:
        """Accept no more clients, and remove the socket. Idempotent."""
        listening, self._listening = self._listening, None
        if listening is None:
            return
        self._loop.remove_reader(listening.fileno())
        with contextlib.suppress(OSError):
            status = self.path.lstat()
            if not self._handed and (status.st_dev, status.st_ino) == self._identity:
                self.path.unlink()
        listening.close()

    async def aclose(self) -> None:
        """Serve nobody any more. Clients that keep a copy of their descriptor (all but CRIU's)
        stay blocked at their next fault until somebody serves them; those that keep none are given
        everything first, which may take long. Idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._open:
                self.stop_listening()
                last = [client.complete() for client in self.clients if client.complete_on_close]
                for failure in await asyncio.gather(*last, return_exceptions=True):
                    if isinstance(failure, BaseException):
                        log.error("a client could not be given everything: %s", failure)
        finally:
            await self._close_all()

    async def _close_all(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._handover is not None:
            await self._handover.aclose()
            if not self._handed:
                self._handover.remove()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in list(self.clients):
            self._end(client)
        self.stop_listening()
        await self.stores.aclose()
        self.reactor.close()
        self.reserve.close()

    def __repr__(self) -> str:
        return f"<Server at {self.path}, {len(self.clients)} clients>"
