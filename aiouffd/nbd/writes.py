"""What becomes of a client's writes when connections are lost.

A write whose connection ends before its answer is sent again on another one, and that is safe: the
bytes are the same. But the first copy may still be in somebody's hands (a proxy, a server that is
slow or has not noticed) and land later, after a newer write to the same place was acknowledged. It
is kept here as a *ghost* until the server has said that it cannot land any more (see
`aiouffd.nbd.fence`). As long as it may, a newer write to that place is refused, unless its bytes
are those of the ghost: the protocol has no way to order them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import SourceError
from ..sources.durability import Promises
from ..util.waiting import Done
from . import wire
from .client_core import Request
from .order import Order, Turn

if TYPE_CHECKING:
    from .client import Connection

__all__ = ["CHANGING", "Content", "Writes"]

#: Commands that change what is read.
CHANGING = (wire.CMD_WRITE, wire.CMD_WRITE_ZEROES, wire.CMD_TRIM)
#: Bytes of ghosts that are kept for comparison.
KEPT = 64 << 20

#: What a write leaves behind: bytes; None for zeros, False for nobody knows what.
Content = memoryview | None | bool


@dataclass(eq=False, slots=True)
class _Ghost:
    """A write that may still land, of a lost connection that the server called ``token``."""

    offset: int
    length: int
    content: Content
    token: str | None

    def harmless_to(self, offset: int, length: int, content: Content) -> bool:
        """Whether it may land after a write of ``content`` without a difference."""
        start = max(offset, self.offset)
        end = min(offset + length, self.offset + self.length)
        if start >= end or content is False:
            return True
        if self.content is False:
            return False
        mine = _cut(self.content, start - self.offset, end - start)
        newer = _cut(content, start - offset, end - start)
        return mine == newer


def _cut(content: Content, at: int, length: int) -> memoryview:
    if content is None:
        return memoryview(bytes(length))
    assert isinstance(content, memoryview)
    return content[at : at + length]


def _content(request: Request) -> Content:
    if request.command == wire.CMD_WRITE:
        return memoryview(request.data)
    return None if request.command == wire.CMD_WRITE_ZEROES else False


class Writes:
    """The writes of one source: their order, their promises, their ghosts. One event loop."""

    def __init__(self, what: str) -> None:
        self.order = Order()
        self.promises = Promises(what)
        self._what = what
        self._ghosts: list[_Ghost] = []

    # ---- one write ----

    def track(self, turn: Turn, requests: list[Request], done: Done) -> None:
        """Have the answers to ``requests`` noted, ``turn`` ended by the last, and ``done`` told
        of each. Whoever waits for them may leave: they are under way all the same."""
        left = len(requests)

        def answered(request: Request, error: BaseException | None) -> None:
            nonlocal left
            left -= 1
            if error is None:
                self.promises.wrote(request.offset, request.length, request.answered_by)
            if not left:
                turn.end()
            done(error)

        for request in requests:
            request.done = _Answer(answered, request)

    # ---- connections ----

    def lost(self, connection: Connection, requests: Iterable[Request]) -> None:
        """``connection`` has ended and owes answers to ``requests``."""
        self.promises.gone(connection)
        kept = sum(g.length for g in self._ghosts if isinstance(g.content, memoryview))
        for request in requests:
            if request.command not in CHANGING:
                continue
            content = _content(request)
            if isinstance(content, memoryview):
                kept += request.length
                if kept > KEPT:
                    content = False
            ghost = _Ghost(request.offset, request.length, content, connection.token)
            self._ghosts.append(ghost)

    @property
    def haunted(self) -> bool:
        """Whether there are ghosts."""
        return bool(self._ghosts)

    def tokens(self) -> list[str]:
        """Names of lost connections whose ghosts a server may be able to lay."""
        return list(dict.fromkeys(g.token for g in self._ghosts if g.token is not None))

    def laid(self, tokens: Iterable[str]) -> None:
        """The server has said that nothing of these connections can land after what is sent now."""
        gone = set(tokens)
        if gone:
            self._ghosts = [ghost for ghost in self._ghosts if ghost.token not in gone]

    def in_the_way(self, offset: int, length: int, content: Content) -> list[_Ghost]:
        """Ghosts that must not land after a write of ``content``."""
        if not self._ghosts:
            return []
        return [g for g in self._ghosts if not g.harmless_to(offset, length, content)]

    def refusal(self, ghosts: list[_Ghost]) -> SourceError:
        """Why a write cannot be made."""
        first = ghosts[0]
        return SourceError(
            f"{self._what}: an older write of {first.length} bytes at {first.offset} was under way"
            " on a connection that was lost, and may still land after a newer one",
            transient=False,
            hint="open the export again when the server has ended, or was restarted; or write the"
            " same bytes",
        )


class _Answer:
    """The ``done`` of one request of several."""

    __slots__ = ("_answered", "_request")

    def __init__(self, answered: Any, request: Request) -> None:
        self._answered = answered
        self._request = request

    def __call__(self, error: BaseException | None) -> None:
        answered, request = self._answered, self._request
        # request.done is this: no cycle stays.
        request.done = _nothing
        answered(request, error)


def _nothing(_error: BaseException | None) -> None:
    """There is nobody any more to be told."""
