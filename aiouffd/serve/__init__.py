"""Serving the faults of other processes.

A process that has a userfaultfd hands it over through a Unix socket, and its memory is filled
from a source of ours: `listen`. Who it is and what it says are a peer's and a dialect's business;
what is mapped where follows its mappings (`AreaMap`); blocks are fetched once for all
(`BlockStore`); and one epoll descriptor takes care that nobody is forgotten.

Layers, each importing only from those below it::

    server, handover       the socket, and what clients share
    dialects, criu         what clients say
    client                 one of them
    memory                 one address space: messages, faults, events
    bringing, ending       what no thread waits for; errors when nobody serves it any more
    filling                putting pages there, and trying again
    reactor, blocks        whose turn it is; where bytes come from
    channel, peer, areas   bytes with descriptors; who that is; what is mapped where
    states                 what is known of the pages of an area
    reserve, stats         descriptors for when there are none; counts
"""

from __future__ import annotations

from ..foreign.areas import Area as Area
from ..foreign.areas import AreaMap as AreaMap
from ..foreign.blocks import BlockStore as BlockStore
from ..foreign.memory import Memory as Memory
from ..foreign.stats import MemoryStats as MemoryStats
from .channel import Channel as Channel
from .client import Client as Client
from .client import Limits as Limits
from .dialects import Dialect as Dialect
from .peer import Peer as Peer
from .peer import anybody as anybody
from .peer import same_user as same_user
from .server import Server as Server
from .server import listen as listen

__all__ = [
    "Area",
    "AreaMap",
    "BlockStore",
    "Channel",
    "Client",
    "Dialect",
    "Limits",
    "Memory",
    "MemoryStats",
    "Peer",
    "Server",
    "anybody",
    "listen",
    "same_user",
]
