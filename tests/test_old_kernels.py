"""What is said where the kernel lacks something: which kernel has it, and never that the call was
wrong.

On old kernels these tests see the kernel's own refusals; where it has everything, they act one.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest

import aiouffd
from aiouffd.cli import examine as doctor
from aiouffd.errors import KernelError, UnsupportedError, UsageError
from aiouffd.kernel import opening
from aiouffd.kernel.abi import SINCE, Feature, Mode
from aiouffd.kernel.errnos import lacking_error
from aiouffd.kernel.lib import PAGE_SIZE, ffi, lib
from aiouffd.kernel.uffd import CreationError, Userfaultfd, address_of, kernel_features
from aiouffd.regions import region

try:
    AVAILABLE = kernel_features()
except CreationError as error:
    pytest.skip(f"no userfaultfd here: {error}", allow_module_level=True)


class Older:
    """Acts the refusals of a kernel without some features, if this one has them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lacking: Feature) -> None:
        self.lacking = lacking
        left = Feature(int(AVAILABLE) & ~int(lacking))
        if left == AVAILABLE:
            return
        monkeypatch.setattr(Userfaultfd, "available", property(lambda _: left))
        monkeypatch.setattr(region, "lib", _Refusing())
        monkeypatch.setattr("aiouffd.kernel.uffd.lib", _Refusing())


class _Refusing:
    """The native module, of which what the tests call fails as an unknown ioctl does."""

    def __getattr__(self, name: str) -> Any:
        return getattr(lib, name)

    def au_region_create(self, *arguments: Any) -> Any:
        arguments[-1][0] = errno.EINVAL
        return ffi.NULL

    def _refuse(self, *arguments: Any) -> int:
        return -errno.EINVAL

    au_abi_register = au_abi_poison = au_abi_move = au_abi_continue = _refuse
    au_abi_writeprotect = _refuse


def check(error: UnsupportedError, feature: Feature) -> None:
    assert f"{feature.name} (Linux {SINCE[feature]})" in str(error)
    assert os.uname().release in str(error)
    assert error.errno == errno.EINVAL
    assert error.hint


@pytest.fixture
def memory() -> mmap.mmap:
    return mmap.mmap(-1, 4 * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with Userfaultfd(user_mode_only=None) as plain:
        yield plain


@pytest.mark.parametrize(
    ("kind", "feature"),
    [("memfd", Feature.MINOR_SHMEM), ("hugetlb-memfd", Feature.MINOR_HUGETLBFS)],
)
async def test_shared_memory_needs_minor_faults(
    monkeypatch: pytest.MonkeyPatch, kind: Any, feature: Feature
) -> None:
    async with aiouffd.Pager() as pager:
        Older(monkeypatch, feature)
        with pytest.raises(UnsupportedError) as caught:
            pager.map(4 << 20, kind=kind)
        check(caught.value, feature)
        assert f"{kind} memory" in str(caught.value)
        assert "kind='anonymous'" in str(caught.value)


async def test_a_wrong_block_size_is_still_one() -> None:
    async with aiouffd.Pager() as pager:
        with pytest.raises(UsageError, match="power of two"):
            pager.map(4 << 20, block_size=PAGE_SIZE + 1)


@pytest.mark.parametrize(
    ("mode", "feature"),
    [
        (Mode.MINOR, Feature.MINOR_SHMEM),
        (Mode.WP, Feature.WP_HUGETLBFS_SHMEM),
        (Mode.WP | Mode.MISSING, Feature.PAGEFAULT_FLAG_WP),
    ],
)
def test_modes_of_registering(
    monkeypatch: pytest.MonkeyPatch, uffd: Userfaultfd, mode: Mode, feature: Feature
) -> None:
    shared = mmap.mmap(-1, 4 * PAGE_SIZE)
    Older(monkeypatch, feature)
    with pytest.raises(UnsupportedError) as caught:
        uffd.register(address_of(shared), len(shared), mode)
    check(caught.value, feature)


@pytest.mark.parametrize(
    ("feature", "call"),
    [
        (Feature.POISON, lambda uffd, at: uffd.poison(at, PAGE_SIZE)),
        (Feature.MOVE, lambda uffd, at: uffd.move(at, at + PAGE_SIZE, PAGE_SIZE)),
        (Feature.MINOR_SHMEM, lambda uffd, at: uffd.continue_(at, PAGE_SIZE)),
        (
            Feature.PAGEFAULT_FLAG_WP,
            lambda uffd, at: uffd.writeprotect(at, PAGE_SIZE, protect=True),
        ),
    ],
)
def test_calls(
    monkeypatch: pytest.MonkeyPatch,
    uffd: Userfaultfd,
    memory: mmap.mmap,
    feature: Feature,
    call: Any,
) -> None:
    uffd.register(address_of(memory), len(memory), Mode.MISSING)
    Older(monkeypatch, feature)
    with pytest.raises(UnsupportedError) as caught:
        call(uffd, address_of(memory))
    check(caught.value, feature)


def test_what_no_version_is_known_for_is_named_by_its_number() -> None:
    error = lacking_error("handshake", Feature(1 << 40 | 1 << 14), Feature(0))
    assert "POISON (Linux 6.6), 0x10000000000" in str(error)
    assert lacking_error("poison", Feature.POISON, Feature.POISON | Feature(1 << 40)) is None


def test_before_5_11_user_mode_only_says_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = {"syscall": -errno.EINVAL, "device": -errno.ENOENT}
    monkeypatch.setattr(opening, "_try_open", lambda path, flags: refusals[path])
    with pytest.raises(UnsupportedError) as caught:
        Userfaultfd(user_mode_only=True)
    assert "user mode only needs Linux 5.11" in str(caught.value)
    assert "vm.unprivileged_userfaultfd=1" in str(caught.value.hint)
    assert os.uname().release in str(caught.value.hint)


@pytest.mark.parametrize("feature", list(SINCE), ids=lambda feature: str(feature.name))
def test_every_feature_can_be_asked_for_or_is_refused_by_name(feature: Feature) -> None:
    try:
        Userfaultfd(feature, user_mode_only=None).close()
    except PermissionError:
        assert feature == Feature.EVENT_FORK
    except UnsupportedError as error:
        assert feature & ~int(AVAILABLE)
        check(error, feature)
    else:
        assert feature in AVAILABLE


def test_every_feature_has_a_version() -> None:
    assert set(SINCE) == set(Feature)


def test_doctor_names_the_kernel_for_what_is_missing() -> None:
    for check_ in doctor.examine(trial=False).checks:
        if check_.section == "Kernel features" and check_.detail.startswith("missing"):
            feature = Feature.__members__.get(check_.name)
            since = SINCE[feature] if feature is not None else "6.7"
            assert since in f"{check_.detail} {check_.remedy}"
            assert check_.status != "problem"


# ---- what docs/kernels.md says of the kernel itself ----


def kernel_version() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int(minor.split("-")[0])


def test_others_may_unregister_before_6_17(uffd: Userfaultfd, memory: mmap.mmap) -> None:
    uffd.register(address_of(memory), len(memory), Mode.MISSING)
    with Userfaultfd(user_mode_only=None) as other:
        if kernel_version() >= (6, 17):
            with pytest.raises(KernelError) as caught:
                other.unregister(address_of(memory), len(memory))
            assert caught.value.errno == errno.EINVAL
            return
        other.unregister(address_of(memory), len(memory))
    assert memory[:] == bytes(len(memory))  # and no message
    assert uffd.read() == []


@pytest.mark.skipif(not AVAILABLE & Feature.POISON, reason="poison needs Linux 6.6")
def test_the_page_map_takes_poison_for_swap(uffd: Userfaultfd, memory: mmap.mmap) -> None:
    start = address_of(memory)
    uffd.register(start, len(memory), Mode.MISSING)
    uffd.poison(start, PAGE_SIZE)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE_SIZE * 8)
        poisoned, missing = struct.unpack("=QQ", pagemap.read(16))
    assert (poisoned >> 63, poisoned >> 62 & 1) == (0, 1)
    assert missing >> 62 == 0
