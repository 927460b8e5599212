"""A lazy buffer's file beside a file of `open` with the same bytes: the same calls, the same ends.

Raw, and under the buffered reader that libraries put above it.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

import aiouffd
from tests.faulty import PlainSource

LENGTH = 3 * 4096 + 77
#: Lines of many lengths, empty ones and one longer than a block among them.
DATA = (b"".join(b"x" * (n * n % 97) + b"\n" for n in range(220)) + b"y" * LENGTH)[:LENGTH]
SIZES = st.one_of(st.none(), st.integers(-2, 200), st.integers(0, LENGTH + 99))
OFFSETS = st.one_of(st.integers(-LENGTH - 9, LENGTH + 9), st.sampled_from([1 << 36, 1 << 63]))


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        # io's own errors of usage are OSError and ValueError at once, with and without a number.
        kinds = (OSError, OverflowError, ValueError, TypeError)
        return next(kind for kind in kinds if isinstance(error, kind))


class Files(RuleBasedStateMachine):
    """`ours` and `theirs` move along together."""

    @initialize(buffered=st.sampled_from([0, 1, 100, 8192]))
    def begin(self, buffered: int) -> None:
        with tempfile.NamedTemporaryFile() as made:
            made.write(DATA)
            made.flush()
            self.theirs: Any = io.FileIO(made.name)
        self.number = self.theirs.fileno()
        self.file = aiouffd.open_file(PlainSource(DATA), block_size=4096)
        self.ours: Any = self.file
        if buffered:
            self.ours = io.BufferedReader(self.ours, buffered)
            self.theirs = io.BufferedReader(self.theirs, buffered)

    def both(self, call: Callable[[Any], Any]) -> None:
        assert outcome(lambda: call(self.ours)) == outcome(lambda: call(self.theirs))
        assert outcome(self.ours.tell) == outcome(self.theirs.tell)

    @rule(size=SIZES)
    def read(self, size: int | None) -> None:
        self.both(lambda file: file.read(size))

    @rule(size=SIZES)
    def readline(self, size: int | None) -> None:
        self.both(lambda file: file.readline(-1 if size is None else size))

    @rule(hint=SIZES)
    def readlines(self, hint: int | None) -> None:
        self.both(lambda file: file.readlines(hint))

    @rule()
    def next_line(self) -> None:
        self.both(lambda file: next(file, None))

    @rule(size=st.integers(0, LENGTH), name=st.sampled_from(["readinto", "readinto1"]))
    def readinto(self, size: int, name: str) -> None:
        def call(file: Any) -> tuple[int, bytes]:
            target = bytearray(b"-" * size)
            count = getattr(file, name if hasattr(file, name) else "readinto")(target)
            return count, bytes(target)

        self.both(call)

    @rule(size=st.integers(0, 99))
    def peek(self, size: int) -> None:
        if hasattr(self.theirs, "peek"):
            self.both(lambda file: file.peek(size))
            self.both(lambda file: file.read1(size))

    @rule(offset=OFFSETS, whence=st.sampled_from([0, 1, 2]))
    def seek(self, offset: int, whence: int) -> None:
        self.both(lambda file: file.seek(offset, whence))

    @rule(size=st.integers(0, LENGTH), offset=st.integers(0, LENGTH + 9))
    def pread(self, size: int, offset: int) -> None:
        assert self.file.pread(size, offset) == os.pread(self.number, size, offset)

    @rule(name=st.sampled_from(["readable", "writable", "seekable", "isatty", "truncate", "flush"]))
    def state(self, name: str) -> None:
        self.both(lambda file: getattr(file, name)())

    @rule(name=st.sampled_from(["write", "writelines"]))
    def write(self, name: str) -> None:
        self.both(lambda file: getattr(file, name)([b"a"] if name == "writelines" else b"a"))

    @rule(value=st.sampled_from([1.5, "1", b"1"]), name=st.sampled_from(["read", "seek"]))
    def no_number(self, value: Any, name: str) -> None:
        self.both(lambda file: getattr(file, name)(value))

    def teardown(self) -> None:
        if hasattr(self, "ours"):
            self.ours.close()
            self.theirs.close()
            for name in ("read", "tell", "readline", "readable", "fileno", "isatty", "readlines"):
                ours = outcome(getattr(self.ours, name))
                assert ours is outcome(getattr(self.theirs, name)) is ValueError, name


TestFiles = Files.TestCase
TestFiles.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
