"""A set of CRIU's images, wherever it is: a directory, below a URL, or in memory.

Small images are read whole. ``pages-N.img`` is not opened here at all: it is named, and whoever
serves it reads parts of it. Images of the dumps before are found as CRIU finds them, by the name
``parent`` within the set, which is a directory, a link to one, or more objects under the same
prefix; or they are given.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ...errors import UsageError
from ...sources import as_source
from ...sources.base import aclose_source, check_length
from ...sources.compose import RetrySource
from ...sources.names import display_name
from ...sources.registry import scheme_of
from .format import (
    ImageError,
    Pagemap,
    Vma,
    parse_inventory,
    parse_pagemap,
    parse_pstree,
    parse_vmas,
)
from .plan import ELSEWHERE, Piece, plan

__all__ = ["Dump", "ImageSet", "PagesFile", "TaskImage", "load"]

T = TypeVar("T")

#: What `ImageSet` takes: a directory, a URL that ends before the names, or sources by name.
Where = str | os.PathLike[str] | Mapping[str, Any]

#: Longest image that is read whole, in bytes, and how many are read at a time.
WHOLE_MAX, AT_A_TIME = 256 << 20, 16
#: Dumps that build on each other.
GENERATIONS_MAX = 200


class ImageSet:
    """The images of one dump, by name. Reads nothing before it is asked.

    :param where: a directory; a URL to which names are appended (``s3://bucket/dump/``); or a
        mapping from names to what `aiouffd.open` takes.
    :param parents: the sets of the dumps that this one builds on, nearest first, each in the same
        forms. Without it they are looked for under the name ``parent``.
    :param options: go to the source of each image.
    """

    def __init__(self, where: Where, *, parents: Sequence[Where] = (), **options: Any) -> None:
        self._url: str | None = None
        self._folder: Path | None = None
        self._members: Mapping[str, Any] = {}
        if isinstance(where, Mapping):
            self._members = where
            self.name = "images in memory"
        elif isinstance(where, str) and scheme_of(where) is not None:
            self._url = where
            self.name = display_name(where)
        elif isinstance(where, str | os.PathLike) and os.fspath(where):
            self._folder = Path(where)
            self.name = str(self._folder)
        else:
            raise UsageError(f"images are a directory, a URL or a mapping, not {where!r}")
        self._options = options
        self._parents = tuple(parents)

    @property
    def folder(self) -> Path | None:
        """The directory, if it is one."""
        return self._folder

    def source(self, name: str) -> tuple[Any, dict[str, Any]]:
        """What `aiouffd.open` takes for an image, and the options. Raises FileNotFoundError if it
        is known that there is none."""
        if self._url is not None:
            # What follows the path, such as a signature, is for all objects.
            parts = urlsplit(self._url)
            return urlunsplit(
                parts._replace(path=f"{parts.path.rstrip('/')}/{name}")
            ), self._options
        if self._folder is not None:
            return str(self._folder / name), self._options
        if name not in self._members:
            raise FileNotFoundError(2, "no such image", name)
        return self._members[name], {}

    def path(self, name: str) -> str:
        """What people call an image."""
        return name if not self._url and not self._folder else f"{self.name.rstrip('/')}/{name}"

    async def read(self, name: str) -> bytes:
        """All of an image. Raises FileNotFoundError if there is none, ImageError if it is too
        long, and what its source raises."""

        async def whole(source: RetrySource) -> bytes:
            size = source.size
            if size > WHOLE_MAX:
                raise ImageError(f"{self.path(name)} has {size} bytes, more than {WHOLE_MAX}")
            return bytes(check_length(await source.read(0, size), size)) if size else b""

        return await self._opened(name, whole)

    async def size(self, name: str) -> int:
        """Length of an image in bytes. Raises as `read`."""

        async def length(source: RetrySource) -> int:
            return source.size

        return await self._opened(name, length)

    async def _opened(self, name: str, use: Callable[[RetrySource], Awaitable[T]]) -> T:
        spec, options = self.source(name)
        given = as_source(spec, **options)
        # One that exists already will be opened by whoever serves it.
        source = RetrySource(given.clone() if given is spec else given)
        await source.open()
        try:
            return await use(source)
        finally:
            await aclose_source(source)

    def parent(self) -> ImageSet | None:
        """The set that this one builds on, or one that may be it: only reading tells."""
        if self._parents:
            return ImageSet(self._parents[0], parents=self._parents[1:], **self._options)
        if self._url is not None:
            spec, options = self.source("parent/")
            return ImageSet(spec, **options)
        if self._folder is not None:
            folder = self._folder / "parent"
            if not os.path.lexists(folder):
                return None
            # Resolved, because there may be more of them than links that the kernel follows.
            return ImageSet(os.path.realpath(folder), **self._options)
        found = self._members.get("parent")
        return None if found is None else ImageSet(found)

    def __repr__(self) -> str:
        return f"<ImageSet {self.name}>"


@dataclass(frozen=True, slots=True)
class PagesFile:
    """A ``pages-N.img``."""

    images: ImageSet
    name: str

    def source(self) -> tuple[Any, dict[str, Any]]:
        """What `aiouffd.open` takes for it, and the options."""
        return self.images.source(self.name)


@dataclass(frozen=True, slots=True)
class TaskImage:
    """A dumped task.

    ``pieces`` is its memory that is served, by address, and ``files`` the pages files that it is
    in, by generation. None if the dump has no memory of it, as of one that was dead.
    """

    pid: int
    pieces: tuple[Piece, ...] | None
    files: tuple[PagesFile, ...]

    @property
    def bytes(self) -> int:
        """Bytes that are served."""
        return sum(piece.length for piece in self.pieces or ())

    @property
    def elsewhere(self) -> tuple[tuple[int, int], ...]:
        """Address and length of what only a page server has."""
        return tuple(
            (piece.start, piece.length)
            for piece in self.pieces or ()
            if piece.generation == ELSEWHERE
        )


@dataclass(frozen=True, slots=True)
class Dump:
    """A dumped tree of processes: its tasks by pid."""

    images: ImageSet
    tasks: Mapping[int, TaskImage]


async def load(images: ImageSet, *, everything: bool = False) -> Dump:
    """Read what serving the tasks of ``images`` needs to know, and check that it fits together.

    ``everything``: also of memory that CRIU restores itself. Raises ImageError for images that are
    broken or missing, UnsupportedError without protobuf, and what their sources raise.
    """
    parse_inventory(images.path("inventory.img"), await _needed(images, "inventory.img"))
    pids = parse_pstree(images.path("pstree.img"), await _needed(images, "pstree.img"))
    room = asyncio.Semaphore(AT_A_TIME)

    async def one(pid: int) -> TaskImage:
        async with room:
            return await _task(images, pid, everything)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(pid)) for pid in pids]
    except BaseExceptionGroup as errors:
        # One is enough to say what is wrong.
        raise errors.exceptions[0] from None
    return Dump(images, {pid: task.result() for pid, task in zip(pids, tasks, strict=True)})


async def _needed(images: ImageSet, name: str) -> bytes:
    try:
        return await images.read(name)
    except FileNotFoundError as error:
        raise ImageError(
            f"there is no {images.path(name)}", hint="is that where the images of a dump are?"
        ) from error


async def _task(images: ImageSet, pid: int, everything: bool) -> TaskImage:
    name = f"pagemap-{pid}.img"
    try:
        pagemap = parse_pagemap(images.path(name), await images.read(name))
    except FileNotFoundError:
        return TaskImage(pid, None, ())
    sets, generations = [images], [pagemap]
    while _asks_parent(generations[-1]):
        found = await _of_parent(sets[-1], name)
        if found is None:
            break
        sets.append(found[0])
        generations.append(found[1])
        if len(sets) > GENERATIONS_MAX:
            raise ImageError(
                f"{images.name} has more than {GENERATIONS_MAX} generations of parents",
                hint="does a link named parent lead back to where it is?",
            )
    pieces = plan(generations, await _vmas(images, pid), everything=everything)
    files = tuple(
        PagesFile(of, f"pages-{generation.pages_id}.img")
        for of, generation in zip(sets, generations, strict=True)
    )
    for number in {piece.generation for piece in pieces} - {ELSEWHERE}:
        await _check_pages(files[number], generations[number])
    return TaskImage(pid, tuple(pieces), files)


def _asks_parent(pagemap: Pagemap) -> bool:
    return any(entry.in_parent for entry in pagemap.entries)


async def _of_parent(images: ImageSet, name: str) -> tuple[ImageSet, Pagemap] | None:
    parent = images.parent()
    if parent is None:
        return None
    try:
        return parent, parse_pagemap(parent.path(name), await parent.read(name))
    except FileNotFoundError:
        return None


async def _vmas(images: ImageSet, pid: int) -> list[Vma]:
    name = f"mm-{pid}.img"
    return parse_vmas(images.path(name), await _needed(images, name))


async def _check_pages(file: PagesFile, pagemap: Pagemap) -> None:
    path = file.images.path(file.name)
    try:
        size = await file.images.size(file.name)
    except FileNotFoundError as error:
        raise ImageError(f"there is no {path}, which {pagemap.name} is about") from error
    if size < pagemap.bytes:
        raise ImageError(f"{path} has {size} bytes, where {pagemap.name} says {pagemap.bytes}")
