"""What is cached of one version of one object: its segment files, some of them open."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from ..compose.checksum import digest_function
from .layout import (
    DATA,
    PER_SEGMENT,
    Format,
    Latest,
    key_directory,
    make_directory,
    read_latest,
    remove,
    write_latest,
)
from .segment import Segment

__all__ = ["Entry"]

#: Segment files open at a time: large objects have thousands.
OPEN = 64
#: Times that a directory is made again which somebody who evicts has found empty.
TRIES = 16
#: What opening a segment fails with if something else has its name. Anything else, a want of
#: descriptors or memory above all, says nothing about the file.
_IN_THE_WAY = (
    errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EACCES, errno.EPERM, errno.EIO,
)  # fmt: skip


class Entry:
    """The blocks of one version. Usable from several threads. Only `write` raises OSError."""

    def __init__(self, root: Path, form: Format) -> None:
        self.form = form
        self._root = root
        self.directory = key_directory(root, form.key) / form.name
        #: To be noted with the blocks where that is lost, if this was seen last.
        self.latest: Latest | None = None
        self._digest = digest_function(form.algorithm)
        self._open: OrderedDict[int, Segment] = OrderedDict()
        self._lock = threading.Lock()

    def path(self, number: int) -> Path:
        """The file of a segment."""
        return self.directory / f"{number:08x}{DATA}"

    def forget(self) -> None:
        """Let all files go; each is closed when the last thread has left it."""
        with self._lock:
            self._open.clear()

    # -------------------------------------------------------------- segments

    def _pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Segment number, first block and number of blocks."""
        end = first + count
        while first < end:
            number = first // PER_SEGMENT
            stop = min(end, (number + 1) * PER_SEGMENT)
            yield number, first, stop - first
            first = stop

    def _keep(self, number: int, segment: Segment) -> Segment:
        with self._lock:
            self._open[number] = segment
            self._open.move_to_end(number)
            while len(self._open) > OPEN:
                self._open.popitem(last=False)
        return segment

    def _drop(self, number: int, segment: Segment) -> None:
        with self._lock:
            if self._open.get(number) is segment:
                del self._open[number]

    def _to_read(self, number: int) -> Segment | None:
        segment = self._open.get(number)
        try:
            if segment is not None:
                return segment
            path = os.fspath(self.path(number))
            return self._keep(number, Segment(path, self.form, number, self._digest, write=False))
        except OSError:
            return None

    def _make_directories(self) -> None:
        make_directory(self._root)
        for directory in (self.directory.parent, self.directory):
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
        if self.latest is not None and read_latest(self.directory.parent) is None:
            write_latest(self.directory.parent, self.latest)

    def _to_write(self, number: int) -> Segment:
        segment = self._open.get(number)
        if segment is not None:
            if segment.writable and not segment.gone:
                return segment
            # Evicted by somebody: what is left of it is of no use to others.
            self._drop(number, segment)
        path = self.path(number)
        tries = TRIES
        while True:
            tries -= 1
            try:
                return self._keep(
                    number,
                    Segment(os.fspath(path), self.form, number, self._digest, write=True),
                )
            except FileNotFoundError:
                # Whoever evicts removes empty directories too, while we make them as well.
                if not tries:
                    raise
                with contextlib.suppress(FileNotFoundError):
                    self._make_directories()
            except OSError as error:
                # In the way: a link, another's file, one that cannot be read.
                if not tries or error.errno not in _IN_THE_WAY:
                    raise
                remove(path)

    # --------------------------------------------------------------- reading

    def read_into(
        self, first: int, view: memoryview, stop: threading.Event | None = None
    ) -> list[int]:
        """Fill ``view`` with whole blocks from ``first`` on, as far as they are cached and
        right; returns the numbers of the others, in order."""
        step = self.form.block_size
        missing: list[int] = []
        for number, start, count in self._pieces(first, -(-len(view) // step)):
            if stop is not None and stop.is_set():
                break
            segment = self._to_read(number)
            blocks = range(start, start + count)
            if segment is None:
                missing += blocks
                continue
            part = view[(start - first) * step : (start - first + count) * step]
            try:
                absent = segment.read_into(start, part, stop)
                if absent and segment.gone:
                    # Others may have begun a new one.
                    self._drop(number, segment)
            except OSError:
                absent = list(blocks)
            missing += absent
        return missing

    def read_now(self, first: int, view: memoryview) -> bool:
        """The same from open files and the page cache only; False if that is not all."""
        count = -(-len(view) // self.form.block_size)
        number = first // PER_SEGMENT
        if (first + count - 1) // PER_SEGMENT != number:
            return False
        segment = self._open.get(number)
        return segment is not None and segment.read_now(first, view)

    def loaded(self, first: int, count: int) -> bool:
        """Whether all is known that the files of these blocks tell of them. Never blocks."""
        return all(number in self._open for number, _, _ in self._pieces(first, count))

    def load(self, first: int, count: int) -> None:
        """Open the files of these blocks, as many as there are."""
        for number, _, _ in self._pieces(first, count):
            self._to_read(number)

    def zeros(self, block: int) -> bool | None:
        """Whether a block is known to be zeros; None if nothing is known. Never blocks."""
        segment = self._open.get(block // PER_SEGMENT)
        return None if segment is None else segment.zeros(block)

    # --------------------------------------------------------------- writing

    def write(self, first: int, data: memoryview | None, count: int, *, sync: bool) -> int:
        """Store ``count`` whole blocks from ``first`` on, or that they are zeros (None).
        Returns the bytes that took. Raises OSError."""
        step = self.form.block_size
        taken = 0
        for number, start, some in self._pieces(first, count):
            part = None
            if data is not None:
                part = data[(start - first) * step : (start - first + some) * step]
            taken += self._to_write(number).write(start, part, some, sync=sync)
        return taken
