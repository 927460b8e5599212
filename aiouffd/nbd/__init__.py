"""The NBD protocol, both sides: as a source of bytes, and to serve any source.

``wire`` has the numbers and the layouts, ``client_core`` and ``server_core`` are state machines
without I/O, ``client`` and ``server`` put them on asyncio. For users: `NbdServer`, and
`aiouffd.nbd.source.NbdSource`, which is what ``nbd://`` URLs give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .server import NbdServer, NbdServerStats

__all__ = ["NbdServer", "NbdServerStats"]


def __getattr__(name: str) -> Any:
    # The client side gets by without the server's modules.
    if name in __all__:
        from . import server

        return getattr(server, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
