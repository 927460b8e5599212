"""Memory of other processes as an engine sees it: no sockets, and no protocol."""

__all__: list[str] = []
