"""One server takes over from another, and no client notices more than a pause.

A server listens on a second socket, ``PATH.handover``, for its successor. Asked, it stops reading,
and sends the listening socket, and for each client that could not connect anew by itself its
connection, its pidfd, its descriptors, and what is known of its pages. Both have all of it then.
The successor says that it is ready, and if it does not, the old one goes on. The old one says
that it lets go, and never serves again; only then does the successor begin. One that hears nothing
does not know whether the old one has given up waiting and goes on: it begins if that process is
dead, with as many clients as have come, and gives up if not. So nobody fills pages in between, and
never do two: a page that the process removes must be filled by the one who has read of it.

Clients whose dialect connects again by itself (``Client.reconnects``) are simply let go: they
find the successor at the same path. But their forked children cannot, and are handed over as a
client of their own, without a connection.

Who the other one is, is asked of the kernel before a word is said: a process of our own user (or
root's), behind a socket that nobody else can have put there. What it says is still not obeyed: it
names objects, which have to be among those that the successor itself was given; and of the clients
it sends the connections, of which the kernel says whose they are, and not numbers of processes.

On the wire: `HELLO` from the successor; `READY` from it at the end, and `YOURS` back; between
messages of `LENGTH` and that many bytes of JSON, compressed by zlib, and before each the
descriptors that it names, `BATCH` at most per sendmsg. Page states are in a file of their own, one
for each client. Both ends are of one version of this package or refuse each other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AiouffdError, PeerError, SourceChangedError, UsageError
from ..foreign import states
from ..foreign.areas import Area
from ..util.once import cancelled_from_outside
from ..util.places import Unsafe, check_directory
from ..util.tasks import begin
from ..util.unix_sockets import bind_at, connect_to_own, unlink_own
from .channel import Channel
from .client import Client
from .dialects.native import teller
from .peer import Peer, same_user

if TYPE_CHECKING:
    from .server import Server

__all__ = ["Handover", "take_over"]

log = logging.getLogger("aiouffd")

HELLO = b"aiouffd handover 3\n"
#: Length of the JSON and number of descriptors that go before it.
LENGTH = struct.Struct("<QQ")
BATCH = 128
#: Bytes of JSON in one message, before and after compression, and descriptors with it, that are
#: believed.
MESSAGE_MAX, FDS_MAX = 1 << 26, 1 << 16
#: Seconds that each step of the other end may take.
PATIENCE = 30.0
READY, YOURS = b"ready\n", b"yours\n"
#: Seconds for the old server's process to end, once its connection has.
DYING = 2.0


# ----------------------------------------------------------------------- wire


async def _send(channel: Channel, content: Any, fds: list[int]) -> None:
    data = zlib.compress(json.dumps(content).encode(), 1)
    await channel.send(LENGTH.pack(len(data), len(fds)))
    for start in range(0, len(fds), BATCH):
        await channel.send(b"d", fds[start : start + BATCH])
    await channel.send(data)


async def _receive(channel: Channel) -> tuple[Any, list[int]]:
    head, _ = await channel.recv_exactly(LENGTH.size)
    length, count = LENGTH.unpack(head)
    if length > MESSAGE_MAX or count > FDS_MAX:
        raise PeerError("the other server sent an invalid hand-over")
    fds: list[int] = []
    try:
        while len(fds) < count:
            _, some = await channel.recv_exactly(1, max_fds=BATCH)
            if not some:
                raise PeerError("the other server sends fewer descriptors than it says")
            fds += some
        data, _ = await channel.recv_exactly(length)
        inflate = zlib.decompressobj()
        content = json.loads(inflate.decompress(data, MESSAGE_MAX))
    except (zlib.error, ValueError) as error:
        _close_all(fds)
        raise PeerError(f"the other server sends garbage: {error}") from error
    except BaseException:
        _close_all(fds)
        raise
    return content, fds


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


# ------------------------------------------------------------------ describing


async def _send_client(channel: Channel, client: Client) -> None:
    """Send a client as JSON and descriptors: its connection, its pidfd if it has one, its page
    states, then its memories; of one that reconnects those of its children alone. None if it has
    ended."""
    if client.ended.is_set():
        await _send(channel, None, [])
        return
    pages = states.new_file("aiouffd-handover")
    try:
        described = await _describe(client, pages)
        if client.ended.is_set():  # meanwhile
            await _send(channel, None, [])
            return
        content, memories = described
        fds = [client.channel.fileno(), pages, *memories]
        if content["pidfd"]:
            fds.insert(1, client.peer.pidfd)
        await _send(channel, content, fds)
    finally:
        os.close(pages)


async def _describe(client: Client, pages: int) -> tuple[dict[str, Any], list[int]]:
    """A client as JSON, the descriptors of its memories, and into the file ``pages`` the states
    of all areas, one after the other."""
    memories, fds, at = [], [], 0
    for memory in client.to_hand_over():
        areas = []
        for area in memory.areas:
            assert area.states is not None
            await states.save(area.states, pages, at)
            at += len(area.states)
            areas.append(
                {
                    "start": area.start,
                    "length": area.length,
                    "offset": area.offset,
                    "store": None if area.store is None else client.server.reference_of(area.store),
                }
            )
        fds.append(memory.fd)
        memories.append(
            {
                "name": memory.name,
                "page_size": memory.page_size,
                "uncovered": memory.uncovered,
                "background": memory.background,
                "sole": memory.sole,
                "errors": memory.tell_error is not None,
                "areas": areas,
            }
        )
    return {
        "pidfd": client.peer.pidfd >= 0,
        "alone": client.reconnects or client.alone,
        "complete_on_close": client.complete_on_close,
        "connected": client.connected,
        "asked": client.asked,
        "states": at,
        "memories": memories,
    }, fds


async def _restore(server: Server, item: dict[str, Any], fds: list[int]) -> Client:
    """The client that `_describe` described; takes all of ``fds``. It is not served yet."""
    left = list(fds)
    client: Client | None = None
    try:
        if len(left) != 2 + bool(item["pidfd"]) + len(item["memories"]):
            raise PeerError(f"the other server sends a client with {len(left)} descriptors")
        connection = socket.socket(fileno=left.pop(0))
        try:
            peer = Peer.of(connection, left.pop(0) if item["pidfd"] else -1)
        except BaseException:
            connection.close()
            raise
        client = server.restored(Channel(connection, peer))
        client.alone = bool(item["alone"])
        client.complete_on_close = bool(item["complete_on_close"])
        client.restore(connected=bool(item["connected"]) and not client.alone)
        await _introduce(server, client, item["asked"])
        pages = left.pop(0)
        try:
            known = await states.load(pages, item["states"])
        finally:
            os.close(pages)
        at = 0
        for memory in item["memories"]:
            areas, size = [], memory["page_size"]
            for area in memory["areas"]:
                count = area["length"] // size
                areas.append(
                    Area(
                        area["start"],
                        area["length"],
                        server.store_of(area["store"], client),
                        area["offset"],
                        size,
                        known[at : at + count],
                    )
                )
                at += count
            if memory["uncovered"] not in ("poison", "zero"):
                raise PeerError(f"the other server has memory that is {memory['uncovered']!r}")
            adopted = client.adopt(
                left.pop(0),
                areas,
                page_size=size,
                uncovered=memory["uncovered"],
                background=bool(memory["background"]),
                name=str(memory["name"])[:200],
                start=False,
            )
            adopted.sole = bool(memory["sole"])
            if memory.get("errors"):
                adopted.tell_error = teller(client.channel)
        return client
    except BaseException as error:
        _close_all(left)
        if client is not None:
            server.drop_restored(client)
        if isinstance(error, KeyError | TypeError | AttributeError | ZeroDivisionError | OSError):
            raise PeerError(f"the other server says what cannot be: {error!r}") from error
        raise


async def _introduce(server: Server, client: Client, asked: Any) -> None:
    """Have a client get its objects as one that comes anew does: from our own configuration."""
    if not server.may_serve(client.peer):
        raise UsageError(
            f"the other server serves {client.peer!r}, which this one may not",
            hint="give both the same allow=",
        )
    try:
        if server.on_client is not None:
            await server.on_client(client)
        restore = getattr(server.dialect, "restore", None)
        if restore is not None and asked is not None:
            await restore(client, str(asked))
    except asyncio.CancelledError as error:
        if cancelled_from_outside():
            raise
        raise UsageError(f"on_client has failed for {client!r}: {error!r}") from error
    except (AiouffdError, OSError) as error:
        raise UsageError(f"{client!r} of the other server is turned away: {error}") from error
    except Exception as error:
        raise UsageError(f"on_client has failed for {client!r}: {error!r}") from error


# ------------------------------------------------------------------- old server


class Handover:
    """The side of the server that is asked to go. On its loop."""

    def __init__(self, server: Server, path: Path) -> None:
        """Raises Unsafe where somebody else could put another socket in the place of ours."""
        self._server = server
        self._path = path
        self._loop = asyncio.get_running_loop()
        check_directory(os.path.dirname(os.path.abspath(path)))
        self._listening, self._identity = bind_at(path, 0o600)
        self._listening.setblocking(False)
        self._listening.listen(1)
        self._loop.add_reader(self._listening.fileno(), self._accept)
        self._task: asyncio.Task[None] | None = None

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        try:
            peer = Peer.of(connection)
        except OSError:
            connection.close()
            return
        if self._task is not None or not same_user(peer):
            if not same_user(peer):
                log.warning("%r wants to take over from %r, and may not", peer, self._server)
            peer.close()
            connection.close()
            return
        channel = Channel(connection, peer)
        self._task = begin(
            partial(self._hand_over, channel), partial(self._close, channel), loop=self._loop
        )

    def _close(self, channel: Channel) -> None:
        channel.close()
        channel.peer.close()
        self._task = None

    async def _hand_over(self, channel: Channel) -> None:
        server = self._server
        handed = False
        try:
            async with asyncio.timeout(PATIENCE):
                hello, _ = await channel.recv_exactly(len(HELLO))
                if hello != HELLO:
                    raise PeerError("the successor is of another version")
                await server.quiesce()
            clients = [client for client in server.clients if client.to_hand_over()]
            async with asyncio.timeout(PATIENCE):
                listening = server.listening_fd()
                # Also of clients that connect again by themselves: they would be turned away.
                head = {"clients": len(clients), "object": server.shown()}
                await _send(channel, head, [listening] if listening >= 0 else [])
                for client in clients:
                    await _send_client(channel, client)
                said, _ = await channel.recv_exactly(len(READY))
            # No waiting from here on. If it cannot be said the successor has died, or finds us
            # alive and gives up: then it is for us to go on.
            if said == READY:
                handed = _say(channel, YOURS)
        except (AiouffdError, OSError, TimeoutError) as error:
            log.warning("%r was not taken over: %s", server, error or "it took too long")
        finally:
            self._close(channel)
            if not handed:
                server.go_on()
        if handed:
            log.info("%r was taken over, with %d clients", server, len(clients))
            server.was_taken_over()

    async def aclose(self) -> None:
        """Wait for no successor any more. The socket is removed, unless another one is there by
        now: a successor's. Idempotent."""
        if self._listening.fileno() >= 0:
            self._loop.remove_reader(self._listening.fileno())
            unlink_own(self._path, self._identity)
            self._listening.close()
        task = self._task
        if task is not None and task is not asyncio.current_task():
            task.cancel()
            await asyncio.wait((task,))


# ------------------------------------------------------------------- successor


async def take_over(server: Server) -> socket.socket | None:
    """Take over from the server at ``server.handover_path``: its clients, and its listening socket,
    which is returned. None if nobody is there.

    Raises Unsafe (a PermissionError) when others than root and this user may have put there what
    listens; UsageError and SourceChangedError when this server was not given the objects that the
    clients' memory shows, or may not serve them; and PeerError when the other one does not keep to
    the protocol, or gives up; it then goes on. If it dies in the middle, the clients that it has
    given are served, and None may be returned.
    """
    path = server.handover_path
    assert path is not None
    try:
        connection, identity = connect_to_own(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except Unsafe as error:
        raise Unsafe(
            f"{error.strerror}: others may pose as the server to take over from"
            " (give both servers handover=, a path in a directory of their own)",
            error.filename,
        ) from error
    except BlockingIOError:
        raise PeerError(f"others wait to take over from the server at {server.path}") from None
    channel = Channel(connection, Peer.of(connection))
    clients: list[Client] = []
    listening: socket.socket | None = None
    try:
        try:
            async with asyncio.timeout(2 * PATIENCE):
                await channel.send(HELLO)
                head, fds = await _receive(channel)
                if fds:
                    listening = _listening_socket(fds)
                with _plausible():
                    count, shown = int(head["clients"]), head["object"]
                    if shown is not None:
                        server.check_shows(shown)
                for _ in range(count):
                    item, fds = await _receive(channel)
                    if item is None:
                        _close_all(fds)
                    else:
                        clients.append(await _restore(server, item, fds))
                await channel.send(READY)
            await _until_ours(channel)
        except PeerError as error:
            # It had stopped before it sent anything, so what we have of it is served by nobody.
            if not await _is_dead(channel.peer):
                raise
            log.warning(
                "the other server died, and %d of its clients are served: %s", len(clients), error
            )
        for client in clients:
            client.start_all()
        unlink_own(path, identity)  # it has said its last word there
        return listening
    except BaseException:
        for client in clients:
            server.drop_restored(client)
        if listening is not None:
            listening.close()
        raise
    finally:
        channel.close()
        channel.peer.close()


@contextmanager
def _plausible() -> Iterator[None]:
    """What another server says is taken apart here."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PeerError(f"the other server says what cannot be: {error!r}") from error


def _listening_socket(fds: list[int]) -> socket.socket:
    """The one of ``fds`` that came, all of which it takes."""
    try:
        found = socket.socket(fileno=fds[0])
    except OSError as error:
        _close_all(fds)
        raise PeerError("the other server sends something else for its socket") from error
    _close_all(fds[1:])
    kind = (found.family, found.type, found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    if kind != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        found.close()
        raise PeerError("the other server sends a socket that does not listen")
    return found


def _say(channel: Channel, word: bytes) -> bool:
    """Send a word that fits into the socket's buffer, or do not."""
    try:
        sent = socket.socket(fileno=os.dup(channel.fileno()))
    except OSError:
        return False
    with sent:
        try:
            return sent.send(word, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT) == len(word)
        except OSError:
            return False


async def _until_ours(channel: Channel) -> None:
    """Until the other server has let go. Raises PeerError if it is dead, or goes on."""
    try:
        async with asyncio.timeout(PATIENCE):
            said, _ = await channel.recv_exactly(len(YOURS))
    except TimeoutError:
        # From here on it cannot be said any more. Perhaps it just was.
        with socket.socket(fileno=os.dup(channel.fileno())) as same:
            same.shutdown(socket.SHUT_RDWR)
        said, _ = await channel.recv_exactly(len(YOURS))
    if said != YOURS:
        raise PeerError("the other server has not let go in time, and goes on")


async def _is_dead(peer: Peer) -> bool:
    """Whether the other server's process has ended. It may be just about to: its connections are
    closed before that is told."""
    dead = asyncio.Event()
    peer.watch(dead.set)
    try:
        await asyncio.wait_for(dead.wait(), DYING)
    except TimeoutError:
        return False
    return True


def check_same_object(what: str, size: int, version: str | None, other: dict[str, Any]) -> None:
    """Raise SourceChangedError if a store is not of the object that the other server had."""
    if size != other["size"] or version != other["version"]:
        raise SourceChangedError(
            f"{what} is at version {version} of {size} bytes, the clients' memory is of version"
            f" {other['version']} of {other['size']} bytes"
        )
