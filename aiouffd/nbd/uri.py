"""NBD URIs, after the protocol's doc/uri.md.

``nbd://host[:port]/export`` and ``nbd+unix:///export?socket=PATH``; with ``nbds`` for TLS. The
export's name is percent-decoded, without the first slash; it may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, quote, unquote, urlsplit

from ..errors import UsageError

__all__ = ["NbdAddress", "parse"]

PORT = 10809


@dataclass(frozen=True, slots=True)
class NbdAddress:
    """Where an export is: a host and port, or the path of a Unix socket, which has to be that of
    this user, root, or ``user`` (an id)."""

    export: str = ""
    host: str | None = None
    port: int = PORT
    socket: str | None = None
    tls: bool = False
    user: int | None = None

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        export = quote(self.export)
        if self.socket is not None:
            return f"{scheme}+unix:///{export}?socket={quote(self.socket)}"
        host = f"[{self.host}]" if ":" in (self.host or "") else self.host
        port = "" if self.port == PORT else f":{self.port}"
        return f"{scheme}://{host}{port}/{export}"


def parse(text: str) -> NbdAddress:
    """Read a URI. Raises UsageError."""
    try:
        parts = urlsplit(text)
        port = parts.port
        query = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as error:
        raise UsageError(f"not a usable NBD URI: {error}") from error
    scheme, _, transport = parts.scheme.partition("+")
    if scheme not in ("nbd", "nbds") or transport not in ("", "unix"):
        raise UsageError(f"not an NBD URI: {parts.scheme}://")
    export = unquote(parts.path.removeprefix("/"))
    tls = scheme == "nbds"
    if transport == "unix":
        paths = query.get("socket", [])
        if len(paths) != 1 or not paths[0] or parts.netloc:
            raise UsageError(
                "an NBD URI for a Unix socket has no host and one socket",
                hint="write nbd+unix:///export?socket=/path/of/the/socket",
            )
        return NbdAddress(export, socket=paths[0], tls=tls)
    if not parts.hostname or query.get("socket"):
        raise UsageError(
            "an NBD URI needs a host", hint="write nbd://host:port/export, or nbd+unix://"
        )
    return NbdAddress(export, parts.hostname, PORT if port is None else port, None, tls)
