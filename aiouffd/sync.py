"""Lazy buffers without an event loop: see `aiouffd.buffers.sync`."""

from .buffers.sync import (
    SyncBuffer as SyncBuffer,
)
from .buffers.sync import (
    open as open,
)
from .buffers.sync import (
    open_file as open_file,
)

__all__ = [
    "SyncBuffer",
    "open",
    "open_file",
]
