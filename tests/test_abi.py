"""The constants and layouts: ours against the compiled ones, and those against the system's."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tempfile
from enum import Enum, IntFlag
from pathlib import Path

import pytest

from aiouffd.kernel import abi, messages
from aiouffd.kernel.lib import PAGE_SIZE, ffi, lib

NATIVE = Path(__file__).resolve().parent.parent / "native"


@pytest.mark.parametrize(
    ("enumeration", "prefix", "as_bit"),
    [
        (abi.Feature, "AU_FEATURE_", False),
        (abi.Mode, "AU_REGISTER_MODE_", False),
        (abi.Ioctl, "AU_UFFDIO_NR_", True),
        (abi.Event, "AU_EVENT_", False),
        (abi.FaultFlag, "AU_PAGEFAULT_FLAG_", False),
        (abi.PageCategory, "AU_PAGE_IS_", False),
    ],
)
def test_each_enumeration_is_complete_and_equal_to_the_compiled_one(
    enumeration: type[Enum], prefix: str, as_bit: bool
) -> None:
    compiled = {
        name.removeprefix(prefix): getattr(lib, name)
        for name in dir(lib)
        if name.startswith(prefix)
    }
    if as_bit:
        compiled = {name: 1 << value for name, value in compiled.items()}
    ours = {name: int(member.value) for name, member in enumeration.__members__.items()}
    assert compiled == ours


def test_structures_have_the_kernels_sizes() -> None:
    assert ffi.sizeof("struct au_uffd_msg") == 32
    assert ffi.offsetof("struct au_uffd_msg", "arg") == 8
    assert ffi.sizeof("struct au_page_region") == 24
    assert ffi.sizeof("struct au_pm_scan_arg") == 96


def compile_check(defines: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "check.c")
        program.write_text(f'{defines}\n#include "uapi_check.c"\n')
        return subprocess.run(
            [compiler, "-std=gnu11", "-fsyntax-only", f"-I{NATIVE}", str(program)],
            capture_output=True,
            text=True,
            check=False,
        )


def test_the_system_headers_agree() -> None:
    result = compile_check("")
    assert result.returncode == 0, result.stderr


def test_the_comparison_can_fail() -> None:
    result = compile_check(
        '#include "uapi.h"\n#undef AU_FEATURE_THREAD_ID\n#define AU_FEATURE_THREAD_ID 4'
    )
    assert result.returncode != 0
    assert "AU_FEATURE_THREAD_ID" in result.stderr


@pytest.mark.parametrize(
    ("request_name", "value"),
    [
        ("AU_UFFDIO_API", 0xC018AA3F),
        ("AU_UFFDIO_REGISTER", 0xC020AA00),
        ("AU_UFFDIO_UNREGISTER", 0x8010AA01),
        ("AU_UFFDIO_WAKE", 0x8010AA02),
        ("AU_UFFDIO_COPY", 0xC028AA03),
        ("AU_UFFDIO_ZEROPAGE", 0xC020AA04),
        ("AU_UFFDIO_MOVE", 0xC028AA05),
        ("AU_UFFDIO_WRITEPROTECT", 0xC018AA06),
        ("AU_UFFDIO_CONTINUE", 0xC020AA07),
        ("AU_UFFDIO_POISON", 0xC020AA08),
        ("AU_UFFDIO_RWPROTECT", 0xC018AA09),
        ("AU_UFFDIO_SET_MODE", 0x4010AA0A),
        ("AU_USERFAULTFD_IOC_NEW", 0xAA00),
        ("AU_PAGEMAP_SCAN", 0xC0606610),
    ],
)
def test_request_numbers(request_name: str, value: int) -> None:
    """These are the numbers on x86, Arm and RISC-V, written down from a running kernel."""
    result = compile_check(
        f'#include "uapi.h"\n#if {int(is_classic_ioc())}\n'
        f'_Static_assert({request_name} == {value:#x}u, "number");\n#endif'
    )
    assert result.returncode == 0, result.stderr


def is_classic_ioc() -> bool:
    import platform

    return not platform.machine().startswith(("mips", "ppc", "sparc", "alpha"))


@pytest.mark.parametrize(
    ("flags", "kinds"),
    [
        (0, "missing"),
        (1, "missing write"),
        (3, "wp write"),
        (4, "minor"),
        (5, "minor write"),
        (8, "rwp"),
        (9, "rwp write"),
        (1 << 40, ""),  # a reason of a newer kernel
        (1 << 40 | 1, "write"),
    ],
)
def test_page_fault_tells_what_it_is(flags: int, kinds: str) -> None:
    fault = abi.PageFault(abi.FaultFlag(flags), 0x1000, 7)
    names = ("minor", "missing", "rwp", "wp", "write")
    assert [name for name in names if getattr(fault, f"is_{name}")] == kinds.split()
    assert int(fault.flags) == flags


def test_messages_are_frozen_and_slotted() -> None:
    for kind in (abi.PageFault, abi.Fork, abi.Remap, abi.Remove, abi.Unmap, abi.PageRegion):
        assert "__slots__" in vars(kind)
        assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    message = abi.Fork(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        message.fd = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    "enumeration", [abi.Feature, abi.Ioctl, abi.Mode, abi.FaultFlag, abi.PageCategory]
)
def test_bits_of_newer_kernels_are_kept(enumeration: type[IntFlag]) -> None:
    value = enumeration(1 << 41 | 1)
    assert int(value) == 1 << 41 | 1
    assert hex(1 << 41) in repr(enumeration(1 << 41)) or str(1 << 41) in repr(value)
    assert value & 3 == 1


def test_messages_of_newer_kernels_are_kept_or_told(caplog: pytest.LogCaptureFixture) -> None:
    raw = ffi.new("struct au_uffd_msg *")
    raw.event = abi.Event.PAGEFAULT
    raw.arg.pagefault.flags, raw.arg.pagefault.address = 1 << 40 | 2, 0x7000
    fault = messages._decode(raw)
    assert isinstance(fault, abi.PageFault)
    assert int(fault.flags) == 1 << 40 | 2
    assert fault.is_wp
    raw.event = 0x20
    assert messages._decode(raw) is None
    assert "0x20" in caplog.text


class TestThinC:
    """The C functions where Python's checks would hide them."""

    def test_open_rejects_an_unknown_way(self) -> None:
        assert lib.au_abi_open(0, 99, -1) == -22

    def test_calls_on_a_bad_descriptor(self) -> None:
        done = ffi.new("int64_t *", 77)
        assert lib.au_abi_copy(-1, 0, 0, PAGE_SIZE, 0, done) == -9
        assert done[0] == 0
        assert lib.au_abi_read(-1, ffi.new("struct au_uffd_msg[1]"), 1) == -9
        assert lib.au_abi_wake(-1, 0, PAGE_SIZE) == -9

    def test_done_may_be_null(self) -> None:
        assert lib.au_abi_zeropage(-1, 0, PAGE_SIZE, 0, ffi.NULL) == -9

    def test_read_of_nothing_is_an_error(self) -> None:
        assert lib.au_abi_read(-1, ffi.NULL, 0) == -22

    def test_failing_handshake_leaves_the_outputs_zero(self) -> None:
        fd = lib.au_abi_open(1, lib.AU_VIA_SYSCALL, -1)
        if fd < 0:
            pytest.skip("no userfaultfd")
        import os

        try:
            offered = ffi.new("uint64_t *", 5)
            ioctls = ffi.new("uint64_t *", 5)
            assert lib.au_abi_api(fd, 1 << 63, offered, ioctls) == -22
            assert (offered[0], ioctls[0]) == (0, 0)
            assert lib.au_abi_api(fd, 0, offered, ioctls) == 0
            assert offered[0]
            assert lib.au_abi_api(fd, 0, offered, ioctls) == -22
        finally:
            os.close(fd)
