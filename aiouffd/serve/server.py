"""The listening socket, and what all clients of a server share."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import logging
import os
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import ClosedError, PeerError, UsageError
from ..fetch.workingset import WorkingSet
from ..foreign.blocks import BLOCK_SIZE, KEEP, BlockStore, end_all
from ..foreign.reactor import Reactor
from ..foreign.reserve import Reserve
from ..foreign.stats import MemoryStats
from ..util.keywords import path_of, seconds, size_in_bytes
from ..util.once import Once, cancelled_from_outside
from ..util.places import Unsafe, is_trusted
from ..util.tasks import begin, begin_surely
from ..util.unix_sockets import Identity, bind_at, identity_of, unlink_own
from ..util.usercode import tell_loop
from ..util.waiting import retrieve
from .channel import Channel
from .client import Client, Limits, OnFailure
from .dialects import Dialect, dialect_named
from .handover import Handover, check_same_object, take_over
from .peer import Peer, Policy, same_user
from .stores import Stores

__all__ = ["Server", "listen"]

log = logging.getLogger("aiouffd")

#: Seconds between looks for processes that have ended without a sign.
PROBE = 2.0
#: Connections accepted in one turn of the loop (others are served meanwhile), and the pause when no
#: descriptor is free, seconds.
ACCEPTS, ACCEPT_PAUSE = 4, 0.1
#: Connections that may wait to be accepted.
BACKLOG = 128
#: Seconds after which one that has handed nothing over may lose its place to anybody who comes.
SILENT = 1.0
#: Who is told at a time why it is turned away, and for how many seconds it is listened to then.
REFUSING, REFUSAL = 16, 1.0
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
    block_size: int | str | None = None,
    keep: int | str = KEEP,
    readahead: int | str = 0,
    deadline: float | None = None,
    on_failure: OnFailure | None = None,
    prefetch: WorkingSet | str | os.PathLike[str] | None = None,
    record: bool = False,
    handover: bool | str | os.PathLike[str] = True,
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
    :param block_size: bytes fetched at a time: a power of two, 64 KiB by default. Sizes may be
        text: "64K".
    :param keep: bytes of fetched blocks that are kept for the next client.
    :param readahead: bytes to bring ahead of sequential access, per client.
    :param deadline: seconds after which a block that a client waits for has failed. By default
        failures that may pass are waited out.
    :param on_failure: what becomes of who waits for a block that cannot be had: ``"poison"``, an
        error (SIGBUS; Linux 6.6), or ``"kill"``, the end of the process, which is the default for
        Firecracker, because KVM may take a page with an error for a device.
    :param prefetch: a working set that is brought ahead for every client.
    :param record: note what clients need; `Client.working_set` has it.
    :param handover: let a successor take over, through a second socket: ``path`` with
        ``.handover`` behind it, or another path. It is only made where nobody but root and this
        user could put another one in its place.
    :param take_over: be the successor of the server at ``path``, if there is one; give both the
        same ``handover``. Its clients get no other objects than this server was given: by
        ``source``, by the dialect, or by ``on_client``, which is called for them too.
    :param options: the rest goes to the source.

    Raises, when entered, what opening the source raises, OSError when the socket cannot be made
    (PermissionError for ``take_over`` where others may pose as the server), and UsageError.
    """
    if prefetch is not None and not isinstance(prefetch, WorkingSet):
        prefetch = WorkingSet.load(path_of("prefetch", prefetch))
    if deadline is not None:
        seconds("deadline", deadline)
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
        block_size=size_in_bytes("block_size", block_size or BLOCK_SIZE),
        keep=size_in_bytes("keep", keep),
        readahead=size_in_bytes("readahead", readahead),
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
        handover: bool | str | os.PathLike[str],
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
        #: Where a successor connects; None if there can be none.
        self.handover_path: Path | None = None
        if handover is True:
            self.handover_path = path.with_name(path.name + ".handover")
        elif handover is not False:
            self.handover_path = Path(handover)
        if take_over and self.handover_path is None:
            raise UsageError("take_over goes with handover")
        self._take_over = take_over
        self._handover: Handover | None = None
        #: Set once a successor serves all clients. Nothing is left to do but close.
        self.taken_over = asyncio.Event()
        self._max_clients = max_clients
        self._settings = {"block_size": block_size, "keep": keep, "deadline": deadline}
        #: What clients are served from.
        self.stores = Stores(**self._settings)
        self._past = MemoryStats()
        self._listening: socket.socket | None = None
        self._identity: Identity | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # Who has handed nothing over yet, the oldest first.
        self._silent: dict[Client, None] = {}
        self._number = 0
        self._told: dict[tuple[int, str], tuple[float, int]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._refusing: set[asyncio.Task[None]] = set()
        self._made = self._open = self._closed = self._handed = False
        self._opening: Once[None] = Once("opening the server", abandon=True)
        # Bringing what clients are owed first can be given up, what comes after it cannot.
        self._draining: Once[None] = Once("draining the server", keep_failure=True, abandon=True)
        self._ending: Once[None] = Once("closing the server", keep_failure=True)

    # ------------------------------------------------------------------- open

    async def open(self) -> Server:
        """Open the source and listen. What ``async with`` does. One that has failed can be tried
        again. Raises ClosedError if the server is closed, also meanwhile."""
        if self._closed:
            raise ClosedError("the server is closed")
        try:
            await self._opening(self._open_all, self._close_all)
        except asyncio.CancelledError:
            if cancelled_from_outside():
                raise
            raise ClosedError("the server was closed while it opened") from None
        return self

    async def _open_all(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.reactor, self.reserve = Reactor(), Reserve()
        self._made = True
        try:
            if self.stores.closed:  # by an attempt before
                self.stores = Stores(**self._settings)
            if self._source is not None:
                self.store = await self.stores.get(self._source, self._options, self)
            if self._take_over:
                self._listening = await take_over(self)
            self._listen()
            self._listen_for_successor()
            self._open = True
        except BaseException:
            await self._close_all()
            raise

    def _listen_for_successor(self) -> None:
        if self.handover_path is None:
            return
        try:
            self._handover = Handover(self, self.handover_path)
        except Unsafe as error:
            log.warning(
                "%r: no successor can take over, for others could pose as one: %s"
                " (give handover= a path in a directory of your own)",
                self, error,
            )  # fmt: skip
        except OSError as error:
            raise self._named(error, self.handover_path) from error

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
            try:
                self._listening, self._identity = bind_at(self.path, self.mode)
            except OSError as error:
                raise self._named(error, self.path) from error
            self._listening.listen(BACKLOG)
        else:
            self._identity = identity_of(self.path)
        self._listening.setblocking(False)
        self._loop.add_reader(self._listening.fileno(), self._accept)

    @staticmethod
    def _named(error: OSError, path: Path) -> Exception:
        """Why a socket cannot be made, with its name."""
        if error.errno is None:  # Python's own check
            return UsageError(f"{path}: {error}", hint="use a shorter path for the socket")
        if error.errno != errno.EADDRINUSE:
            return error
        text = os.strerror(error.errno)
        text += " (another server, which a successor with take_over could continue, or a file)"
        return OSError(error.errno, text, str(path))

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
                if error.errno in (errno.EMFILE, errno.ENFILE) and self._find_descriptor(listening):
                    continue
                log.error("accepting a client failed: %s", error)
                self._loop.remove_reader(listening.fileno())
                self._loop.call_later(ACCEPT_PAUSE, self._accept_again)
                return
            self._welcome(connection)

    def _find_descriptor(self, listening: socket.socket) -> bool:
        """Do something about a client that waits, where no descriptor is free. False: nothing can
        be done."""
        silent = self._silent_one(None)
        if silent is not None:
            self._drop_silent(silent)
            return True
        if not self.reserve.give():
            return False
        # Turn it away, which takes a descriptor, instead of letting it wait for ever.
        with contextlib.suppress(OSError):
            listening.accept()[0].close()
        self.reserve.fill()
        self.refused += 1
        log.error("no descriptor is free for another client")
        return True

    def _accept_again(self) -> None:
        if self._listening is not None:
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def _welcome(self, connection: socket.socket) -> None:
        self.reactor.give_way()
        try:
            peer = Peer.of(connection)
        except OSError as error:
            connection.close()
            log.error("who has connected is not known: %s", error)
            return
        try:
            channel = Channel(connection, peer)
            why, later = self._why_not(peer)
        except BaseException:
            peer.close()
            connection.close()
            raise
        if why:
            self._tell(peer, peer, f"is turned away: {why}")
            self.refused += 1
            self._refuse(channel, why, later)
            return
        self._number += 1
        client = Client(self, channel, self._number)
        self.clients.append(client)
        self._silent[client] = None
        task = begin(partial(self._talk, client), loop=self._loop)
        self._tasks.add(task)
        task.add_done_callback(partial(self._talked, client))
        self._look_later()

    def _why_not(self, peer: Peer) -> tuple[str, bool]:
        """Why a process is not served ("": it is), and whether it may be later."""
        if not self.may_serve(peer):
            return f"the server does not serve the user {peer.uid}", False
        if not is_trusted(peer.uid):
            have = sum(client.peer.uid == peer.uid for client in self.clients)
            if have >= self.limits.user_clients:
                return f"the user {peer.uid} has {have} clients already", True
        if len(self.clients) < self._max_clients:
            return "", False
        silent = self._silent_one(peer)
        if silent is None:
            return f"the server has {len(self.clients)} clients already", True
        self._drop_silent(silent)
        return "", False

    def may_serve(self, peer: Peer) -> bool:
        """Whether ``allow`` says so. If it fails, it does not."""
        problem: BaseException | None = None
        allowed: Any = False
        try:
            allowed = self._allow(peer)
            if inspect.isawaitable(allowed):
                close = getattr(allowed, "close", None)
                if close is not None:
                    close()
                raise UsageError("allow= is a plain function, not a coroutine function")
            allowed = bool(allowed)
        except (Exception, asyncio.CancelledError) as error:
            problem, allowed = error, False
        if problem is not None:
            tell_loop(self._loop, f"whether {peer!r} may be served is not known", problem)
        return bool(allowed)

    def _silent_one(self, comer: Peer | None) -> Client | None:
        """Whom to drop of those that have handed nothing over yet, so that ``comer`` finds a place
        (None: a descriptor): the oldest of the process that has most of them."""
        if not self._silent:
            return None
        users = Counter(client.peer.uid for client in self._silent)
        processes = Counter(client.peer.pid for client in self._silent)
        # max() takes the first of several, which is the oldest.
        found = max(self._silent, key=lambda one: (users[one.peer.uid], processes[one.peer.pid]))
        if (
            comer is None
            or users[found.peer.uid] > users[comer.uid] + 1
            or processes[found.peer.pid] > processes[comer.pid] + 1
            or self._loop.time() - found.since > SILENT
        ):
            return found
        return None

    def _drop_silent(self, client: Client) -> None:
        why = "is dropped: it has handed nothing over yet, and others need its place"
        self._tell(client, client.peer, why)
        self.refused += 1
        self._end(client)

    def spoke(self, client: Client) -> None:
        """A client has handed something over."""
        self._silent.pop(client, None)

    def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do something beside everything else; cancelled, once begun, when the server closes."""

        def made(task: asyncio.Task[None]) -> None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        begin_surely(work, made, loop=self._loop)

    def pages_of(self, user: int | None = None) -> int:
        """Pages of all clients, or of those of one user."""
        return sum(
            client.pages for client in self.clients if user is None or client.peer.uid == user
        )

    # ----------------------------------------------------------------- refusing

    def _refuse(self, channel: Channel, why: str, later: bool) -> None:
        """Hang up, and if the dialect has words for it, say why before."""
        refusal = getattr(self.dialect, "refusal", None)
        if refusal is None or len(self._refusing) >= REFUSING:
            channel.peer.close()
            channel.close()
            return
        say = partial(channel.dismiss, refusal(why, later), REFUSAL)
        task = begin(say, loop=self._loop)
        self._refusing.add(task)

        def said(task: asyncio.Task[None]) -> None:
            self._refusing.discard(task)
            channel.peer.close()
            channel.close()
            retrieve(task)

        task.add_done_callback(said)

    async def _talk(self, client: Client) -> None:
        try:
            await client._talk()
        except (PeerError, ClosedError, TimeoutError) as error:
            if not client.ended.is_set():
                why = str(error) or "it took too long"
                self._tell(client, client.peer, f"is dropped: {why}")
                self.refused += 1
                self._end(client)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and cancelled_from_outside():
                raise
            if not client.ended.is_set():
                tell_loop(self._loop, f"serving {client!r} failed", error)
                self.refused += 1
                self._end(client)
        finally:
            self._silent.pop(client, None)
            if client.ended.is_set():
                self.stores.release(client)  # what it got since

    def _talked(self, client: Client, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() and not (self._closed or client.talked.is_set()):
            # By somebody who does not know what it is: the process would wait for an answer.
            self._end(client)

    def _tell(self, whom: object, peer: Peer, what: str) -> None:
        """Of processes that come again and again for the same there are a few lines in a while."""
        now = self._loop.time()
        self._told = {
            key: (since, times)
            for key, (since, times) in self._told.items()
            if now - since < TELL_AGAIN
        }
        since, times = self._told.get((peer.pid, what), (now, 0))
        if times < TELL_TIMES and len(self._told) < TOLD_MAX:
            self._told[peer.pid, what] = since, times + 1
            log.warning("%r %s", whom, what)

    def _end(self, client: Client, *, handed: bool = False) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self._silent.pop(client, None)
            try:
                client.close(handed=handed)
            except Exception as error:
                tell_loop(self._loop, f"{client!r} could not be closed", error)
            finally:
                self.stores.release(client)
                self._past += client.stats

    # --------------------------------------------------------------- hand-over

    def reference_of(self, store: BlockStore) -> dict[str, Any]:
        """What the object of ``store`` is called among servers: how it is recognised, but not how
        it is opened."""
        return {
            "own": store is self.store,
            "name": self.stores.name_of(store),
            "size": store.size,
            "version": store.version,
        }

    def store_of(self, reference: dict[str, Any] | None, client: Client) -> BlockStore | None:
        """The store that another server's `reference_of` means: of our own objects, or of those
        that ``client`` was given by us. Raises UsageError if it has none like that, and
        SourceChangedError if that is another version."""
        if reference is None:
            return None
        if reference["own"]:
            self.check_shows(reference)
            return self.store
        known = [
            store
            for store in self.stores.of(client)
            if store is not self.store and self.stores.name_of(store) == reference["name"]
        ]
        for store in known:
            if (store.size, store.version) == (reference["size"], reference["version"]):
                return store
        for store in known:
            check_same_object(self.stores.name_of(store), store.size, store.version, reference)
        raise UsageError(
            f"the memory of {client!r} shows {reference['name']!r}, which is not of this server",
            hint="on_client= is called for the clients of another server too",
        )

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
        for client in list(self.clients):
            await client.settled()

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
        if self._timer is None and not self._ending.running:
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
        if not self._handed:
            unlink_own(self.path, self._identity)
        listening.close()

    async def aclose(self) -> None:
        """Serve nobody any more. Clients that keep a copy of their descriptor (all but CRIU's)
        stay blocked at their next fault until somebody serves them; those that keep none are given
        everything first, which may take long. Cancelling gives that up: what they lack becomes
        errors, and the server is closed. Idempotent."""
        self._closed = True
        try:
            await self._draining(self._drain)
        finally:
            if not self._draining.running:
                await self._ending.surely(self._close_all)

    async def _drain(self) -> None:
        await self._opening.stop()
        if self._open:
            self.stop_listening()
            last = [client.complete() for client in self.clients if client.complete_on_close]
            for failure in await asyncio.gather(*last, return_exceptions=True):
                if isinstance(failure, BaseException):
                    log.error("a client could not be given everything: %s", failure)

    async def _close_all(self) -> None:
        """Let go of everything. Afterwards it can be opened again, unless it was closed."""
        try:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._handover is not None:
                handover, self._handover = self._handover, None
                await handover.aclose()
            tasks = self._tasks | self._refusing
            for task in tasks:
                task.cancel()
            await end_all(self, tasks)
            for client in list(self.clients):
                if not self._handed:
                    await client.give_up()
        finally:
            try:
                for client in list(self.clients):
                    self._end(client)
                self.stop_listening()
                self._open = False
            finally:
                try:
                    await self.stores.aclose()
                finally:
                    if self._made:
                        self.reactor.close()
                        self.reserve.close()

    def __repr__(self) -> str:
        return f"<Server at {self.path}, {len(self.clients)} clients>"
