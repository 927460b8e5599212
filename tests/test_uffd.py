"""`Userfaultfd` with real faults on the running kernel.

Memory is touched only by C calls that release the GIL, on threads of their own. Each such thread is
waited for with a timeout, and is a daemon, so that a fault nobody serves fails a test
and does not hang it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aiouffd.errors import ClosedError, KernelError, UnsupportedError, UsageError
from aiouffd.kernel import uffd as uffd_module
from aiouffd.kernel.abi import (
    FaultFlag,
    Feature,
    Fork,
    Ioctl,
    Message,
    Mode,
    PageCategory,
    PageFault,
    PageRegion,
    Remap,
    Remove,
    Unmap,
)
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.kernel.messages import Messages
from aiouffd.kernel.uffd import (
    CreationError,
    CreationPermissionError,
    Userfaultfd,
    address_of,
    kernel_features,
)
from tests.faulty import huge_pages as reserved_huge_pages

try:
    AVAILABLE = kernel_features()
    Userfaultfd().close()
except CreationError as error:
    pytest.skip(f"no userfaultfd here: {error}", allow_module_level=True)

PATIENCE = 10.0
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_HUGETLB = 0x01, 0x02, 0x20, 0x40000
MREMAP_MAYMOVE, MADV_DONTNEED = 1, 4
HUGE = 2 << 20

libc = ctypes.CDLL(None, use_errno=True)  # each call releases the GIL
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.write.restype = ctypes.c_ssize_t
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]


def needs(*features: Feature) -> pytest.MarkDecorator:
    lacking = [feature.name for feature in features if feature not in AVAILABLE]
    return pytest.mark.skipif(bool(lacking), reason=f"this kernel lacks {lacking}")


class Worker(threading.Thread):
    """A call on its own thread. ``result`` waits for what it returned."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self.join(PATIENCE)
        assert not self.is_alive(), "the thread is still blocked"
        if self._error is not None:
            raise self._error
        return self._result

    def assert_blocked(self) -> None:
        self.join(0.05)
        assert self.is_alive(), "the thread was expected to wait"


def reading(address: int, length: int = 1) -> Worker:
    """Copies ``length`` bytes out, in user mode."""
    buffer = ctypes.create_string_buffer(length)

    def call() -> bytes:
        libc.memcpy(ctypes.addressof(buffer), address, length)
        return buffer.raw

    return Worker(call)


def writing(address: int, value: int = 0x77, length: int = 1) -> Worker:
    return Worker(lambda: libc.memset(address, value, length))


class Memory:
    """A mapping that is released at the end of the test."""

    def __init__(self, pages: int, *, flags: int, fd: int, size: int) -> None:
        self.length = pages * size
        self.page = size
        address = libc.mmap(None, self.length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        assert address != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        self.address: int = address

    def at(self, page: int) -> int:
        return self.address + page * self.page

    def fill(self, value: int, page: int = 0, pages: int = 1) -> None:
        libc.memset(self.at(page), value, pages * self.page)

    def unmap(self) -> None:
        """Once: the next time something else may be there."""
        if self.length:
            libc.munmap(self.address, self.length)
            self.length = 0

    def look(self, page: int = 0, count: int = 1) -> bytes:
        return bytes(reading(self.at(page), count).result())


class Mapper:
    def __init__(self) -> None:
        self.made: list[Memory] = []

    def __call__(
        self,
        pages: int,
        *,
        flags: int = MAP_PRIVATE | MAP_ANONYMOUS,
        fd: int = -1,
        size: int = PAGE_SIZE,
    ) -> Memory:
        memory = Memory(pages, flags=flags, fd=fd, size=size)
        self.made.append(memory)
        return memory


@pytest.fixture
def mapping() -> Iterator[Mapper]:
    mapper = Mapper()
    yield mapper
    for memory in mapper.made:
        memory.unmap()


class Opener:
    def __init__(self) -> None:
        self.made: list[Userfaultfd] = []

    def __call__(self, features: Feature = Feature(0), **kwargs: Any) -> Userfaultfd:  # noqa: B008
        uffd = Userfaultfd(features, **kwargs)
        self.made.append(uffd)
        return uffd


@pytest.fixture
def opening(mapping: Mapper) -> Iterator[Opener]:
    """Makes descriptors which are closed before the memory is unmapped."""
    opener = Opener()
    yield opener
    for uffd in opener.made:
        uffd.close()


@pytest.fixture
def uffd(opening: Opener) -> Userfaultfd:
    return opening(Feature.THREAD_ID)


@pytest.fixture
def memfd() -> Iterator[Callable[[int], int]]:
    made: list[int] = []

    def make(length: int) -> int:
        fd = os.memfd_create("aiouffd-test", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        made.append(fd)
        return fd

    yield make
    for fd in made:
        os.close(fd)


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """Reserves four huge pages of 2 MiB, and gives them back."""
    with reserved_huge_pages(4):
        yield 4


@contextlib.contextmanager
def no_free_descriptor() -> Iterator[None]:
    """Uses up all descriptors of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fill = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(fill[0], 3) + 1, hard))
    try:
        while True:
            try:
                fill.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in fill:
            os.close(fd)


def messages(uffd: Userfaultfd, count: int = 1) -> list[Message]:
    """Waits until ``count`` messages have come."""
    got: list[Message] = []
    poller = select.poll()
    poller.register(uffd.fileno(), select.POLLIN)
    end = time.monotonic() + PATIENCE
    while len(got) < count:
        assert time.monotonic() < end, f"only {got} came"
        poller.poll(100)
        got += uffd.read()
    return got


def fault(uffd: Userfaultfd) -> PageFault:
    (message,) = messages(uffd)
    assert isinstance(message, PageFault)
    return message


def persist(call: Callable[[], Any]) -> Any:
    """Repeats a call while mappings are changing."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except KernelError as error:
            if error.errno != errno.EAGAIN or error.done or time.monotonic() > end:
                raise
            time.sleep(0.0001)


def code_of(call: Callable[[], Any]) -> tuple[int | None, int]:
    """(errno, done) of a call that must fail."""
    with pytest.raises(KernelError) as caught:
        call()
    assert caught.value.hint
    return caught.value.errno, caught.value.done


def page(value: int, pages: int = 1) -> bytes:
    return bytes([value]) * (pages * PAGE_SIZE)


class TestCreation:
    def test_it_is_nonblocking_and_closes_on_exec(self, uffd: Userfaultfd) -> None:
        assert not os.get_blocking(uffd.fileno())
        assert not os.get_inheritable(uffd.fileno())

    def test_properties(self, opening: Opener) -> None:
        uffd = opening(Feature.THREAD_ID | Feature.EVENT_REMOVE)
        assert uffd.features == Feature.THREAD_ID | Feature.EVENT_REMOVE
        assert uffd.available == AVAILABLE
        basic = Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API
        assert uffd.ioctls & ~Ioctl.SET_MODE == basic  # that from 7.3 on
        assert uffd.user_mode_only is False
        assert "EVENT_REMOVE|THREAD_ID" in repr(uffd)
        assert f"fd={uffd.fileno()}" in repr(uffd)
        uffd.close()
        assert repr(uffd) == "<Userfaultfd closed>"

    @needs(Feature.WP_ASYNC)
    def test_wp_async_brings_wp_unpopulated(self, opening: Opener) -> None:
        assert Feature.WP_UNPOPULATED in opening(Feature.WP_ASYNC).features

    @pytest.mark.parametrize("path", ["syscall", "device"])
    def test_forced_paths(self, path: Any) -> None:
        try:
            uffd = Userfaultfd(path=path)
        except CreationError as error:
            pytest.skip(str(error))
        with uffd:
            assert ("dev" in repr(uffd)) == (path == "device")

    def test_descriptor_of_the_device(self) -> None:
        try:
            device = os.open("/dev/userfaultfd", os.O_RDONLY)
        except OSError as error:
            pytest.skip(str(error))
        try:
            with Userfaultfd(path=device) as uffd:
                assert uffd.read() == []
            os.fstat(device)  # it stayed open
        finally:
            os.close(device)

    def test_a_descriptor_of_something_else_is_refused(self) -> None:
        with open("/dev/null") as null, pytest.raises(CreationError) as caught:
            Userfaultfd(path=null.fileno())
        assert "not the userfaultfd device" in str(caught.value)
        assert caught.value.attempts[0].errno in (errno.ENOTTY, errno.EINVAL)

    @pytest.mark.parametrize("path", ["sysfs", True, 1.5, -1])
    def test_senseless_paths(self, path: Any) -> None:
        with pytest.raises(UsageError):
            Userfaultfd(path=path)

    def test_unknown_features_are_named(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(UnsupportedError) as caught:
            Userfaultfd(Feature(1 << 40 | 1))
        assert hex(1 << 40) in str(caught.value)
        assert "PAGEFAULT_FLAG_WP" not in str(caught.value)
        assert len(os.listdir("/proc/self/fd")) == before

    def test_no_free_descriptor_is_not_a_matter_of_permission(self) -> None:
        with no_free_descriptor(), pytest.raises(CreationError) as caught:
            Userfaultfd()
        assert caught.value.errno == errno.EMFILE
        assert not isinstance(caught.value, PermissionError)

    def test_none_takes_what_is_allowed(self, opening: Opener) -> None:
        assert opening(user_mode_only=None).user_mode_only is False


class TestLifetime:
    def test_closing_twice_is_fine(self, uffd: Userfaultfd) -> None:
        fd = uffd.fileno()
        uffd.close()
        uffd.close()
        assert uffd.closed
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    def test_every_method_says_that_it_is_closed(self, uffd: Userfaultfd) -> None:
        uffd.close()
        calls: list[Callable[[], Any]] = [
            uffd.fileno,
            uffd.read,
            lambda: uffd.register(0, PAGE_SIZE, Mode.MISSING),
            lambda: uffd.unregister(0, PAGE_SIZE),
            lambda: uffd.copy(0, page(1)),
            lambda: uffd.zeropage(0, PAGE_SIZE),
            lambda: uffd.continue_(0, PAGE_SIZE),
            lambda: uffd.move(0, 0, PAGE_SIZE),
            lambda: uffd.writeprotect(0, PAGE_SIZE, protect=True),
            lambda: uffd.poison(0, PAGE_SIZE),
            lambda: uffd.wake(0, PAGE_SIZE),
            lambda: uffd.scan(0, PAGE_SIZE),
        ]
        for call in calls:
            with pytest.raises(ClosedError, match="closed"):
                call()

    def test_forgotten_ones_warn_and_are_closed(self) -> None:
        uffd = Userfaultfd()
        fd = uffd.fileno()
        box = [uffd]
        del uffd
        with pytest.warns(ResourceWarning, match="unclosed <Userfaultfd"):
            box.clear()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    def test_forgotten_ones_with_ranges_stay_open_for_zeros_are_worse(
        self, mapping: Mapper
    ) -> None:
        memory = mapping(1)
        uffd = Userfaultfd()
        uffd.register(memory.address, memory.length, Mode.MISSING)
        fd = uffd.fileno()
        box = [uffd]
        del uffd
        with pytest.warns(ResourceWarning):
            box.clear()
        os.close(fd)

    def test_close_lets_waiters_go_on_with_zeros(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.address)
        fault(uffd)
        reader.assert_blocked()
        uffd.close()
        assert reader.result() == b"\0"

    def test_close_during_a_call_waits_for_it(self, uffd: Userfaultfd) -> None:
        fd = uffd._descriptor.enter("test")
        uffd.close()
        os.fstat(fd)
        with pytest.raises(ClosedError):
            uffd.read()
        uffd._descriptor.leave()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    def test_a_forked_child_closes_its_copy(self, uffd: Userfaultfd) -> None:
        pipe_out, pipe_in = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads may live
            child = os.fork()
        if child == 0:
            verdict = b"?"
            try:
                links = [
                    os.readlink(f"/proc/self/fd/{fd}")
                    for fd in os.listdir("/proc/self/fd")
                    if os.path.lexists(f"/proc/self/fd/{fd}")
                ]
                open_copy = any("userfaultfd" in link for link in links)
                verdict = b"open" if open_copy or not uffd.closed else b"closed"
            finally:
                os.write(pipe_in, verdict)
                os._exit(0)
        os.close(pipe_in)
        os.waitpid(child, 0)
        assert os.read(pipe_out, 16) == b"closed"
        os.close(pipe_out)
        assert uffd.read() == []


class TestFromFd:
    def test_it_adopts_a_copy(self, opening: Opener, mapping: Mapper) -> None:
        first = opening(Feature.THREAD_ID)
        copy = os.dup(first.fileno())
        os.set_blocking(copy, True)
        os.set_inheritable(copy, True)
        with Userfaultfd.from_fd(copy) as second:
            assert second.features == Feature.THREAD_ID
            assert Ioctl.COPY in second.ioctls
            assert second.user_mode_only is None
            assert second.available == AVAILABLE
            assert not os.get_blocking(copy)
            assert not os.get_inheritable(copy)
            memory = mapping(1)
            second.register(memory.address, memory.length, Mode.MISSING)
            reader = reading(memory.address)
            fault(second)
            second.copy(memory.address, page(5))
            assert reader.result() == b"\5"
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(copy)

    def test_without_own_the_descriptor_stays_open(self, uffd: Userfaultfd) -> None:
        with Userfaultfd.from_fd(uffd.fileno(), own=False):
            pass
        os.fstat(uffd.fileno())

    def test_other_descriptors_are_refused(self) -> None:
        with open("/dev/null") as null, pytest.raises(UsageError, match="not a userfaultfd"):
            Userfaultfd.from_fd(null.fileno())
        with pytest.raises(UsageError, match="not an open descriptor"):
            Userfaultfd.from_fd(987654)

    def test_one_that_has_not_shaken_hands_is_refused(self) -> None:
        from aiouffd.kernel.lib import lib

        fd = lib.au_abi_open(0, lib.AU_VIA_SYSCALL, -1)
        if fd < 0:
            pytest.skip("not by the system call")
        try:
            with pytest.raises(UsageError, match="not been initialised"):
                Userfaultfd.from_fd(fd)
        finally:
            os.close(fd)


class TestArguments:
    """Wrong arguments are found before the kernel is asked."""

    @pytest.mark.parametrize(
        ("start", "length"),
        [
            (1, PAGE_SIZE),
            (0, 0),
            (0, PAGE_SIZE - 1),
            (-PAGE_SIZE, PAGE_SIZE),
            (0, -PAGE_SIZE),
            (1 << 64, PAGE_SIZE),
            ((1 << 64) - PAGE_SIZE, PAGE_SIZE),
            ("0", PAGE_SIZE),
            (0, 4096.0),
        ],
    )
    def test_ranges(self, uffd: Userfaultfd, start: Any, length: Any) -> None:
        calls: list[Callable[[], Any]] = [
            lambda: uffd.register(start, length, Mode.MISSING),
            lambda: uffd.unregister(start, length),
            lambda: uffd.copy(start, 4096, length),
            lambda: uffd.zeropage(start, length),
            lambda: uffd.continue_(start, length),
            lambda: uffd.move(start, 4096, length),
            lambda: uffd.move(4096, start, length),
            lambda: uffd.writeprotect(start, length, protect=False),
            lambda: uffd.poison(start, length),
            lambda: uffd.wake(start, length),
            lambda: uffd.scan(start, length),
        ]
        for call in calls:
            with pytest.raises(UsageError):
                call()

    @pytest.mark.parametrize("mode", [0, 16, "WP", None])
    def test_modes(self, uffd: Userfaultfd, mode: Any) -> None:
        with pytest.raises(UsageError):
            uffd.register(0, PAGE_SIZE, mode)

    def test_sources_of_copy(self, uffd: Userfaultfd) -> None:
        with pytest.raises(UsageError, match="needs a length"):
            uffd.copy(0, 4096)
        with pytest.raises(UsageError, match="source has 10"):
            uffd.copy(0, b"0123456789", PAGE_SIZE)
        with pytest.raises(UsageError, match="pages"):
            uffd.copy(0, b"0123456789")
        with pytest.raises(UsageError, match="contiguous"):
            uffd.copy(0, memoryview(bytes(2 * PAGE_SIZE))[::2])
        with pytest.raises(UsageError):
            uffd.copy(0, "text")  # type: ignore[arg-type]

    def test_read_wants_a_positive_number(self, uffd: Userfaultfd) -> None:
        with pytest.raises(UsageError):
            uffd.read(0)

    def test_address_of(self) -> None:
        data = bytearray(10)
        expected = ctypes.addressof(ctypes.c_char.from_buffer(data))
        assert address_of(data) == expected
        assert address_of(memoryview(data)[3:]) == expected + 3
        data.append(1)  # it is not locked


class TestRegister:
    def test_it_tells_the_ioctls(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(4)
        ioctls = uffd.register(memory.address, memory.length, Mode.MISSING)
        assert Ioctl.WAKE | Ioctl.COPY | Ioctl.ZEROPAGE in ioctls
        assert Ioctl.WRITEPROTECT not in ioctls

    def test_it_can_be_asked_with_plain_numbers(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode(1))

    def test_another_userfaultfd_has_it(
        self, uffd: Userfaultfd, opening: Opener, mapping: Mapper
    ) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        other = opening()
        assert code_of(lambda: other.register(memory.address, memory.length, Mode.MISSING)) == (
            errno.EBUSY,
            0,
        )

    @needs(Feature.MINOR_SHMEM)
    def test_minor_on_anonymous_memory(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        with pytest.raises(KernelError, match="shared or hugetlb") as caught:
            uffd.register(memory.address, memory.length, Mode.MINOR)
        assert caught.value.errno == errno.EINVAL
        assert "[EINVAL] register of [0x" in str(caught.value)

    def test_unregister_makes_ordinary_memory(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.address)
        fault(uffd)
        uffd.unregister(memory.address, memory.length)
        assert reader.result() == b"\0"
        assert memory.look(1) == b"\0"

    def test_unregister_wakes_those_who_wait_to_write(
        self, uffd: Userfaultfd, mapping: Mapper
    ) -> None:
        memory = mapping(1)
        memory.fill(1)
        uffd.register(memory.address, memory.length, Mode.WP)
        uffd.writeprotect(memory.address, memory.length, protect=True)
        writer = writing(memory.address)
        assert fault(uffd).is_wp
        uffd.unregister(memory.address, memory.length)
        writer.result()
        assert memory.look() == b"\x77"


class TestResolving:
    def test_copy(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.at(1) + 10, 4)
        message = fault(uffd)
        assert message.address == memory.at(1)
        assert message.flags == FaultFlag(0)
        assert message.thread_id == reader.native_id
        data = b"x" * 10 + b"abcd" + b"y" * (PAGE_SIZE - 14)
        assert uffd.copy(memory.at(1), data) == PAGE_SIZE
        assert reader.result() == b"abcd"

    @needs(Feature.EXACT_ADDRESS)
    def test_exact_address_and_write(self, opening: Opener, mapping: Mapper) -> None:
        uffd = opening(Feature.EXACT_ADDRESS)
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        writer = writing(memory.address + 123)
        message = fault(uffd)
        assert message.address == memory.address + 123
        assert message.is_write
        assert message.thread_id > 0
        uffd.zeropage(memory.address, PAGE_SIZE)
        writer.result()

    @pytest.mark.parametrize("kind", ["bytes", "bytearray", "memoryview", "mmap", "unaligned"])
    def test_copy_takes_any_buffer(self, uffd: Userfaultfd, mapping: Mapper, kind: str) -> None:
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        data = page(1) + page(2)
        if kind == "mmap":
            with mmap.mmap(-1, len(data)) as source:
                source[:] = data
                assert uffd.copy(memory.address, source) == len(data)
        else:
            source_of: dict[str, Any] = {
                "bytes": data,
                "bytearray": bytearray(data),
                "memoryview": memoryview(data).cast("B", (2, PAGE_SIZE)),
                "unaligned": memoryview(b"abc" + data)[3:],
            }
            assert uffd.copy(memory.address, source_of[kind]) == len(data)
        assert memory.look(0) + memory.look(1) == b"\1\2"

    def test_copy_from_an_address(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory, source = mapping(2), mapping(1)
        source.fill(9)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert uffd.copy(memory.address, source.address, PAGE_SIZE) == PAGE_SIZE
        assert memory.look() == b"\x09"
        assert code_of(lambda: uffd.copy(memory.at(1), 4096, PAGE_SIZE)) == (errno.EFAULT, 0)

    def test_copy_of_the_beginning_of_a_buffer(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert uffd.copy(memory.address, page(1, 2), PAGE_SIZE) == PAGE_SIZE
        assert code_of(lambda: uffd.copy(memory.address, page(1), PAGE_SIZE))[0] == errno.EEXIST
        assert uffd.zeropage(memory.at(1), PAGE_SIZE) == PAGE_SIZE

    def test_several_waiters_are_several_messages_and_one_copy(
        self, uffd: Userfaultfd, mapping: Mapper
    ) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        readers = [reading(memory.address) for _ in range(4)]
        got = messages(uffd, 4)
        assert {m.thread_id for m in got if isinstance(m, PageFault)} == {
            reader.native_id for reader in readers
        }
        uffd.copy(memory.address, page(3))
        assert [reader.result() for reader in readers] == [b"\3"] * 4

    def test_eexist_and_wake(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.address)
        fault(uffd)
        uffd.copy(memory.address, page(1), wake=False)
        with pytest.raises(KernelError, match=r"wake\(\) the range") as caught:
            uffd.copy(memory.address, page(2))
        assert (caught.value.errno, caught.value.done) == (errno.EEXIST, 0)
        reader.assert_blocked()
        uffd.wake(memory.address, PAGE_SIZE)
        assert reader.result() == b"\1"

    def test_wake_without_a_page_is_a_new_fault(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.address)
        fault(uffd)
        uffd.wake(memory.address, PAGE_SIZE)
        fault(uffd)
        uffd.zeropage(memory.address, PAGE_SIZE)
        assert reader.result() == b"\0"

    def test_partial_copy(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(4)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        uffd.copy(memory.at(2), page(7))
        with pytest.raises(KernelError, match="after 8192 bytes") as caught:
            uffd.copy(memory.address, page(1, 4))
        assert (caught.value.errno, caught.value.done) == (errno.EAGAIN, 2 * PAGE_SIZE)
        rest = memoryview(page(1, 4))[2 * PAGE_SIZE :]
        assert code_of(lambda: uffd.copy(memory.at(2), rest)) == (errno.EEXIST, 0)
        assert memory.look(1) + memory.look(2) == b"\1\7"

    def test_partial_as_a_result(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(4)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        uffd.zeropage(memory.at(3), PAGE_SIZE)
        assert uffd.zeropage(memory.address, memory.length, partial=True) == 3 * PAGE_SIZE
        assert code_of(lambda: uffd.zeropage(memory.at(3), PAGE_SIZE, partial=True)) == (
            errno.EEXIST,
            0,
        )

    def test_enoent_outside_of_the_range(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        assert code_of(lambda: uffd.copy(memory.address, page(1))) == (errno.ENOENT, 0)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        memory.unmap()
        assert code_of(lambda: uffd.copy(memory.address, page(1))) == (errno.ENOENT, 0)
        uffd.wake(memory.address, PAGE_SIZE)

    def test_esrch_when_the_owner_is_gone(self) -> None:
        """A child makes a userfaultfd, hands it over, and exits."""
        import socket

        ours, theirs = socket.socketpair()
        program = textwrap.dedent("""
            import socket, sys, mmap
            from aiouffd.uffd import *
            from aiouffd.abi import Mode
            memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            uffd = Userfaultfd(user_mode_only=None)
            uffd.register(address_of(memory), 4096, Mode.MISSING)
            peer = socket.socket(fileno=int(sys.argv[1]))
            socket.send_fds(peer, [b"%d" % address_of(memory)], [uffd.fileno()])
            peer.recv(1)
            import os; os._exit(0)
        """)
        with ours, theirs:
            child = subprocess.Popen(
                [sys.executable, "-c", program, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
            theirs.close()
            data, fds, _, _ = socket.recv_fds(ours, 64, 1)
            start = int(data)
            with Userfaultfd.from_fd(fds[0]) as uffd:
                assert uffd.copy(start, page(1)) == PAGE_SIZE
                ours.send(b"x")
                assert child.wait(PATIENCE) == 0
                assert code_of(lambda: uffd.copy(start, page(1))) == (errno.ESRCH, 0)
                uffd.wake(start, PAGE_SIZE)
                assert code_of(lambda: uffd.register(start, PAGE_SIZE, Mode.MISSING)) == (
                    errno.ENOMEM,
                    0,
                )

    def test_faults_in_kernel_mode(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        out, into = os.pipe()
        writer = Worker(lambda: libc.write(into, memory.address, 5))
        fault(uffd)
        uffd.copy(memory.address, b"hello" + bytes(PAGE_SIZE - 5))
        assert writer.result() == 5
        assert os.read(out, 10) == b"hello"
        os.close(out)
        os.close(into)

    def test_user_mode_only(self, opening: Opener, mapping: Mapper) -> None:
        try:
            uffd = opening(user_mode_only=True)
        except UnsupportedError as error:  # before Linux 5.11
            pytest.skip(str(error))
        assert uffd.user_mode_only is True
        assert "user mode only" in repr(uffd)
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        out, into = os.pipe()

        def call() -> int:
            assert libc.write(into, memory.address, 5) == -1
            return ctypes.get_errno()

        assert Worker(call).result() == errno.EFAULT
        reader = reading(memory.address)
        fault(uffd)
        uffd.zeropage(memory.address, PAGE_SIZE)
        assert reader.result() == b"\0"
        os.close(out)
        os.close(into)

    @needs(Feature.SIGBUS)
    def test_sigbus_feature_makes_no_messages(self, opening: Opener, mapping: Mapper) -> None:
        uffd = opening(Feature.SIGBUS)
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        out, into = os.pipe()
        assert Worker(lambda: libc.write(into, memory.address, 1)).result() == -1
        assert uffd.read() == []
        os.close(out)
        os.close(into)


class TestWriteProtect:
    def test_present_pages(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(2)
        memory.fill(1, 0, 2)
        assert Ioctl.WRITEPROTECT in uffd.register(memory.address, memory.length, Mode.WP)
        uffd.writeprotect(memory.address, memory.length, protect=True)
        assert memory.look(0) == b"\1"
        writer = writing(memory.at(1))
        message = fault(uffd)
        assert message.flags == FaultFlag.WP | FaultFlag.WRITE
        assert message.address == memory.at(1)
        uffd.writeprotect(memory.at(1), PAGE_SIZE, protect=False, wake=False)
        writer.assert_blocked()
        uffd.wake(memory.at(1), PAGE_SIZE)
        writer.result()
        assert memory.look(1) == b"\x77"

    def test_copied_pages_can_arrive_protected(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING | Mode.WP)
        writer = writing(memory.address)
        assert fault(uffd).is_missing
        uffd.copy(memory.address, page(1), wp=True)
        assert fault(uffd).is_wp
        uffd.writeprotect(memory.address, PAGE_SIZE, protect=False)
        writer.result()
        assert memory.look(0, 2) == b"\x77\1"

    def test_copying_protected_needs_the_mode(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert code_of(lambda: uffd.copy(memory.address, page(1), wp=True)) == (errno.EINVAL, 0)
        assert code_of(lambda: uffd.writeprotect(memory.address, PAGE_SIZE, protect=True)) == (
            errno.ENOENT,
            0,
        )

    @needs(Feature.WP_UNPOPULATED)
    @pytest.mark.parametrize("unpopulated", [False, True])
    def test_untouched_pages(self, opening: Opener, mapping: Mapper, unpopulated: bool) -> None:
        uffd = opening(Feature.WP_UNPOPULATED if unpopulated else Feature(0))
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.WP)
        uffd.writeprotect(memory.address, PAGE_SIZE, protect=True)
        writer = writing(memory.address)
        if unpopulated:
            assert fault(uffd).is_wp
            uffd.writeprotect(memory.address, PAGE_SIZE, protect=False)
        writer.result()
        assert memory.look() == b"\x77"


@needs(Feature.MINOR_SHMEM)
class TestMinor:
    def shared(self, mapping: Mapper, fd: int, pages: int) -> Memory:
        return mapping(pages, flags=MAP_SHARED, fd=fd)

    @pytest.mark.parametrize("write", [False, True])
    def test_pages_of_the_cache(
        self, uffd: Userfaultfd, mapping: Mapper, memfd: Callable[[int], int], write: bool
    ) -> None:
        fd = memfd(2 * PAGE_SIZE)
        os.pwrite(fd, page(4), PAGE_SIZE)
        memory = self.shared(mapping, fd, 2)
        ioctls = uffd.register(memory.address, memory.length, Mode.MISSING | Mode.MINOR)
        assert Ioctl.CONTINUE in ioctls
        worker = writing(memory.at(1)) if write else reading(memory.at(1))
        message = fault(uffd)
        assert message.is_minor
        assert message.is_write == write
        assert uffd.continue_(memory.at(1), PAGE_SIZE) == PAGE_SIZE
        result = worker.result()
        assert write or result == b"\4"
        assert code_of(lambda: uffd.continue_(memory.at(1), PAGE_SIZE)) == (errno.EEXIST, 0)

    def test_holes(self, uffd: Userfaultfd, mapping: Mapper, memfd: Callable[[int], int]) -> None:
        fd = memfd(2 * PAGE_SIZE)
        memory = self.shared(mapping, fd, 2)
        uffd.register(memory.address, memory.length, Mode.MISSING | Mode.MINOR)
        reader = reading(memory.address)
        assert fault(uffd).is_missing
        assert code_of(lambda: uffd.continue_(memory.address, PAGE_SIZE)) == (errno.EFAULT, 0)
        os.pwrite(fd, page(6), 0)
        assert uffd.continue_(memory.address, memory.length, partial=True) == PAGE_SIZE
        assert reader.result() == b"\6"

    @needs(Feature.WP_HUGETLBFS_SHMEM, Feature.WP_UNPOPULATED)
    def test_continued_pages_can_arrive_protected(
        self, uffd: Userfaultfd, mapping: Mapper, memfd: Callable[[int], int]
    ) -> None:
        fd = memfd(PAGE_SIZE)
        os.pwrite(fd, page(6), 0)
        memory = self.shared(mapping, fd, 1)
        uffd.register(memory.address, memory.length, Mode.MISSING | Mode.MINOR | Mode.WP)
        writer = writing(memory.address)
        assert fault(uffd).is_minor
        uffd.continue_(memory.address, PAGE_SIZE, wp=True)
        assert fault(uffd).is_wp
        uffd.writeprotect(memory.address, PAGE_SIZE, protect=False)
        writer.result()
        assert os.pread(fd, 2, 0) == b"\x77\6"

    def test_anonymous_memory_cannot_continue(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert code_of(lambda: uffd.continue_(memory.address, PAGE_SIZE)) == (errno.EINVAL, 0)


@needs(Feature.MOVE)
class TestMove:
    def test_pages_change_their_place(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory, source = mapping(2), mapping(2)
        source.fill(1, 0)
        source.fill(2, 1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.at(1))
        fault(uffd)
        assert uffd.move(memory.address, source.address, memory.length) == memory.length
        assert reader.result() == b"\2"
        assert memory.look(0) == b"\1"
        assert source.look(0) == b"\0"

    def test_holes(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory, source = mapping(3), mapping(3)
        source.fill(1, 0)
        source.fill(3, 2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert uffd.move(memory.address, source.address, memory.length, partial=True) == PAGE_SIZE
        assert code_of(lambda: uffd.move(memory.at(1), source.at(1), PAGE_SIZE)) == (
            errno.ENOENT,
            0,
        )
        moved = uffd.move(memory.at(1), source.at(1), 2 * PAGE_SIZE, allow_holes=True)
        assert moved == 2 * PAGE_SIZE
        assert memory.look(2) == b"\3"
        reader = reading(memory.at(1))
        assert fault(uffd).is_missing
        uffd.zeropage(memory.at(1), PAGE_SIZE)
        reader.result()

    def test_present_destination(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory, source = mapping(1), mapping(1)
        source.fill(1)
        memory.fill(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert code_of(lambda: uffd.move(memory.address, source.address, PAGE_SIZE)) == (
            errno.EEXIST,
            0,
        )

    def test_shared_memory_cannot_move(
        self, uffd: Userfaultfd, mapping: Mapper, memfd: Callable[[int], int]
    ) -> None:
        memory = mapping(1)
        source = mapping(1, flags=MAP_SHARED, fd=memfd(PAGE_SIZE))
        source.fill(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        assert code_of(lambda: uffd.move(memory.address, source.address, PAGE_SIZE)) == (
            errno.EINVAL,
            0,
        )


@needs(Feature.POISON)
class TestPoison:
    def test_system_calls_fail_and_copy_heals(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        out, into = os.pipe()

        def call() -> int:
            assert libc.write(into, memory.address, 5) == -1
            return ctypes.get_errno()

        writer = Worker(call)
        fault(uffd)
        assert uffd.poison(memory.address, PAGE_SIZE) == PAGE_SIZE
        assert writer.result() == errno.EFAULT
        assert code_of(lambda: uffd.poison(memory.address, PAGE_SIZE)) == (errno.EEXIST, 0)
        assert code_of(lambda: uffd.zeropage(memory.address, PAGE_SIZE)) == (errno.EEXIST, 0)
        uffd.copy(memory.address, page(8))
        assert memory.look() == b"\x08"
        os.close(out)
        os.close(into)

    def test_a_touch_is_sigbus(self) -> None:
        program = textwrap.dedent("""
            import ctypes, mmap
            from aiouffd.uffd import *
            from aiouffd.abi import Mode
            import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            uffd = Userfaultfd(user_mode_only=None)
            uffd.register(address_of(memory), 4096, Mode.MISSING)
            uffd.poison(address_of(memory), 4096)
            print("poisoned", flush=True)
            memory[0]
            print("survived", flush=True)
        """)
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.stdout == "poisoned\n"
        assert done.returncode == -signal.SIGBUS


class TestEvents:
    """Events hold up their maker until they are read, so another thread makes them."""

    def test_remove(self, opening: Opener, mapping: Mapper) -> None:
        uffd = opening(Feature.EVENT_REMOVE)
        memory = mapping(3)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        uffd.copy(memory.address, page(1, 3))
        caller = Worker(lambda: libc.madvise(memory.at(1), PAGE_SIZE, MADV_DONTNEED))
        select.select([uffd.fileno()], [], [], PATIENCE)
        assert code_of(lambda: uffd.zeropage(memory.at(0), PAGE_SIZE)) == (errno.EAGAIN, 0)
        assert code_of(lambda: uffd.zeropage(memory.at(0), PAGE_SIZE, partial=True)) == (
            errno.EAGAIN,
            0,
        )
        caller.assert_blocked()
        assert messages(uffd) == [Remove(memory.at(1), memory.at(2))]
        assert caller.result() == 0
        reader = reading(memory.at(1))
        fault(uffd)
        persist(lambda: uffd.copy(memory.at(1), page(2)))
        assert reader.result() == b"\2"

    def test_unmap(self, opening: Opener, mapping: Mapper) -> None:
        uffd = opening(Feature.EVENT_UNMAP)
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        caller = Worker(lambda: libc.munmap(memory.at(1), PAGE_SIZE))
        memory.length = PAGE_SIZE
        assert messages(uffd) == [Unmap(memory.at(1), memory.at(2))]
        assert caller.result() == 0

    def test_remap(self, opening: Opener, mapping: Mapper) -> None:
        uffd = opening(Feature.EVENT_REMAP)
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        blocker = mapping(1)  # so that growing may have to move
        old = memory.address
        caller = Worker(lambda: libc.mremap(old, 2 * PAGE_SIZE, 4096 * PAGE_SIZE, MREMAP_MAYMOVE))
        got = messages(uffd)
        new = caller.result()
        memory.address, memory.length = new, 4096 * PAGE_SIZE
        assert got == [Remap(old, new, 2 * PAGE_SIZE)]
        assert blocker.length == PAGE_SIZE
        reader = reading(memory.at(5))
        assert fault(uffd).address == memory.at(5)
        persist(lambda: uffd.zeropage(memory.at(5), PAGE_SIZE))
        reader.result()

    def test_fork(self, opening: Opener, mapping: Mapper) -> None:
        try:
            uffd = opening(Feature.EVENT_FORK)
        except CreationPermissionError as error:
            pytest.skip(str(error))
        memory = mapping(2)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        # The child is C from fork to exit: Python's own fork holds the GIL, and this
        # process needs it to read the event.
        out, into = os.pipe()
        child = self.fork_and_write(memory.address, into)
        (message,) = messages(uffd)
        assert isinstance(message, Fork)
        with Userfaultfd.from_fd(message.fd) as of_child:
            assert Feature.EVENT_FORK in of_child.features
            assert fault(of_child).address == memory.address
            assert uffd.read() == []
            persist(lambda: of_child.copy(memory.address, page(65)))
            pid = child.result()
            assert os.waitpid(pid, 0)[1] == 0
        assert os.read(out, 1) == b"A"
        os.close(out)
        os.close(into)

    def fork_and_write(self, address: int, into: int) -> Worker:
        """The bare system call: while glibc's fork waits, this process could not allocate."""
        code = textwrap.dedent("""
            #define _GNU_SOURCE
            #include <signal.h>
            #include <sys/syscall.h>
            #include <unistd.h>
            int fork_and_write(const char *from, int into);
            int fork_and_write(const char *from, int into)
            {
                int pid = (int)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
                if (pid == 0)
                    _exit(write(into, from, 1) == 1 ? 0 : 1);
                return pid;
            }
        """)
        with tempfile.TemporaryDirectory() as folder:
            library = ctypes.CDLL(str(compile_to(Path(folder), code)))
        library.fork_and_write.argtypes = [ctypes.c_void_p, ctypes.c_int]
        return Worker(lambda: library.fork_and_write(address, into))

    def test_reading_needs_no_malloc_whose_locks_fork_holds(self, tmp_path: Path) -> None:
        library = compile_to(
            tmp_path,
            """
            #include <unistd.h>
            int fork_and_exit(void);
            int fork_and_exit(void)
            {
                int pid = fork();
                if (pid == 0)
                    _exit(0);
                return pid;
            }
            """,
        )
        program = textwrap.dedent("""
            import ctypes, mmap, os, sys, threading
            from aiouffd.uffd import *
            from aiouffd.abi import *
            memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            library = ctypes.CDLL(sys.argv[1])
            with Userfaultfd(Feature.EVENT_FORK) as uffd:
                uffd.register(address_of(memory), 4096, Mode.MISSING)
                pids = []
                thread = threading.Thread(target=lambda: pids.append(library.fork_and_exit()))
                thread.start()
                got = []
                while not got:
                    got = uffd.read()
                os.close(got[0].fd)
                thread.join()
                os.waitpid(pids[0], 0)
                print("ok")
        """)
        done = subprocess.run(
            [sys.executable, "-c", program, str(library)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if "CAP_SYS_PTRACE" in done.stderr:
            pytest.skip("fork events are not allowed")
        assert (done.stdout, done.stderr) == ("ok\n", "")

    def test_fork_without_a_free_descriptor_can_be_read_later(
        self, opening: Opener, mapping: Mapper
    ) -> None:
        try:
            uffd = opening(Feature.EVENT_FORK)
        except CreationPermissionError as error:
            pytest.skip(str(error))
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        uffd.copy(memory.address, page(66))
        out, into = os.pipe()
        child = self.fork_and_write(memory.address, into)
        select.select([uffd.fileno()], [], [], PATIENCE)
        with no_free_descriptor():
            assert code_of(uffd.read) == (errno.EMFILE, 0)
        (message,) = messages(uffd)
        assert isinstance(message, Fork)
        os.close(message.fd)
        assert os.waitpid(child.result(), 0)[1] == 0
        assert os.read(out, 1) == b"B"
        os.close(out)
        os.close(into)


def compile_to(folder: Path, code: str) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "code.c", folder / "code.so"
    source.write_text(textwrap.dedent(code))
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True
    )
    return library


@needs(Feature.WP_ASYNC)
class TestScan:
    def tracked(self, opening: Opener, memory: Memory, **kwargs: Any) -> Userfaultfd:
        uffd = opening(Feature.WP_ASYNC, **kwargs)
        uffd.register(memory.address, memory.length, Mode.WP)
        uffd.scan(memory.address, memory.length, protect=True)
        return uffd

    @pytest.mark.parametrize("user_mode_only", [False, True])
    def test_dirty_pages(self, opening: Opener, mapping: Mapper, user_mode_only: bool) -> None:
        memory = mapping(64)
        memory.fill(1, 0, 64)
        uffd = self.tracked(opening, memory, user_mode_only=user_mode_only)
        assert uffd.scan(memory.address, memory.length, protect=True) == []
        memory.fill(2, 3)
        memory.fill(2, 4)
        memory.fill(2, 60)
        written = PageCategory.WRITTEN
        expected = [
            PageRegion(memory.at(3), memory.at(5), written),
            PageRegion(memory.at(60), memory.at(61), written),
        ]
        assert uffd.scan(memory.address, memory.length) == expected
        assert uffd.scan(memory.address, memory.length, protect=True) == expected
        assert uffd.scan(memory.address, memory.length) == []
        assert uffd.read() == []

    def test_before_it_is_armed_everything_is_written(
        self, opening: Opener, mapping: Mapper
    ) -> None:
        memory = mapping(4)
        uffd = opening(Feature.WP_ASYNC)
        uffd.register(memory.address, memory.length, Mode.WP)
        (region,) = uffd.scan(memory.address, memory.length)
        assert (region.start, region.end) == (memory.address, memory.at(4))

    def test_more_regions_than_fit_into_one_call(self, opening: Opener, mapping: Mapper) -> None:
        memory = mapping(6000)
        memory.fill(1, 0, 6000)
        uffd = self.tracked(opening, memory)
        for number in range(0, 6000, 2):
            libc.memset(memory.at(number), 5, 1)
        regions = uffd.scan(memory.address, memory.length, protect=True)
        assert [(region.start, region.end) for region in regions] == [
            (memory.at(number), memory.at(number + 1)) for number in range(0, 6000, 2)
        ]
        assert uffd.scan(memory.address, memory.length, protect=True) == []

    def test_categories(self, opening: Opener, mapping: Mapper) -> None:
        memory = mapping(4)
        memory.fill(1, 1)
        uffd = opening()
        present, swapped = PageCategory.PRESENT, PageCategory.SWAPPED
        here = PageRegion(memory.at(1), memory.at(2), present)
        scan = uffd.scan
        assert scan(memory.address, memory.length, all_of=present) == [here]
        nothing = PageCategory(0)
        found = scan(memory.address, memory.length, all_of=nothing, any_of=present | swapped)
        assert found == [here]
        absent = scan(
            memory.address,
            memory.length,
            all_of=nothing,
            none_of=present | swapped,
            report=present,
        )
        assert [(region.start, region.end) for region in absent] == [
            (memory.at(0), memory.at(1)),
            (memory.at(2), memory.at(4)),
        ]

    def test_protecting_needs_the_asynchronous_mode(
        self, uffd: Userfaultfd, mapping: Mapper
    ) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.WP)
        with pytest.raises(KernelError, match="WP_ASYNC") as caught:
            uffd.scan(memory.address, memory.length, protect=True)
        assert caught.value.errno == errno.EPERM

    def test_the_pagemap_of_another_process(self, uffd: Userfaultfd, mapping: Mapper) -> None:
        memory = mapping(2)
        memory.fill(1)
        with open("/proc/self/pagemap", "rb") as file:
            found = uffd.scan(
                memory.address,
                memory.length,
                all_of=PageCategory.PRESENT,
                pagemap=file.fileno(),
            )
        assert found == [PageRegion(memory.at(0), memory.at(1), PageCategory.PRESENT)]


@pytest.mark.hugetlb
class TestHugePages:
    def test_copy_in_whole_huge_pages(
        self, uffd: Userfaultfd, mapping: Mapper, huge_pages: int
    ) -> None:
        memory = mapping(2, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, size=HUGE)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.at(1) + 5 * PAGE_SIZE)
        assert fault(uffd).address == memory.at(1)
        assert code_of(lambda: uffd.copy(memory.at(1), page(1))) == (errno.EINVAL, 0)
        assert code_of(lambda: uffd.zeropage(memory.at(1), HUGE)) == (errno.EINVAL, 0)
        assert uffd.copy(memory.at(1), bytes([3]) * HUGE) == HUGE
        assert reader.result() == b"\3"
        uffd.close()
        memory.unmap()


PRELUDE = """
import ctypes, errno, mmap, os, threading, time
from aiouffd.uffd import *
from aiouffd.abi import *
import encodings.idna
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
libc = ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)  # dumpable, as it would be after execve
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
class TestUnprivileged:
    def run(self, program: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(program)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.splitlines()

    @pytest.fixture(autouse=True)
    def restricted(self) -> None:
        if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
            pytest.skip("everybody may do everything here")

    def test_the_error_says_what_was_tried_and_what_helps(self) -> None:
        text, *attempts = self.run("""
            try:
                Userfaultfd()
            except PermissionError as error:
                print(error)
                for attempt in error.attempts:
                    print(attempt.path, errno.errorcode[attempt.errno])
        """)
        assert "vm.unprivileged_userfaultfd=1" in text
        assert "user_mode_only=True" in text
        assert attempts == ["userfaultfd(2) EPERM", "/dev/userfaultfd EACCES"]

    def test_user_mode_faults_are_served(self) -> None:
        assert self.run("""
            memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = address_of(memory)
            with Userfaultfd(user_mode_only=None) as uffd:
                print(uffd.user_mode_only)
                uffd.register(start, 4096, Mode.MISSING)
                target = ctypes.create_string_buffer(1)
                call = lambda: libc.memcpy(target, ctypes.c_void_p(start), 1)
                thread = threading.Thread(target=call, daemon=True)
                thread.start()
                while not uffd.read():
                    time.sleep(0.001)
                uffd.copy(start, b"Z" * 4096)
                thread.join(10)
                print(target.raw)
        """) == ["True", "b'Z'"]

    def test_fork_events_need_a_privilege(self) -> None:
        (text,) = self.run("""
            try:
                Userfaultfd(Feature.EVENT_FORK, user_mode_only=True)
            except CreationPermissionError as error:
                print(error)
        """)
        assert "CAP_SYS_PTRACE" in text

    @needs(Feature.WP_ASYNC)
    def test_dirty_tracking_works(self) -> None:
        assert self.run("""
            memory = mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            start = address_of(memory)
            with Userfaultfd(Feature.WP_ASYNC, user_mode_only=True) as uffd:
                uffd.register(start, 8192, Mode.WP)
                uffd.scan(start, 8192, protect=True)
                memory[4096] = 1
                (region,) = uffd.scan(start, 8192, protect=True)
                print(region.start - start, region.end - start)
        """) == ["4096 8192"]

    def test_an_open_descriptor_of_the_device_is_enough(self) -> None:
        if not os.path.exists("/dev/userfaultfd"):
            pytest.skip("no device")
        device = os.open("/dev/userfaultfd", os.O_RDONLY)
        try:
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    PRELUDE + f"with Userfaultfd(path={device}) as u: print(u.user_mode_only)",
                ],
                pass_fds=[device],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        finally:
            os.close(device)
        assert done.stdout == "False\n", done.stderr


class TestOnALoop:
    """The descriptor as the event loop sees it. Each test runs on asyncio and on uvloop."""

    @pytest.fixture
    def armed(self, uffd: Userfaultfd, mapping: Mapper) -> tuple[Userfaultfd, Memory]:
        memory = mapping(256)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        return uffd, memory

    async def test_receive(self, armed: tuple[Userfaultfd, Memory]) -> None:
        uffd, memory = armed
        reader = reading(memory.at(3))
        message = await asyncio.wait_for(uffd.receive(), PATIENCE)
        assert isinstance(message, PageFault)
        assert message.address == memory.at(3)
        uffd.copy(memory.at(3), page(1))
        assert reader.result() == b"\1"

    async def test_iteration_serves_many_threads(self, armed: tuple[Userfaultfd, Memory]) -> None:
        uffd, memory = armed

        async def serve() -> int:
            seen = set()
            async for message in uffd:
                assert isinstance(message, PageFault)
                number = (message.address - memory.address) // PAGE_SIZE
                if number in seen:
                    continue
                seen.add(number)
                await asyncio.sleep(0)
                uffd.copy(message.address, page(number % 256))
            return len(seen)

        server = asyncio.create_task(serve())

        def scan(first: int) -> list[bytes]:
            buffer = ctypes.create_string_buffer(1)
            found = []
            for number in range(256):
                at = memory.at((first + number) % 256)
                libc.memcpy(ctypes.addressof(buffer), at, 1)
                found.append(buffer.raw)
            return found

        scanners = [Worker(lambda first=first: scan(first)) for first in (0, 64, 128, 192)]
        results = [await asyncio.to_thread(scanner.result) for scanner in scanners]
        uffd.close()
        assert await asyncio.wait_for(server, PATIENCE) == 256
        for first, result in zip((0, 64, 128, 192), results, strict=True):
            assert result == [bytes([(first + n) % 256]) for n in range(256)]

    async def test_several_messages_of_one_wake_up(self, armed: tuple[Userfaultfd, Memory]) -> None:
        uffd, memory = armed
        readers = [reading(memory.at(number)) for number in range(8)]
        end = time.monotonic() + PATIENCE
        while pending(uffd) < 8:
            assert time.monotonic() < end
            await asyncio.sleep(0.001)
        got = [await asyncio.wait_for(uffd.receive(), PATIENCE) for _ in range(8)]
        addresses = sorted(message.address for message in got if isinstance(message, PageFault))
        assert addresses == [memory.at(number) for number in range(8)]
        uffd.copy(memory.address, page(1, 8))
        for reader in readers:
            reader.result()

    async def test_cancelled_receivers_lose_nothing(
        self, armed: tuple[Userfaultfd, Memory]
    ) -> None:
        uffd, memory = armed
        for number in range(20):
            task = asyncio.create_task(uffd.receive())
            await asyncio.sleep(0)
            reader = reading(memory.at(number))
            while not pending(uffd) and not uffd._messages._pending:  # noqa: ASYNC110
                await asyncio.sleep(0)
            # The message is on its way in one stage or another; the task goes at each.
            for _ in range(number % 4):
                await asyncio.sleep(0)
            task.cancel()
            try:
                message = await task
            except asyncio.CancelledError:
                message = await asyncio.wait_for(uffd.receive(), PATIENCE)
            assert isinstance(message, PageFault)
            assert message.address == memory.at(number)
            uffd.copy(message.address, page(1))
            reader.result()

    async def test_the_loop_stops_watching_when_nobody_waits(
        self, armed: tuple[Userfaultfd, Memory]
    ) -> None:
        uffd, memory = armed
        task = asyncio.create_task(uffd.receive())
        await asyncio.sleep(0)
        assert uffd._messages._loop is not None
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert uffd._messages._loop is None
        # And after a message, at the first one that nobody waits for.
        first = reading(memory.at(0))
        await asyncio.wait_for(uffd.receive(), PATIENCE)
        second = reading(memory.at(1))
        end = time.monotonic() + PATIENCE
        while uffd._messages._loop is not None:
            assert time.monotonic() < end
            await asyncio.sleep(0.001)
        # The first one may fault once more, after a signal that asks who holds the GIL.
        found = {message.address for message in messages(uffd) if isinstance(message, PageFault)}
        assert memory.at(1) in found <= {memory.at(0), memory.at(1)}
        uffd.copy(memory.address, page(1, 2))
        first.result()
        second.result()

    async def test_readable_without_a_message(self, armed: tuple[Userfaultfd, Memory]) -> None:
        """What was readable may be gone when the loop comes to read."""
        uffd, memory = armed
        task = asyncio.create_task(uffd.receive())
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        uffd._messages._read_for_waiters(loop)
        await asyncio.sleep(0)
        assert not task.done()
        reader = reading(memory.at(0))
        await asyncio.wait_for(task, PATIENCE)
        uffd.copy(memory.address, page(1))
        reader.result()

    async def test_each_message_goes_to_one_of_several_tasks(
        self, armed: tuple[Userfaultfd, Memory]
    ) -> None:
        uffd, memory = armed
        tasks = [asyncio.create_task(uffd.receive()) for _ in range(3)]
        await asyncio.sleep(0)
        readers = [reading(memory.at(number)) for number in range(3)]
        got = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
        addresses = sorted(message.address for message in got if isinstance(message, PageFault))
        assert addresses == [memory.at(number) for number in range(3)]
        uffd.copy(memory.address, page(1, 3))
        for reader in readers:
            reader.result()

    async def test_close_ends_a_receive(self, uffd: Userfaultfd) -> None:
        task = asyncio.create_task(uffd.receive())
        await asyncio.sleep(0)
        fd = uffd.fileno()
        uffd.close()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(task, PATIENCE)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)
        with pytest.raises(ClosedError):
            await uffd.receive()
        assert [message async for message in uffd] == []

    async def test_close_from_another_thread_ends_an_iteration(self, uffd: Userfaultfd) -> None:
        async def serve() -> list[Message]:
            return [message async for message in uffd]

        task = asyncio.create_task(serve())
        await asyncio.sleep(0)
        fd = uffd.fileno()
        Worker(uffd.close).result()
        assert await asyncio.wait_for(task, PATIENCE) == []
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    async def test_errors_of_reading_reach_the_receiver(
        self, uffd: Userfaultfd, monkeypatch: pytest.MonkeyPatch, mapping: Mapper
    ) -> None:
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        reader = reading(memory.address)

        def fail(limit: int) -> list[Message]:
            raise KernelError("no descriptor", errno=errno.EMFILE)

        with monkeypatch.context() as patch:
            patch.setattr(uffd._messages, "_read_kernel", fail)
            with pytest.raises(KernelError):
                await asyncio.wait_for(uffd.receive(), PATIENCE)
        await asyncio.wait_for(uffd.receive(), PATIENCE)
        uffd.zeropage(memory.address, PAGE_SIZE)
        reader.result()

    async def test_loops_take_turns(self, armed: tuple[Userfaultfd, Memory]) -> None:
        uffd, memory = armed

        def elsewhere(number: int) -> None:
            async def main() -> None:
                reader = reading(memory.at(number))
                message = await asyncio.wait_for(uffd.receive(), PATIENCE)
                assert isinstance(message, PageFault)
                uffd.copy(message.address, page(1))
                await asyncio.to_thread(reader.result)

            asyncio.run(main())

        for number in range(6):
            if number % 2:
                await asyncio.to_thread(elsewhere, number)
            else:
                reader = reading(memory.at(number))
                message = await asyncio.wait_for(uffd.receive(), PATIENCE)
                assert isinstance(message, PageFault)
                uffd.copy(message.address, page(1))
                reader.result()

    async def test_two_loops_at_once_are_refused(self, uffd: Userfaultfd) -> None:
        task = asyncio.create_task(uffd.receive())
        await asyncio.sleep(0)

        def elsewhere() -> None:
            with pytest.raises(UsageError, match="another event loop"):
                asyncio.run(uffd.receive())

        await asyncio.to_thread(elsewhere)
        uffd.close()
        with pytest.raises(ClosedError):
            await task

    def test_two_loops_that_begin_together(
        self, uffd: Userfaultfd, mapping: Mapper, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One of them watches, and the other one is refused, also where both find nobody."""
        memory = mapping(1)
        uffd.register(memory.address, memory.length, Mode.MISSING)
        real, begun, both = Messages._start_engine, threading.Event(), threading.Event()

        def start_engine(messages: Messages) -> None:
            if begun.is_set():
                both.set()  # which cannot be, so that the first one waits for nothing
            begun.set()
            both.wait(0.3)
            real(messages)

        monkeypatch.setattr(Messages, "_start_engine", start_engine)
        outcomes: list[Any] = []
        refused = threading.Event()

        def receive() -> None:
            async def main() -> Message:
                return await asyncio.wait_for(uffd.receive(), PATIENCE)

            try:
                outcomes.append(asyncio.run(main()))
            except Exception as error:
                outcomes.append(error)
                refused.set()

        threads = [threading.Thread(target=receive, daemon=True) for _ in range(2)]
        threads[0].start()
        assert begun.wait(PATIENCE)
        threads[1].start()
        assert refused.wait(PATIENCE)
        assert [type(outcome) for outcome in outcomes] == [UsageError]
        reader = reading(memory.at(0))
        for thread in threads:
            thread.join(PATIENCE)
        message = outcomes[1]
        assert isinstance(message, PageFault)
        uffd.copy(message.address, page(1))
        assert reader.result() == page(1)[:1]

    async def test_forks_that_nobody_took_are_closed(self, uffd: Userfaultfd) -> None:
        out, into = os.pipe()
        uffd._messages._pending.append(Fork(into))
        uffd.close()
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(into)
        os.close(out)


@pytest.mark.parametrize("name", ["Descriptor", "Messages"])
def test_out_of_memory_on_the_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be finished leaves no descriptor behind, and an adopted one to its owner."""
    before = os.listdir("/proc/self/fd")
    with Userfaultfd() as other:
        copy = os.dup(other.fileno())
        real = getattr(uffd_module, name)

        def fail(*arguments: Any, **named: Any) -> Any:
            if name == "Descriptor" and len(arguments) == 1:
                return real(*arguments, **named)
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(uffd_module, name, fail)
            with pytest.raises(MemoryError):
                Userfaultfd()
            with pytest.raises(MemoryError):
                Userfaultfd.from_fd(copy)
        os.close(copy)
    assert os.listdir("/proc/self/fd") == before


def test_close_after_the_loop_is_gone(uffd: Userfaultfd) -> None:
    fd = uffd.fileno()

    async def main() -> None:
        task = asyncio.create_task(uffd.receive())
        await asyncio.sleep(0)
        uffd._messages._waiters.clear()  # as if it had been abandoned, not cancelled
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert uffd._messages._loop is not None
    uffd.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_interpreter_exit_is_silent_with_a_thread_that_waits() -> None:
    program = textwrap.dedent("""
        import ctypes, mmap, threading, time
        from aiouffd.uffd import *
        from aiouffd.abi import Mode
        memory = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = address_of(memory)
        uffd = Userfaultfd(user_mode_only=None)
        uffd.register(start, 4096, Mode.MISSING)
        libc = ctypes.CDLL(None)
        target = ctypes.create_string_buffer(1)
        call = lambda: libc.memcpy(target, ctypes.c_void_p(start), 1)
        threading.Thread(target=call, daemon=True).start()
        while not uffd.read():
            time.sleep(0.001)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def pending(uffd: Userfaultfd) -> int:
    """Messages that nobody has read, as the kernel counts them."""
    text = Path(f"/proc/self/fdinfo/{uffd.fileno()}").read_text()
    return int(text.split("pending:")[1].split()[0])
