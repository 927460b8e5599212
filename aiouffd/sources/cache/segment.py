"""One segment file: a table of sealed checksums, then the blocks they are of.

A block counts only while its record's seal is right and its bytes have the record's checksum, at
every read. So no order of writes matters and no lock is needed: whatever a killed process, a
power failure, a full disk or a second writer leaves behind is either right or a miss.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise

from .layout import PER_SEGMENT, Format, own_file

__all__ = ["Segment"]

_SEAL = 8
_DATA, _ZEROS = 1, 2
_PIECE = 4 << 20  # one preadv; between two a cancelled read stops, bytes
_TOUCH = 60.0  # seconds between two notes that a segment is in use
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)

Digest = Callable[[memoryview], bytes]


class Segment:
    """Open file of the blocks ``number * PER_SEGMENT`` and on. Methods may raise OSError.

    Usable from several threads. Closed when nobody refers to it: a thread that reads may
    outlast its place among the open ones.
    """

    def __init__(self, path: str, form: Format, number: int, digest: Digest, *, write: bool):
        self._fd = -1
        self.writable = True
        try:
            self._fd = os.open(path, _FLAGS | os.O_RDWR | (os.O_CREAT if write else 0), 0o600)
        except OSError as error:
            if write or isinstance(error, FileNotFoundError):
                raise
            self.writable = False
            self._fd = os.open(path, _FLAGS | os.O_RDONLY)
        if not own_file(os.fstat(self._fd)):
            raise PermissionError(errno.EPERM, "not a file of ours", path)
        self._form = form
        # The key ties it to this version of this object, wherever the file may be moved to.
        self._sealer = hashlib.blake2b(digest_size=_SEAL, key=form.identity)
        self._digest = digest
        self._first = number * PER_SEGMENT
        self._raw = b""
        #: Flag and digest by block.
        self._records: dict[int, tuple[int, bytes]] = {}
        self._lock = threading.Lock()
        self._touched = 0.0
        self._nowait = bool(_NOWAIT)
        self.load()

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    @property
    def gone(self) -> bool:
        """Whether the file has no name any more: evicted, or thrown away."""
        return os.fstat(self._fd).st_nlink == 0

    def load(self) -> None:
        """Take in records that others have added."""
        width = self._form.record_size
        raw = os.pread(self._fd, PER_SEGMENT * width, 0)
        raw += bytes(PER_SEGMENT * width - len(raw))
        with self._lock:
            before, self._raw = self._raw, raw
            if raw == before:
                return
            nothing = bytes(width)
            for number in range(PER_SEGMENT):
                record = raw[number * width : (number + 1) * width]
                if record == before[number * width : (number + 1) * width]:
                    continue
                block = self._first + number
                self._records.pop(block, None)
                if record != nothing and record == self._record(block, record[0], record[1:-_SEAL]):
                    self._records[block] = (record[0], record[1:-_SEAL])

    def _record(self, block: int, flag: int, digest: bytes) -> bytes:
        body = bytes([flag]) + digest
        seal = self._sealer.copy()
        seal.update(body + block.to_bytes(8, "big"))
        return body + seal.digest()

    def _position(self, block: int) -> int:
        return self._form.data_start + (block - self._first) * self._form.block_size

    # -------------------------------------------------------------- reading

    def zeros(self, block: int) -> bool | None:
        """Whether a block is known to be all zeros; None if it is not cached. Never blocks."""
        record = self._records.get(block)
        return None if record is None else record[0] == _ZEROS

    def read_into(self, first: int, view: memoryview, stop: threading.Event | None) -> list[int]:
        """Fill ``view`` with whole blocks from ``first`` on; returns those that are not there."""
        step = self._form.block_size
        last = first + -(-len(view) // step)
        if any(block not in self._records for block in range(first, last)):
            self.load()
        self._touch()
        missing: list[int] = []
        for start, end, kind in self._runs(first, last):
            if stop is not None and stop.is_set():
                break
            part = view[(start - first) * step : (end - first) * step]
            if kind == _ZEROS:
                part[:] = bytes(len(part))
            elif kind == _DATA:
                missing += self._read_run(start, part)
            else:
                missing += range(start, end)
        return missing

    def read_now(self, first: int, view: memoryview) -> bool:
        """Fill ``view`` with whole blocks if that needs no disk; False if not. Never blocks."""
        last = first + -(-len(view) // self._form.block_size)
        if not self._nowait or [*self._runs(first, last)] != [(first, last, _DATA)]:
            return False
        if self._touch_due():
            return False  # once a minute by `read_into`, which may wait for a disk
        try:
            done = os.preadv(self._fd, [view], self._position(first), _NOWAIT)
        except BlockingIOError:
            return False
        except OSError:
            self._nowait = False
            return False
        return done == len(view) and not self._bad(first, view, len(view))

    def _runs(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Blocks ``first`` to ``last`` by what is known of them: start, end, flag or 0."""
        records = self._records
        most = max(1, _PIECE // self._form.block_size)
        runs: list[tuple[int, int, int]] = []
        for block in range(first, last):
            flag = records.get(block, (0,))[0]
            if runs and runs[-1][2] == flag and (not flag or block - runs[-1][0] < most):
                runs[-1] = (runs[-1][0], block + 1, flag)
            else:
                runs.append((block, block + 1, flag))
        return runs

    def _read_run(self, first: int, view: memoryview) -> list[int]:
        done = 0
        position = self._position(first)
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], position + done)
                if not count:
                    break
                done += count
        except OSError:
            pass  # what could not be read is missing, and what could may be right
        return self._bad(first, view, done)

    def _bad(self, first: int, view: memoryview, done: int) -> list[int]:
        """Blocks of ``view``, of which ``done`` bytes were read, that are not what they should
        be. They are forgotten."""
        step = self._form.block_size
        bad: list[int] = []
        edges = [*range(0, len(view), step), len(view)]
        for block, (start, end) in enumerate(pairwise(edges), first):
            record = self._records.get(block)
            if end > done or record is None or self._digest(view[start:end]) != record[1]:
                self._records.pop(block, None)
                bad.append(block)
        return bad

    def _touch_due(self) -> bool:
        return not self._touched or time.monotonic() - self._touched > _TOUCH

    def _touch(self) -> None:
        if self._touch_due():
            self._touched = time.monotonic()
            try:
                os.utime(self._fd)
            except OSError:
                pass  # read-only: then nobody evicts either

    # -------------------------------------------------------------- writing

    def write(self, first: int, data: memoryview | None, count: int, *, sync: bool) -> int:
        """Store ``count`` whole blocks from ``first`` on; None stands for zeros. Returns the
        bytes that took. Raises OSError, and then what was there before may be gone."""
        form = self._form
        step = form.block_size
        found: list[tuple[int, bytes]] = []
        taken = 0
        if data is None:
            found = [(_ZEROS, b"")] * count
        else:
            found = [self._judge(data[start : start + step]) for start in range(0, len(data), step)]
            for start, end, flag in _same([flag for flag, _ in found]):
                if flag == _DATA:
                    part = data[start * step : end * step]
                    _write_all(self._fd, part, self._position(first + start))
                    taken += len(part)
        if sync:
            os.fdatasync(self._fd)
        nothing = bytes(form.record_size - 1 - _SEAL)
        table = b"".join(
            self._record(first + number, flag, digest or nothing)
            for number, (flag, digest) in enumerate(found)
        )
        _write_all(self._fd, memoryview(table), (first - self._first) * form.record_size)
        if sync:
            os.fdatasync(self._fd)
        for number, (flag, digest) in enumerate(found):
            self._records[first + number] = (flag, digest or nothing)
        return taken + len(table)

    def _judge(self, block: memoryview) -> tuple[int, bytes]:
        if bytes(block[:64]).count(0) == len(block[:64]) and not any(block[64:4096]):
            data = bytes(block)
            if data.count(0) == len(data):
                return _ZEROS, b""
        return _DATA, self._digest(block)


def _same(flags: list[int]) -> list[tuple[int, int, int]]:
    """Runs of equal flags: start, end, flag."""
    edges = [0, *(at for at in range(1, len(flags)) if flags[at] != flags[at - 1]), len(flags)]
    return [(start, end, flags[start]) for start, end in pairwise(edges)]


def _write_all(fd: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(fd, data, position)
        data = data[count:]
        position += count
