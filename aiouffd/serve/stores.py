"""The objects that a server's clients are served from, opened once for all who want them.

An object that was named, by a URL or a path, may be another one the next time: a snapshot is
replaced, and the machine that is restored then must not get the pages of the old one. So each new
client has the name looked up, which costs an opening, and shares what is open if that is the same.
"""

from __future__ import annotations

import asyncio
import logging
import os
from functools import partial
from typing import Any

from ..errors import ClosedError
from ..foreign.blocks import BlockStore
from ..sources import as_source
from ..sources.lifecycle import in_any_case
from ..sources.names import display_name, identity
from ..util.once import Once, cancelled_from_outside
from ..util.tasks import begin_surely

__all__ = ["Stores"]

log = logging.getLogger("aiouffd")

#: Objects that are opened, or looked at, at a time: each takes descriptors.
OPENINGS = 16
#: Seconds for which an object stays open after its last client: the next one finds its blocks.
LINGER = 60.0


class _Entry:
    """An object that is open, or being opened."""

    def __init__(self, key: Any, source: Any, options: dict[str, Any]) -> None:
        self.key, self.source, self.options = key, source, options
        self.opening: asyncio.Future[BlockStore] | None = None
        self.users: set[Any] = set()
        self.timer: asyncio.TimerHandle | None = None

    @property
    def named(self) -> bool:
        """Whether it can be looked up again."""
        return isinstance(self.source, str | os.PathLike)

    @property
    def store(self) -> BlockStore | None:
        """The store, once it is open."""
        opening = self.opening
        if opening is None or not opening.done() or opening.cancelled() or opening.exception():
            return None
        return opening.result()


def _key(source: Any, options: dict[str, Any]) -> Any:
    """What is one object for two clients: the same name with the same options, of which one may
    choose the account. A name with options that cannot be compared is an object of its own."""
    if isinstance(source, str | os.PathLike):
        name = identity(f"{type(source).__name__} {os.fspath(source)!r}", options)
        return object() if name is None else name
    try:
        key = (source, *sorted(options.items()))
        hash(key)
    except TypeError:
        return object() if options else id(source)  # which the entry holds, so that it stays its
    return key


class Stores:
    """On one loop. ``settings`` are those of every `BlockStore`."""

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        # The newest of each key, and all that are open.
        self._entries: dict[Any, _Entry] = {}
        self._open: set[_Entry] = set()
        self._closing: dict[asyncio.Task[None], _Entry] = {}
        self._places = asyncio.Semaphore(OPENINGS)
        self._ending: Once[None] = Once("closing the stores", keep_failure=True)
        self.closed = False

    async def get(self, source: Any, options: dict[str, Any], user: Any) -> BlockStore:
        """The store of an object, for as long as ``user`` does not `release` it. Raises what
        opening the object raises, and ClosedError."""
        self._check_open()
        key = _key(source, options)
        entry = self._entries.get(key)
        if entry is not None and entry.named and entry.store is not None:
            entry = await self._checked(entry, entry.store, user)
        self._check_open()  # still
        if entry is None:
            entry = self._entries[key] = _Entry(key, source, options)
            entry.opening = asyncio.ensure_future(self._open_store(entry))
            self._open.add(entry)
        entry.users.add(user)
        assert entry.opening is not None
        try:
            return await asyncio.shield(entry.opening)
        except BaseException:
            if entry.opening.done() and entry.store is None:
                self._forget(entry)
            else:
                self._leave(entry, user)
            if self.closed and entry.opening.cancelled() and not cancelled_from_outside():
                raise ClosedError("the server is closed") from None
            raise

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("the server is closed")

    async def _checked(self, entry: _Entry, store: BlockStore, user: Any) -> _Entry | None:
        """The entry, if its name still means the same; else the one that is newer, if any."""
        had = user in entry.users
        entry.users.add(user)  # it must not be closed while we look
        current = False
        try:
            current = await self._is_current(entry, store)
        finally:
            if not current and not had:
                self._leave(entry, user)
        if current:
            return entry
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
            if not entry.users:
                self._leave(entry, user)  # at once
        return self._entries.get(entry.key)

    async def _open_store(self, entry: _Entry) -> BlockStore:
        store = BlockStore(as_source(entry.source, **entry.options), **self._settings)
        async with self._places:
            await store.open()
        return store

    async def _is_current(self, entry: _Entry, store: BlockStore) -> bool:
        async with self._places:
            looking = BlockStore(as_source(entry.source, **entry.options))
            try:
                await looking.open()
                return (looking.size, looking.version) == (store.size, store.version)
            finally:
                await looking.aclose()

    def of(self, user: Any) -> list[BlockStore]:
        """The stores that ``user`` has, and has not released."""
        found = (entry.store for entry in self._open if user in entry.users)
        return [store for store in found if store is not None]

    def given(self, store: BlockStore) -> Any:
        """What a store was opened from."""
        for entry in self._open:
            if entry.store is store:
                return entry.source
        return None

    def name_of(self, store: BlockStore) -> str:
        """Display name of the object of a store."""
        source = self.given(store)
        if isinstance(source, str | os.PathLike):
            return display_name(str(source))
        return type(store.source).__name__

    # --------------------------------------------------------------------- end

    def release(self, user: Any) -> None:
        """``user`` needs no store any more."""
        for entry in list(self._open):
            if user in entry.users:
                self._leave(entry, user)

    def _leave(self, entry: _Entry, user: Any) -> None:
        entry.users.discard(user)
        if entry.users or not entry.named or self.closed:
            return
        if entry.timer is not None:
            entry.timer.cancel()
        pause = LINGER if self._entries.get(entry.key) is entry else 0
        entry.timer = asyncio.get_running_loop().call_later(pause, self._unused, entry)

    def _unused(self, entry: _Entry) -> None:
        if not entry.users and entry in self._open and not self.closed:
            self._forget(entry)
            begin_surely(partial(self._close, entry), partial(self._closes, entry))

    def _closes(self, entry: _Entry, task: asyncio.Task[None]) -> None:
        self._closing[task] = entry
        task.add_done_callback(self._closing.pop)

    def _forget(self, entry: _Entry) -> None:
        self._open.discard(entry)
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]

    async def _close(self, entry: _Entry) -> None:
        opening = entry.opening
        assert opening is not None
        opening.cancel()
        try:
            await asyncio.wait((opening,))
        finally:
            store = entry.store
            if store is not None:
                await store.aclose()

    async def aclose(self) -> None:
        """Close all. Idempotent."""
        self.closed = True
        await self._ending.surely(self._aclose)

    async def _aclose(self) -> None:
        entries = [*self._open, *self._closing.values()]
        for entry in entries:
            if entry.timer is not None:
                entry.timer.cancel()
            self._forget(entry)
        await in_any_case(partial(self._close_all, entries))

    async def _close_all(self, entries: list[_Entry]) -> None:
        if entries:
            loop = asyncio.get_running_loop()
            tasks = {loop.create_task(self._close(entry)): entry for entry in entries}
            await asyncio.wait(tasks)
            for task, entry in tasks.items():
                if task.cancelled() and entry.store is not None:
                    # Perhaps before its first step.
                    await entry.store.aclose()
