"""Protection from reads and writes: for real where the kernel has it (7.3), refusals elsewhere."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiouffd import serve
from aiouffd.errors import KernelError, UnsupportedError, UsageError
from aiouffd.kernel.abi import FaultFlag, Feature, Ioctl, Mode, PageCategory, PageFault
from aiouffd.kernel.lib import PAGE_SIZE
from aiouffd.kernel.uffd import CreationError, Userfaultfd, address_of, kernel_features
from tests.guests import PlainDialect, guest
from tests.support import content, wait_until, word

try:
    AVAILABLE = kernel_features()
except CreationError as error:
    pytest.skip(f"no userfaultfd here: {error}", allow_module_level=True)

PAGES = 8
libc = ctypes.CDLL(None)  # each call releases the GIL
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

has_rwp = pytest.mark.skipif(
    not AVAILABLE & Feature.RWP, reason="protection from reads needs Linux 7.3"
)
lacks_rwp = pytest.mark.skipif(bool(AVAILABLE & Feature.RWP), reason="this kernel has it")


class Area:
    """Filled memory with its address."""

    def __init__(self, *, shared: bool = False) -> None:
        kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        self.memory = mmap.mmap(-1, PAGES * PAGE_SIZE, flags=kind | mmap.MAP_ANONYMOUS)
        for page in range(PAGES):
            self.memory[page * PAGE_SIZE] = 65 + page
        self.start = address_of(self.memory)
        self.length = PAGES * PAGE_SIZE

    def page(self, index: int) -> int:
        return self.start + index * PAGE_SIZE


@pytest.fixture
def area() -> Area:
    return Area()


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with Userfaultfd(user_mode_only=None) as plain:
        yield plain


# ---- without it ----


def names_the_version(error: UnsupportedError) -> bool:
    return "Linux 7.3" in str(error) and os.uname().release in str(error)


@lacks_rwp
@pytest.mark.parametrize("feature", [Feature.RWP, Feature.RWP_ASYNC])
def test_an_older_kernel_has_no_such_feature(feature: Feature) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Userfaultfd(feature, user_mode_only=None)
    assert names_the_version(caught.value)
    assert caught.value.errno == errno.EINVAL


@lacks_rwp
def test_an_older_kernel_has_no_such_mode(uffd: Userfaultfd, area: Area) -> None:
    with pytest.raises(UnsupportedError) as caught:
        uffd.register(area.start, area.length, Mode.MISSING | Mode.RWP)
    assert names_the_version(caught.value)
    assert not uffd.register(area.start, area.length, Mode.MISSING) & Ioctl.RWPROTECT


@lacks_rwp
def test_an_older_kernel_has_no_such_calls(uffd: Userfaultfd, area: Area) -> None:
    uffd.register(area.start, area.length, Mode.MISSING)
    for protect in (True, False):
        with pytest.raises(UnsupportedError) as caught:
            uffd.rwprotect(area.start, area.length, protect=protect)
        assert names_the_version(caught.value)
    with pytest.raises(UnsupportedError) as caught:
        uffd.set_mode(enable=Feature.RWP_ASYNC)
    assert names_the_version(caught.value)


@lacks_rwp
def test_an_older_kernel_does_not_know_what_was_accessed(uffd: Userfaultfd, area: Area) -> None:
    with pytest.raises((UnsupportedError, KernelError)) as caught:
        uffd.scan(area.start, area.length, all_of=PageCategory.ACCESSED)
    assert isinstance(caught.value, UnsupportedError)
    assert "Linux 7.3" in str(caught.value) or "Linux 6.7" in str(caught.value)


# ---- arguments, on every kernel ----


def test_set_mode_refuses_both_ways(uffd: Userfaultfd) -> None:
    with pytest.raises(UsageError, match="enabled and disabled"):
        uffd.set_mode(enable=Feature.RWP_ASYNC, disable=Feature.RWP_ASYNC)


def test_rwprotect_wants_whole_pages(uffd: Userfaultfd, area: Area) -> None:
    with pytest.raises(UsageError):
        uffd.rwprotect(area.start, 7, protect=True)


# ---- with it ----


@has_rwp
def test_the_mode_needs_the_feature_at_creation(uffd: Userfaultfd, area: Area) -> None:
    with pytest.raises(UsageError, match=r"Feature\.RWP"):
        uffd.register(area.start, area.length, Mode.RWP)


@has_rwp
def test_async_brings_the_feature() -> None:
    with Userfaultfd(Feature.RWP_ASYNC, user_mode_only=None) as uffd:
        assert uffd.features & Feature.RWP
        assert uffd.features & Feature.RWP_ASYNC
        with Userfaultfd.from_fd(os.dup(uffd.fileno())) as other:
            assert other.features & Feature.RWP_ASYNC


@has_rwp
def test_it_does_not_go_with_write_protection(area: Area) -> None:
    with (
        Userfaultfd(Feature.RWP, user_mode_only=None) as uffd,
        pytest.raises(KernelError, match="RWP does not go with WP") as caught,
    ):
        uffd.register(area.start, area.length, Mode.RWP | Mode.WP)
    assert caught.value.errno == errno.EINVAL


@has_rwp
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("write", [False, True])
def test_an_access_is_a_message_and_waits(shared: bool, write: bool) -> None:
    area = Area(shared=shared)
    with Userfaultfd(Feature.RWP, user_mode_only=None) as uffd:
        assert uffd.register(area.start, area.length, Mode.RWP) & Ioctl.RWPROTECT
        uffd.rwprotect(area.start, area.length, protect=True)
        got = ctypes.create_string_buffer(1)
        if write:
            thread = threading.Thread(target=libc.memset, args=(area.page(2), 7, 1), daemon=True)
        else:
            thread = threading.Thread(target=libc.memcpy, args=(got, area.page(2), 1), daemon=True)
        thread.start()
        messages: list[object] = []
        wait_until(lambda: bool(messages.extend(uffd.read()) or messages), "the message")
        (fault,) = messages
        assert isinstance(fault, PageFault)
        assert fault.address == area.page(2)
        assert fault.flags & FaultFlag.RWP
        assert (fault.is_rwp, fault.is_write) == (True, write)
        assert [fault.is_missing, fault.is_wp, fault.is_minor] == [False] * 3
        assert thread.is_alive()
        uffd.rwprotect(area.page(2), PAGE_SIZE, protect=False)
        thread.join(10)
        assert not thread.is_alive()
        uffd.rwprotect(area.start, area.length, protect=False)
        assert area.memory[2 * PAGE_SIZE] == (7 if write else 67)
        assert write or got.raw == b"C"


@has_rwp
@pytest.mark.parametrize("shared", [False, True])
def test_accesses_can_be_found_without_messages(shared: bool) -> None:
    area = Area(shared=shared)
    with Userfaultfd(Feature.RWP_ASYNC, user_mode_only=None) as uffd:
        uffd.register(area.start, area.length, Mode.RWP)
        uffd.rwprotect(area.start, area.length, protect=True)
        assert area.memory[3 * PAGE_SIZE] == 68
        area.memory[5 * PAGE_SIZE] = 1
        hot = uffd.scan(area.start, area.length, all_of=PageCategory.ACCESSED)
        assert [(r.start, r.end) for r in hot] == [
            (area.page(3), area.page(4)),
            (area.page(5), area.page(6)),
        ]
        cold = uffd.scan(
            area.start,
            area.length,
            all_of=PageCategory.PRESENT,
            none_of=PageCategory.ACCESSED,
        )
        assert sum(r.end - r.start for r in cold) == (PAGES - 2) * PAGE_SIZE
        assert uffd.read() == []


@pytest.mark.parametrize("mode", ["WP", pytest.param("RWP", marks=has_rwp)])
async def test_a_client_that_protects_its_pages_does_not_wait(tmp_path: Path, mode: str) -> None:
    """The server sees the fault, too, and knows nothing better than to let the client go on."""
    data = content(16 * PAGE_SIZE)
    features = ["RWP"] if mode == "RWP" else []
    async with (
        serve.listen(tmp_path / "s", source=data, dialect=PlainDialect()) as server,
        guest(tmp_path / "s", 16, modes=[mode], features=features) as one,
    ):
        assert await one.ask("word", 3) == word(3 * PAGE_SIZE)
        await one.ask("protect", 0, 16)
        before = server.stats.faults
        await one.ask("write_word", 3, 77)
        assert server.stats.faults > before
        await one.ask("protect", 0, 16)
        assert await one.ask("word", 3) == 77
        assert await one.ask("word", 12) == word(12 * PAGE_SIZE)


@has_rwp
def test_it_can_be_switched_while_in_use(area: Area) -> None:
    with Userfaultfd(Feature.RWP_ASYNC, user_mode_only=None) as uffd:
        uffd.register(area.start, area.length, Mode.RWP)
        uffd.set_mode(disable=Feature.RWP_ASYNC)
        assert not uffd.features & Feature.RWP_ASYNC
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        assert uffd.features & Feature.RWP_ASYNC
        with pytest.raises(KernelError) as caught:
            uffd.set_mode(enable=Feature.SIGBUS)
        assert caught.value.errno == errno.EINVAL
