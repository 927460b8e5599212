"""What clients say to have their memory served: one module for each protocol.

``firecracker`` is what microVM monitors send, ``native`` is ours, for any language. CRIU's is
`aiouffd.serve.criu`. Others can be passed to `aiouffd.serve.listen` as objects.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...errors import UsageError

if TYPE_CHECKING:
    from ..client import Client

__all__ = ["Dialect", "dialect_named"]


@runtime_checkable
class Dialect(Protocol):
    """How a client hands over its memory.

    May have as well: ``refusal(text, later) -> bytes``, which is sent to a process that is turned
    away before it has said anything, ``later`` if it may try again; and ``async restore(client,
    name)``, which gives a client of another server the object that it has asked that one for
    (`Client.asked`), as the server takes over.
    """

    name: str

    async def talk(self, client: Client) -> None:
        """Speak with one client over ``client.channel``, and call ``client.adopt()`` for each
        descriptor that it hands over. May go on for as long as the connection has a meaning.

        Raises PeerError for a client that does not keep to the protocol: it is dropped, and nobody
        else notices.
        """


_KNOWN = {
    "firecracker": ".firecracker:FirecrackerDialect",
    "native": ".native:NativeDialect",
}


def dialect_named(dialect: str | Dialect, **options: Any) -> Dialect:
    """The dialect of that name, made with ``options``; a `Dialect` is passed through."""
    if not isinstance(dialect, str):
        return dialect
    if dialect not in _KNOWN:
        raise UsageError(f"unknown dialect {dialect!r}", hint=f"one of {', '.join(_KNOWN)}")
    module, _, name = _KNOWN[dialect].partition(":")
    found: Dialect = getattr(importlib.import_module(module, __name__), name)(**options)
    return found
