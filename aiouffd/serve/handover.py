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

On the wire: `HELLO` from the successor; `READY` from it at the end, and `YOURS` back; between
messages of `LENGTH` and that many bytes of JSON,
compressed by zlib, and before each the descriptors that it names, `BATCH` at most per sendmsg.
Both ends are of one version of this package or refuse each other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AiouffdError, PeerError, SourceChangedError
from .areas import Area
from .channel import Channel
from .client import Client
from .peer import Peer, same_user

if TYPE_CHECKING:
    from .server import Server

__all__ = ["Handover", "take_over"]

log = logging.getLogger("aiouffd")

HELLO = b"aiouffd handover 2\n"
#: Length of the JSON and number of descriptors that go before it.
LENGTH = struct.Struct("<QQ")
BATCH = 128
#: Bytes of JSON in one message, before and after compression, that are believed.
MESSAGE_MAX = 1 << 30
#: Seconds that each step of the other end may take.
PATIENCE = 30.0
READY, YOURS = b"ready\n", b"yours\n"
#: Seconds for the old server's process to end, once its connection has.
DYING = 2.0


def handover_path(path: Path) -> Path:
    """Where the server at ``path`` waits for its successor."""
    return path.with_name(path.name + ".handover")


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
    if length > MESSAGE_MAX or count > 1 << 20:
        raise PeerError("the other server sends what cannot be")
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


def _describe(client: Client) -> tuple[dict[str, Any] | None, list[int]]:
    """A client as JSON and descriptors: its connection, its pidfd, then its memories; for one that
    reconnects those of its children alone. None if it has ended."""
    if client.ended.is_set():
        return None, []
    alone = client.reconnects
    fds = [] if alone else [client.channel.fileno()]
    pidfd = -1 if alone else client.peer.pidfd
    if pidfd >= 0:
        fds.append(pidfd)
    memories = []
    for memory in client.to_hand_over():
        fds.append(memory.fd)
        memories.append(
            {
                "name": memory.name,
                "page_size": memory.page_size,
                "uncovered": memory.uncovered,
                "background": memory.background,
                "sole": memory.sole,
                "areas": [
                    {
                        "start": area.start,
                        "length": area.length,
                        "offset": area.offset,
                        "store": None
                        if area.store is None
                        else client.server.reference_of(area.store),
                        "states": zlib.compress(bytes(area.states or b""), 1).hex(),
                    }
                    for area in memory.areas
                ],
            }
        )
    peer = client.peer
    return {
        "pid": peer.pid,
        "uid": peer.uid,
        "gid": peer.gid,
        "pidfd": pidfd >= 0,
        "connection": not alone,
        "complete_on_close": client.complete_on_close,
        "connected": client.connected,
        "memories": memories,
    }, fds


async def _restore(server: Server, item: dict[str, Any], fds: list[int]) -> Client:
    """The client that `_describe` described; takes all of ``fds``. It is not served yet."""
    left = list(fds)
    client: Client | None = None
    try:
        if item["connection"]:
            connection = socket.socket(fileno=left.pop(0))
        else:
            connection, other = socket.socketpair()
            other.close()
        pidfd = left.pop(0) if item["pidfd"] else -1
        peer = Peer(item["pid"], item["uid"], item["gid"], pidfd)
        client = server.restored(Channel(connection, peer))
        client.complete_on_close = item["complete_on_close"]
        client.restore(item["connected"])
        for memory in item["memories"]:
            areas = [
                Area(
                    area["start"],
                    area["length"],
                    await server.store_of(area["store"], client),
                    area["offset"],
                    memory["page_size"],
                    memoryview(bytearray(zlib.decompress(bytes.fromhex(area["states"])))),
                )
                for area in memory["areas"]
            ]
            adopted = client.adopt(
                left.pop(0),
                areas,
                page_size=memory["page_size"],
                uncovered=memory["uncovered"],
                background=memory["background"],
                name=memory["name"],
                start=False,
            )
            adopted.sole = memory["sole"]
        return client
    except BaseException:
        _close_all(left)
        if client is not None:
            server.drop_restored(client)
        raise


# ------------------------------------------------------------------- old server


class Handover:
    """The side of the server that is asked to go. On its loop."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._path = handover_path(server.path)
        self._loop = asyncio.get_running_loop()
        self._path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        try:
            self._listening.bind(str(self._path))
        except BaseException:
            self._listening.close()
            raise
        finally:
            os.umask(before)
        self._listening.listen(1)
        self._loop.add_reader(self._listening.fileno(), self._accept)
        self._task: asyncio.Task[None] | None = None

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        peer = Peer.of(connection)
        if self._task is not None or not same_user(peer):
            peer.close()
            connection.close()
            return
        self._task = self._loop.create_task(self._hand_over(Channel(connection, peer)))

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
                head = {"clients": len(clients), "mode": server.mode, "object": server.shown()}
                await _send(channel, head, [listening] if listening >= 0 else [])
                for client in clients:
                    await _send(channel, *_describe(client))
                said, _ = await channel.recv_exactly(len(READY))
            # No waiting from here on. If it cannot be said the successor has died, or finds us
            # alive and gives up: then it is for us to go on.
            if said == READY:
                handed = _say(channel, YOURS)
        except (AiouffdError, OSError, TimeoutError) as error:
            log.warning("%r was not taken over: %s", server, error or "it took too long")
        finally:
            channel.close()
            channel.peer.close()
            self._task = None
            if not handed:
                server.go_on()
        if handed:
            log.info("%r was taken over, with %d clients", server, len(clients))
            server.was_taken_over()

    async def aclose(self) -> None:
        """Wait for no successor any more. Idempotent."""
        if self._listening.fileno() < 0:
            return
        self._loop.remove_reader(self._listening.fileno())
        self._listening.close()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def remove(self) -> None:
        """Remove the socket, which after a take-over is the successor's."""
        self._path.unlink(missing_ok=True)


# ------------------------------------------------------------------- successor


async def take_over(server: Server) -> socket.socket | None:
    """Take over from the server at ``server.path``: its clients, and its listening socket, which is
    returned. None if nobody is there.

    Raises SourceChangedError when this server's object is not what the clients' memory shows, and
    PeerError when the other one does not keep to the protocol, or gives up; it then goes on. If it
    dies in the middle, the clients that it has given are served, and None may be returned.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        connection.connect(str(handover_path(server.path)))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    except BlockingIOError:
        connection.close()
        raise PeerError(f"others wait to take over from the server at {server.path}") from None
    except BaseException:
        connection.close()
        raise
    channel = Channel(connection, Peer.of(connection))
    clients: list[Client] = []
    listening: socket.socket | None = None
    try:
        try:
            async with asyncio.timeout(2 * PATIENCE):
                await channel.send(HELLO)
                head, fds = await _receive(channel)
                if fds:
                    listening = socket.socket(fileno=fds[0])
                if head.get("object") is not None:
                    server.check_shows(head["object"])
                for _ in range(head["clients"]):
                    item, fds = await _receive(channel)
                    if item is not None:
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
        return listening
    except BaseException as error:
        for client in clients:
            server.drop_restored(client)
        if listening is not None:
            listening.close()
        if isinstance(error, KeyError | TypeError):
            raise PeerError(f"the other server says what cannot be: {error!r}") from error
        raise
    finally:
        channel.close()
        channel.peer.close()


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
