"""How a server promises that nothing of a lost connection can land any more.

NBD has no sessions: a server does not know that a new connection is the successor of one that
broke, and may still be working on, or not even have received, what that had sent. Ours can be
told. A client that writes asks for the metadata contexts (SET_META_CONTEXT, NBD's doc/proto.md,
"Metadata querying"; names that begin with ``x-`` are for experiments)

``x-aiouffd:connection``
    which the server answers by ``x-aiouffd:connection/TOKEN``: a name for this connection;
``x-aiouffd:ended/TOKEN``
    on another, later connection. The server ends the one of that name if it still exists, and
    answers by the same text: no request of it will begin any more, and what has begun will be
    over before any overlapping write that comes from now on begins.

Neither has extents, and both are for the negotiation only. Other servers know neither and do not
answer, which promises nothing. A server does so too for a token that it has not given out itself:
after a restart the old one may still be there.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable

__all__ = ["CONNECTION", "ENDED", "Fences"]

CONNECTION = "x-aiouffd:connection"
ENDED = "x-aiouffd:ended/"


class Fences:
    """A server's side: gives out tokens, and knows them again without remembering them.

    ``end(number)`` ends that connection if it exists. Tokens cannot be guessed, so that one client
    cannot end another one's connections.
    """

    def __init__(self, end: Callable[[int], None]) -> None:
        self._end = end
        self._secret = secrets.token_bytes(32)

    def token(self, number: int) -> str:
        """The token of connection ``number``."""
        seal = hmac.new(self._secret, b"%d" % number, hashlib.sha256).hexdigest()[:32]
        return f"{number}.{seal}"

    def ended(self, token: str) -> bool:
        """End that connection; False for a token that is not ours."""
        text = token.partition(".")[0]
        if not (text.isascii() and text.isdecimal() and len(text) < 20):
            return False
        number = int(text)
        if not hmac.compare_digest(self.token(number).encode(), token.encode("utf-8", "replace")):
            return False
        self._end(number)
        return True
