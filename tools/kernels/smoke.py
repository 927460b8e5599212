"""What works on this kernel: a few dozen cases, each in a process of its own.

    python smoke.py OUT     runs all of them, as root and as nobody, and writes OUT as JSON

A case says "yes" if the promise is kept, "no" if the product says itself that this kernel cannot,
and anything else is a fault of the product.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiouffd
from aiouffd.buffers import sync
from aiouffd.errors import AiouffdError, UnsupportedError
from aiouffd.kernel.abi import Feature, Mode, PageCategory
from aiouffd.kernel.uffd import Userfaultfd, address_of
from aiouffd.sources import FunctionSource

PAGE = mmap.PAGESIZE
PAGES = 64
DATA = b"".join(bytes([65 + index % 26]) * PAGE for index in range(PAGES))
#: Seconds for one case: emulated machines are slow.
LIMIT = 60
NOBODY = 65534
PR_SET_DUMPABLE = 4

Case = Callable[[], Any]
CASES: dict[str, Case] = {}
#: What ends these cases is a signal, as promised.
SIGNALS: dict[str, int] = {}


def case(name: str, *, dies: int = 0) -> Callable[[Case], Case]:
    """Takes a function as the case ``name``: it returns whether the promise was kept."""

    def take(function: Case) -> Case:
        CASES[name] = function
        if dies:
            SIGNALS[name] = dies
        return function

    return take


async def fetched(offset: int, length: int) -> bytes:
    await asyncio.sleep(0.001)
    return DATA[offset : offset + length]


async def refused(offset: int, length: int) -> bytes:
    raise ValueError("there are no such bytes")


def opened(read: Any = fetched, **options: Any) -> aiouffd.LazyBuffer:
    options = {"block_size": PAGE, "readahead": 0, **options}
    return aiouffd.open(FunctionSource(read, len(DATA), portable=True), **options)


async def in_thread(what: Callable[[], Any]) -> Any:
    """The result of ``what`` on a new thread, or the exception that it raised."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        try:
            result = what()
        except Exception as error:
            result = error
        loop.call_soon_threadsafe(future.set_result, result)

    threading.Thread(target=run, daemon=True).start()
    return await future


def through_a_pipe(data: Any) -> bytes:
    reader, writer = os.pipe()
    return os.read(reader, os.write(writer, data))


def with_buffer(touch: Callable[[Any], Awaitable[bool]], **options: Any) -> bool:
    async def main() -> bool:
        async with opened(**options) as buffer:
            return await touch(buffer)

    return asyncio.run(main())


async def touch_all(buffer: Any) -> bool:
    view = buffer.view
    got = await in_thread(lambda: [view[index * PAGE + 3] for index in range(PAGES)])
    return bool(got == [DATA[index * PAGE] for index in range(PAGES)])


# ---- reading ----


@case("a thread that holds the GIL touches")
def holding_the_gil() -> bool:
    return with_buffer(touch_all)


@case("the loop's own thread touches")
def loop_thread() -> bool:
    async def touch(buffer: Any) -> bool:
        return [buffer.view[index * PAGE] for index in (0, 5, 63)] == [65, 70, DATA[63 * PAGE]]

    return with_buffer(touch)


@case("without asyncio")
def without_asyncio() -> bool:
    with sync.open(FunctionSource(fetched, len(DATA), portable=True), block_size=PAGE) as buffer:
        return bytes(buffer.view) == DATA


@case("a system call on missing bytes")
def system_call() -> bool | str:
    async def touch(buffer: Any) -> Any:
        got = await in_thread(lambda: through_a_pipe(buffer.view[PAGE : 2 * PAGE]))
        if buffer.user_mode_only and isinstance(got, OSError) and got.errno == errno.EFAULT:
            return "EFAULT: user mode only"
        return got == DATA[PAGE : 2 * PAGE]

    return with_buffer(touch)


@case("memfd")
def memfd() -> bool:
    return with_buffer(touch_all, kind="memfd")


@case("huge pages")
def hugetlb() -> bool:
    return with_buffer(touch_all, kind="hugetlb", block_size=2 << 20)


@case("huge pages of a memfd")
def hugetlb_memfd() -> bool:
    return with_buffer(touch_all, kind="hugetlb-memfd", block_size=2 << 20)


# ---- errors ----


def failing(how: str, **options: Any) -> bool:
    async def main() -> bool:
        async with opened(refused, errors="soft", **options) as buffer:
            view = buffer.view
            if how == "raw":
                await in_thread(lambda: view[7 * PAGE])
            if how == "guarded":
                got = await in_thread(lambda: buffer[7 * PAGE])
                return isinstance(got, aiouffd.SourceError)
            if how == "again":
                for _ in range(3):
                    got = await in_thread(lambda: buffer[7 * PAGE])
                return isinstance(got, aiouffd.SourceError) and buffer.stats.failures < 10
            got = await in_thread(lambda: through_a_pipe(view[7 * PAGE : 8 * PAGE]))
            return isinstance(got, OSError) and got.errno == errno.EFAULT

    return asyncio.run(main())


@case("a soft error: buf[i] raises")
def soft_guarded() -> bool:
    return failing("guarded")


@case("a soft error: buf[i] of a memfd raises")
def soft_guarded_memfd() -> bool:
    return failing("guarded", kind="memfd")


@case("a soft error: the source is not asked without end")
def soft_again() -> bool:
    return failing("again")


@case("a soft error: a raw touch is SIGBUS", dies=signal.SIGBUS)
def soft_raw() -> bool:
    return failing("raw")


@case("a soft error: a system call says EFAULT")
def soft_system_call() -> bool:
    return failing("write")


@case("a soft error heals")
def soft_heals() -> bool:
    broken = True

    async def read(offset: int, length: int) -> bytes:
        return await (refused if broken else fetched)(offset, length)

    async def main() -> bool:
        nonlocal broken
        async with opened(read, errors="soft") as buffer:
            first = await in_thread(lambda: buffer[7 * PAGE])
            broken = False
            await buffer.fetch(7 * PAGE, PAGE)
            view = buffer.view
            return isinstance(first, aiouffd.SourceError) and view[7 * PAGE] == DATA[7 * PAGE]

    return asyncio.run(main())


# ---- closing ----


def closing(how: str, **options: Any) -> bool | str:
    async def main() -> bool | str:
        asked = asyncio.Event()

        async def never(offset: int, length: int) -> bytes:
            asked.set()
            await asyncio.sleep(1000)
            raise AssertionError

        buffer = await opened(never, **options).aopen()
        view = buffer.view

        def touch() -> Any:
            if how == "raw":
                return view[7 * PAGE]
            if how == "guarded":
                return buffer[7 * PAGE]
            return through_a_pipe(view[7 * PAGE : 8 * PAGE])

        if how == "write" and buffer.user_mode_only:
            await buffer.aclose(force=True)
            return "user mode only"
        toucher = asyncio.ensure_future(in_thread(touch))
        await asked.wait()
        await buffer.aclose(force=True)
        got = await toucher
        if how == "guarded":
            return isinstance(got, AiouffdError)
        return isinstance(got, OSError) and got.errno == errno.EFAULT

    return asyncio.run(asyncio.wait_for(main(), LIMIT - 10))


@case("closing: a blocked buf[i] raises")
def close_guarded() -> bool | str:
    return closing("guarded")


@case("closing: a blocked buf[i] of a memfd raises")
def close_guarded_memfd() -> bool | str:
    return closing("guarded", kind="memfd")


@case("closing: a blocked raw touch is SIGBUS", dies=signal.SIGBUS)
def close_raw() -> bool | str:
    return closing("raw")


@case("closing: a blocked system call says EFAULT")
def close_system_call() -> bool | str:
    return closing("write")


# ---- other processes ----


@case("fork: children are served")
def fork_serve() -> bool:
    async def touch(buffer: Any) -> bool:
        view = buffer.view

        def fork() -> int:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                child = os.fork()
            if not child:
                right = all(view[i * PAGE] == DATA[i * PAGE] for i in range(0, PAGES, 3))
                os._exit(0 if right else 1)
            return os.waitpid(child, 0)[1]

        return bool(await in_thread(fork) == 0)

    return with_buffer(touch, fork="serve")


@case("attach: memory that another process serves")
def attach() -> bool:
    folder = Path("/tmp", f"attach-{os.getpid()}")
    folder.mkdir()
    (folder / "bytes").write_bytes(DATA)
    path = folder / "socket"
    server = subprocess.Popen(
        [sys.executable, "-m", "aiouffd", "pager", "native", "--socket", path, folder / "bytes"]
    )
    try:
        limit = time.monotonic() + LIMIT - 10
        while not path.exists() and time.monotonic() < limit:
            time.sleep(0.05)
        with aiouffd.attach(path) as memory:
            return bytes(memory.view[: len(DATA)]) == DATA
    finally:
        server.terminate()
        server.wait()


# ---- the kernel's own ----


def anonymous(pages: int, *, shared: bool = False) -> mmap.mmap:
    kind = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
    return mmap.mmap(-1, pages * PAGE, flags=kind | mmap.MAP_ANONYMOUS)


def registered(
    mode: Mode,
    features: Feature = Feature(0),  # noqa: B008
    *,
    shared: bool = False,
    filled: bool = False,
) -> tuple[Userfaultfd, mmap.mmap, int]:
    memory = anonymous(8, shared=shared)
    if filled:
        memory[:] = b"f" * len(memory)
    uffd = Userfaultfd(features, user_mode_only=None)
    uffd.register(address_of(memory), len(memory), mode)
    return uffd, memory, address_of(memory)


@case("Userfaultfd: copy and zeropage")
def copy() -> bool:
    uffd, memory, start = registered(Mode.MISSING)
    uffd.copy(start, b"c" * PAGE)
    uffd.zeropage(start + PAGE, PAGE)
    return memory[0] == ord("c") and memory[PAGE] == 0


@case("Userfaultfd: write protection")
def write_protection() -> bool:
    uffd, _, start = registered(Mode.WP, filled=True)
    uffd.writeprotect(start, PAGE, protect=True)
    uffd.writeprotect(start, PAGE, protect=False)
    return True


@case("Userfaultfd: write protection of shared memory")
def write_protection_shared() -> bool:
    uffd, _, start = registered(Mode.WP, shared=True, filled=True)
    uffd.writeprotect(start, PAGE, protect=True)
    return True


@case("Userfaultfd: minor faults of shared memory")
def minor() -> bool:
    registered(Mode.MINOR, shared=True)
    return True


@case("Userfaultfd: poison")
def poison() -> bool:
    uffd, _, start = registered(Mode.MISSING)
    return uffd.poison(start, PAGE) == PAGE


@case("Userfaultfd: move")
def move() -> bool:
    uffd, memory, start = registered(Mode.MISSING)
    source = anonymous(1)
    source[:] = b"m" * PAGE
    uffd.move(start, address_of(source), PAGE)
    return memory[0] == ord("m")


@case("Userfaultfd: written pages without messages")
def write_tracking() -> bool:
    uffd, memory, start = registered(Mode.WP, Feature.WP_ASYNC, filled=True)
    uffd.scan(start, len(memory), protect=True)
    memory[2 * PAGE] = 1
    found = uffd.scan(start, len(memory))
    return [(region.start - start, region.end - start) for region in found] == [
        (2 * PAGE, 3 * PAGE)
    ]


@case("Userfaultfd: accessed pages without messages")
def access_tracking() -> bool:
    uffd, memory, start = registered(Mode.RWP, Feature.RWP | Feature.RWP_ASYNC, filled=True)
    uffd.rwprotect(start, len(memory), protect=True)
    assert memory[3 * PAGE] == ord("f")
    found = uffd.scan(start, len(memory), all_of=PageCategory.ACCESSED)
    return [(region.start - start, region.end - start) for region in found] == [
        (3 * PAGE, 4 * PAGE)
    ]


@case("doctor says that it works")
def doctor() -> bool | str:
    done = subprocess.run(
        [sys.executable, "-m", "aiouffd", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout, file=sys.stderr)
    return done.returncode == 0


# ---- running them ----


def run_case(name: str, user: int, output: int) -> None:
    """In a child of its own, which has imported everything already. Its last line is the result."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    warnings.simplefilter("ignore")
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    try:
        kept = CASES[name]()
    except UnsupportedError as error:
        print(f"no: {error}")
    except Exception as error:
        print(f"WRONG: {type(error).__name__}: {error}")
    else:
        print({True: "yes", False: "WRONG"}.get(kept, kept))
    sys.stdout.flush()


def run_apart(name: str, user: int) -> str:
    """The result of a case: what it said, or how it ended."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            try:
                run_case(name, user, output.fileno())
            finally:
                os._exit(0)
        handle = os.pidfd_open(child)
        ready, _, _ = select.select([handle], [], [], LIMIT)
        os.close(handle)
        if not ready:
            os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        text = output.read().decode(errors="replace").strip()
    if not ready:
        return f"WRONG: not done after {LIMIT} s: {text[-300:]}"
    if status and status == -SIGNALS.get(name, 0):
        return "yes"
    if status or not text:
        return f"WRONG: ended with {status}: {text[-300:]}"
    return text.splitlines()[-1]


def main() -> None:
    """All cases as root and as nobody."""
    out = Path(sys.argv[1])
    results: dict[str, dict[str, str]] = {}
    for user, number in (("root", 0), ("nobody", NOBODY)):
        results[user] = {}
        for name in CASES:
            start = time.monotonic()
            result = run_apart(name, number)
            took = time.monotonic() - start
            print(f"{user}: {name}: {result} ({took:.1f} s)", flush=True)
            results[user][name] = result
            out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
